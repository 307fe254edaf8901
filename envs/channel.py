"""Channel subsets: `dynrl/Channel-v0`."""

from __future__ import annotations

from dynrl.backbones import Backbone, SlimmableResNet
from dynrl.envs.core import RoutingVectorEnv


class ChannelVectorEnv(RoutingVectorEnv):
    """At each identity block of a residual network: how many of its inner channels are computed?

    ## Features
    The mean of each channel of the features that stand before the block.

    ## Action
    `Discrete(n)`, n the number of the backbone's `shares` (4: a quarter, a half, three quarters, all): the higher, the
    wider. Channels are nested: a wider choice computes all that a narrower one does. The features that go from block to
    block keep their full width. Blocks that change the shape always run whole and are no decisions.

    ## Episode
    One image. It ends after the last block: every episode has as many steps as the network has identity blocks.

    ## Source
    Runtime Neural Pruning, Lin et al., NIPS 2017 (nested groups of channels, chosen layer by layer). Slimmable Neural
    Networks, Yu et al., ICLR 2019 (batch norm for each width).

    ## Version history
    v0: first.
    """

    decision = "channel"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """A small untrained ResNet."""
        return SlimmableResNet(input_shape, layers=(2, 2, 2), widths=(8, 16, 32))  # type: ignore[arg-type]
