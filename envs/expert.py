"""Expert choice: `dynrl/Expert-v0`."""

from __future__ import annotations

import torch

from dynrl.backbones import Backbone, ExpertNet
from dynrl.envs.core import RoutingEnv, RoutingVectorEnv


class ExpertVectorEnv(RoutingVectorEnv):
    """At each layer of a network of experts: which one shall transform this image's features?

    ## Observation
    A float32 vector, laid out as `dynrl.observation.Layout` says: the mean of each channel of the features that stand
    before the experts, which layer it is, the last choice, the share of the dense network's MACs spent, the price, and
    the mask of open choices (all, always).

    ## Action
    `Discrete(E)`: e takes the layer's expert e, two products of so many hidden units. Experts stand from narrow to
    wide; some may have the same width, and the first may have none: it hands the features through at no cost.
    `MultiDiscrete` with `upfront=True`, all at once: see `RoutingVectorEnv`.

    ## Reward
    At each step minus price x (MACs of this step / MACs of the dense network, which takes the last, a widest expert in
    every layer); at the last step also the accuracy term: "distillation" (default: log-likelihood of the true class
    minus the divergence from what the dense network says), "log_likelihood", or "correct" (1 if the true class is the
    likeliest).

    ## Episode
    One image. It ends after the last layer: every episode has as many steps as the network has layers.

    ## Backbones
    `ExpertNet`: a convolutional network whose pointwise layers have several experts.

    ## Source
    Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, Shazeer et al., ICLR 2017; one
    choice a layer as in Switch Transformers, Fedus et al., JMLR 2022; experts of unequal width as in HMoE, Wang et
    al., EMNLP 2025. Their gates are trained by backpropagation; here the choice is an action. The price in the
    observation follows Odena et al. 2017.

    ## Version history
    v0: first.
    """

    decision = "expert"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """A small untrained network of three layers, always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ExpertNet(input_shape, stem=8, channels=16, layers=3, widths=(0, 8, 32, 32))  # type: ignore[arg-type]


class ExpertEnv(RoutingEnv):
    """One image at a time; its page is `ExpertVectorEnv`'s."""

    vector_env = ExpertVectorEnv
