"""Layer skipping: `dynrl/Skip-v0`."""

from __future__ import annotations

import torch

from dynrl.backbones import Backbone, SkipResNet
from dynrl.envs.core import RoutingEnv, RoutingVectorEnv


class SkipVectorEnv(RoutingVectorEnv):
    """At each identity block of a residual network: run it, or hand the features through?

    ## Observation
    A float32 vector, laid out as `dynrl.observation.Layout` says: the mean of each channel of the features that stand
    before the block, which block it is, the last choice, the share of the dense network's MACs spent, the price, and
    the mask of open choices (both, always).

    ## Action
    `Discrete(2)`: 1 runs the block, 0 skips it. Blocks that change the shape always run and are no decisions.
    `MultiDiscrete` with `upfront=True`, all at once: see `RoutingVectorEnv`.

    ## Reward
    At each step minus price x (MACs of this step / MACs of the dense network); at the last step also the accuracy
    term: "distillation" (default: log-likelihood of the true class minus the divergence from what the dense network
    says), "log_likelihood", or "correct" (1 if the true class is the likeliest).

    ## Episode
    One image. It ends after the last block: every episode has as many steps as the network has identity blocks.

    ## Backbones
    `SkipResNet`: ResNets of basic blocks or bottlenecks, with CIFAR or ImageNet stems.

    ## Source
    SkipNet: Learning Dynamic Routing in Convolutional Networks, Wang et al., ECCV 2018 (sequential decisions from
    running features). The price in the observation follows Odena et al. 2017.

    ## Version history
    v0: first.
    """

    decision = "skip"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """A small untrained ResNet, always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return SkipResNet(input_shape, layers=(2, 2, 2), widths=(8, 16, 32))


class SkipEnv(RoutingEnv):
    """One image at a time; its page is `SkipVectorEnv`'s."""

    vector_env = SkipVectorEnv
