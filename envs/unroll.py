"""`dynrl/Unroll-v0` is the environment of the decision how often a network applies its one block."""

from __future__ import annotations

from dynrl.backbones import Backbone, Unrolled
from dynrl.envs.core import RoutingVectorEnv


class UnrollVectorEnv(RoutingVectorEnv):
    """After each step of a network that applies one block again and again, is there another, or is the answer good?

    ## Features
    Of an `Unrolled` network or a `RecallNet`: how sure the present answer is (`dynrl.ops.exit_scores`: the highest
    probability, its lead over the second one and the entropy, each from 0 to 1), how far the last step moved the
    state, and the mean of each channel of the state. Of a `Restorer`: the size of the last change, the noise that
    is left, what was taken off and the noise at first (logarithms).

    ## Action
    `Discrete(2)`: 0 stops with the present answer; 1 applies the block once more.

    ## Episode
    One input. Its first step is taken before the first decision. The episode ends where the input stops or after the
    last step, so it has at most one decision less than the network has steps.

    ## Reward
    `gain` is the default of the recipes. The longest walk may be worse than an early stop, so its answer is no measure
    (`distillation`).

    ## Data
    The default is `hops`: an input that asks for k hops needs k steps. `noisy-photos` has images to restore; how many
    steps are best depends on the noise.

    ## Source
    Adaptive Computation Time for Recurrent Neural Networks, Graves 2016, where a halting unit of the network itself
    stops it; PonderNet: Learning to Ponder, Banino et al. 2021, where the unit is trained by the expected loss. Gates
    (`--agent gate`) are trained by the expected answer and the expected number of steps, as these are. Dynamically
    Unfolding Recurrent Restorer, Zhang et al., ICLR 2019, where a policy learns from what each step gains.

    ## Version history
    v0: the first version.
    """

    decision = "unroll"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained network of four steps, with an answer for each place."""
        return Unrolled(input_shape, classes=input_shape[0], hidden=8, steps=4)
