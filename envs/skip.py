"""`dynrl/Skip-v0` is the environment of the decision which residual blocks run."""

from __future__ import annotations

from dynrl.backbones import Backbone, SkipResNet
from dynrl.envs.core import RoutingVectorEnv


class SkipVectorEnv(RoutingVectorEnv):
    """At each identity block of a residual network, does the block run or do the features pass it by?

    ## Features
    How sure the network's last layer is of a row that skips all that follows: its highest probability, the lead over
    the second one, and the entropy divided by log(classes); three zeros where a later stage comes. Then the mean of
    each channel of the features before the block. Where blocks are split into paths, which other paths of the block
    ran so far comes before, and the means are those of their sum. Of a network of yours, the means alone.

    ## Action
    `Discrete(2)`: 1 runs the block, 0 skips it. Blocks that change the shape always run and pose no decision. Where
    blocks are split into paths, each path of each block is run or skipped.

    ## Episode
    One image. The episode ends after the last block, so it has as many steps as the network has identity blocks, or
    paths.

    ## Source
    SkipNet: Learning Dynamic Routing in Convolutional Networks, Wang et al., ECCV 2018 (sequential decisions from
    running features). LayerSkip, Elhoushi et al., ACL 2024 (one last layer for all depths). Dynamic Multi-path Neural
    Network, Su et al., 2019 (an auxiliary class task for the controller).
    The price in the observation follows Odena et al. 2017.

    ## Version history
    v0: the first version.
    """

    decision = "skip"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained ResNet."""
        return SkipResNet(input_shape, layers=(2, 2, 2), widths=(8, 16, 32))
