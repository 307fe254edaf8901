"""Layer skipping: `dynrl/Skip-v0`."""

from __future__ import annotations

from dynrl.backbones import Backbone, SkipResNet
from dynrl.envs.core import RoutingVectorEnv


class SkipVectorEnv(RoutingVectorEnv):
    """At each identity block of a residual network: run it, or hand the features through?

    ## Features
    The mean of each channel of the features that stand before the block.

    ## Action
    `Discrete(2)`: 1 runs the block, 0 skips it. Blocks that change the shape always run and are no decisions.

    ## Episode
    One image. It ends after the last block: every episode has as many steps as the network has identity blocks.

    ## Source
    SkipNet: Learning Dynamic Routing in Convolutional Networks, Wang et al., ECCV 2018 (sequential decisions from
    running features). The price in the observation follows Odena et al. 2017.

    ## Version history
    v0: first.
    """

    decision = "skip"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """A small untrained ResNet."""
        return SkipResNet(input_shape, layers=(2, 2, 2), widths=(8, 16, 32))
