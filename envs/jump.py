"""`dynrl/Jump-v0` is the environment of the decision which word of a text is read next."""

from __future__ import annotations

from dynrl.backbones import Backbone, JumpRNN
from dynrl.envs.core import RoutingVectorEnv


class JumpVectorEnv(RoutingVectorEnv):
    """After each word that a recurrent network reads of a text, which word does it read next, or does it stop?

    ## Features
    The hidden state, and how much of the longest text lies before the word just read and behind it.

    ## Action
    `Discrete(n)`: 0 stops with the answer so far. The next actions jump by as many words as the backbone's `jumps`
    say, the first one to the next word. Then follows an action for each of its `ends`: to the word behind the next
    comma or full stop, for example. If the backbone may `follow`, the last action goes to the place that the word just
    read names. An action that leads beyond the end of the text is a stop.

    ## Episode
    One text. The first word is read before the first decision. The episode ends with a stop, at the end of the text, or
    after as many words as the longest text has.

    ## Agents and policies
    Gates are refused, because the mean of two places in a text is no place. So are policies that decide upfront: where
    to read on depends on what was read, and a look at the whole text would be the reading that is to be saved.

    ## Data
    The default is `find-small`. `needle` has sentences; its recipe jumps to their ends, and so does that of a
    folder of your own texts. Texts are token ids, followed by zeros.

    ## Source
    Learning to Skim Text, Yu et al., ACL 2017 (LSTM-Jump): jumps of so many words, by REINFORCE. Neural Speed Reading
    with Structural-Jump-LSTM, Hansen et al., ICLR 2019: jumps to the ends of words, clauses and sentences. There, the
    number of jumps is bounded or a skipped word is charged too; here, the price of compute does both.
    Skim-RNN (Seo et al., ICLR 2018) does not jump: it reads each word, and updates less of its state at most of them.

    ## Version history
    v0: the first version.
    """

    decision = "jump"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained network that may follow what a token names."""
        return JumpRNN(input_shape, width=8, hidden=16, follow=True)  # type: ignore[arg-type]
