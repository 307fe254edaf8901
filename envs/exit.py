"""Early exit: `dynrl/Exit-v0`."""

from __future__ import annotations

import torch

from dynrl.backbones import Backbone, ExitResNet
from dynrl.envs.core import RoutingEnv, RoutingVectorEnv


class ExitVectorEnv(RoutingVectorEnv):
    """At each classifier on the way through a network: stop with its answer, or go on to the next?

    ## Observation
    A float32 vector, laid out as `dynrl.observation.Layout` says: how sure the exit is (`dynrl.ops.exit_scores`: its
    highest probability, the lead over the second, the entropy, each in 0 ... 1) and the mean of each channel of the
    features before it, which exit it is, the last choice, the share of the dense network's MACs spent, the price, and
    the mask of open choices (both, always).

    ## Action
    `Discrete(2)`: 0 stops, 1 goes on: the blocks up to the next exit and its classifier run.
    `MultiDiscrete` with `upfront=True`, all at once: see `RoutingVectorEnv`.

    ## Reward
    At each step minus price x (MACs of this step / MACs of the dense network); at the last step also the accuracy
    term, of the answer at which the episode stopped: "distillation" (default: log-likelihood of the true class minus
    the divergence from what the dense network says), "log_likelihood", or "correct" (1 if the true class is the
    likeliest). The first step also pays for what ran before it: the stem, and all up to the first exit.

    ## Episode
    One image. It ends where it stops, or at the last exit, which leaves nothing to decide: at most one step less than
    there are exits.

    ## Backbones
    `ExitResNet`: ResNets of basic blocks or bottlenecks, with CIFAR or ImageNet stems, trained at all exits together.

    ## Source
    BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks, Teerapittayanon et al., ICPR 2016 (exits by
    thresholds on the entropy); Multi-Scale Dense Networks for Resource Efficient Image Classification, Huang et al.,
    ICLR 2018 (on the highest probability, under a budget). Both rules stand beside the learned one in reports.

    ## Version history
    v0: first.
    """

    decision = "exit"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """A small untrained ResNet with four exits, always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ExitResNet(input_shape, layers=(2, 2, 2), widths=(8, 16, 32), exits=(0, 2, 4))


class ExitEnv(RoutingEnv):
    """One image at a time; its page is `ExitVectorEnv`'s."""

    vector_env = ExitVectorEnv
