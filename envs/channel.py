"""`dynrl/Channel-v0` is the environment of the decision how many channels a block computes."""

from __future__ import annotations

from dynrl.backbones import Backbone, SlimmableResNet
from dynrl.envs.core import RoutingVectorEnv


class ChannelVectorEnv(RoutingVectorEnv):
    """At each identity block of a residual network, how many of its inner channels are computed?

    ## Features
    The mean of each channel of the features before the block.

    ## Action
    `Discrete(n)`, where n is the number of the backbone's `shares` (4: a quarter, a half, three quarters, all). A
    higher action computes more channels. Channels are nested: a wider choice computes all channels of a narrower one.
    The features between blocks keep their full width. Blocks that change the shape always run whole and pose no
    decision.

    ## Episode
    One image. The episode ends after the last block, so it has as many steps as the network has identity blocks.

    ## Source
    Runtime Neural Pruning, Lin et al., NIPS 2017 (nested groups of channels, chosen layer by layer). Slimmable Neural
    Networks, Yu et al., ICLR 2019 (batch norm for each width).

    ## Version history
    v0: the first version.
    """

    decision = "channel"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained ResNet."""
        return SlimmableResNet(input_shape, layers=(2, 2, 2), widths=(8, 16, 32))  # type: ignore[arg-type]
