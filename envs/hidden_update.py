"""`dynrl/HiddenUpdate-v0` is the environment of the decision how much of its state a recurrent network updates."""

from __future__ import annotations

from dynrl.backbones import Backbone, SkipGRU
from dynrl.envs.core import RoutingVectorEnv


class HiddenUpdateVectorEnv(RoutingVectorEnv):
    """At each step of a sequence, how much of the hidden state of a recurrent network is updated, if any?

    ## Features
    The hidden state, the time (hat functions on the backbone's `knots`), and the share of the sequence since the last
    update, told of each part of the state that an action updates beyond the one below it. If the backbone `sees`
    "state+input", the numbers of this step follow. Without them, the decision is taken before the input is seen, and a
    step that is copied need not even be read.

    Of a `MultiScaleRNN`: both layers' states, how much of the longest text has been read, and whether this was the last
    token.

    ## Action
    `Discrete(n)`, where n is the number of the backbone's `shares`. With two (0 and 1), 1 updates the hidden state by
    the cell, and 0 copies it. With more (such as 0, 0.25, 0.5 and 1), a higher action updates more units. The first
    ones are updated most often, and what is updated reads no unit behind it. Of a `MultiScaleRNN`, 1 sets a boundary:
    the upper layer is updated, and 0 copies its state; the lower layer reads every token.

    ## Episode
    One sequence. The episode ends after the last step, so it has as many steps as the sequence.

    ## Data
    The default is `sequential-digits`. `needle` is text, for a `MultiScaleRNN`. `adding` is a regression and needs a
    network that is trained together with its policy, because almost every random route misses one of the two numbers.

    ## Source
    Skip RNN: Learning to Skip State Updates in Recurrent Neural Networks, Campos et al., ICLR 2018. There, a gate
    accumulates the probability of an update, which grows with the steps since the last update. Here, the policy
    observes these steps. Variable Computation in Recurrent Neural Networks, Jernite et al., ICLR 2017: how many units
    are updated at a step, by a gate with a soft edge, which needs all of them in training. Hierarchical Multiscale
    Recurrent Neural Networks, Chung et al., ICLR 2017: an upper layer that is updated at boundaries.

    ## Version history
    v0: the first version.
    """

    decision = "hidden-update"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained GRU."""
        return SkipGRU(input_shape, hidden=32)  # type: ignore[arg-type]
