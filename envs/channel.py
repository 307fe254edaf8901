"""Channel subsets: `dynrl/Channel-v0`."""

from __future__ import annotations

import torch

from dynrl.backbones import Backbone, SlimmableResNet
from dynrl.envs.core import RoutingEnv, RoutingVectorEnv


class ChannelVectorEnv(RoutingVectorEnv):
    """At each identity block of a residual network: how many of its inner channels are computed?

    ## Observation
    A float32 vector, laid out as `dynrl.observation.Layout` says: the mean of each channel of the features that stand
    before the block, which block it is, the last choice, the share of the dense network's MACs spent, the price, and
    the mask of open choices (all, always).

    ## Action
    `Discrete(n)`, n the number of the backbone's `shares` (4: a quarter, a half, three quarters, all): the higher, the
    wider. Channels are nested: a wider choice computes all that a narrower one does. The features that go from block to
    block keep their full width. Blocks that change the shape always run whole and are no decisions.
    `MultiDiscrete` with `upfront=True`, all at once: see `RoutingVectorEnv`.

    ## Reward
    At each step minus price x (MACs of this step / MACs of the dense network); at the last step also the accuracy
    term: "distillation" (default: log-likelihood of the true class minus the divergence from what the dense network
    says), "log_likelihood", or "correct" (1 if the true class is the likeliest).

    ## Episode
    One image. It ends after the last block: every episode has as many steps as the network has identity blocks.

    ## Backbones
    `SlimmableResNet`: ResNets of basic blocks or bottlenecks, with CIFAR or ImageNet stems; weights are shared by all
    widths, batch norm is not.

    ## Source
    Runtime Neural Pruning, Lin et al., NIPS 2017 (nested groups of channels, chosen layer by layer). Slimmable Neural
    Networks, Yu et al., ICLR 2019 (batch norm for each width).

    ## Version history
    v0: first.
    """

    decision = "channel"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """A small untrained ResNet, always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return SlimmableResNet(input_shape, layers=(2, 2, 2), widths=(8, 16, 32))  # type: ignore[arg-type]


class ChannelEnv(RoutingEnv):
    """One image at a time; its page is `ChannelVectorEnv`'s."""

    vector_env = ChannelVectorEnv
