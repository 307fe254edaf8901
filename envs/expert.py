"""`dynrl/Expert-v0` is the environment of the decision which expert of each layer runs."""

from __future__ import annotations

from dynrl.backbones import Backbone, ExpertNet
from dynrl.envs.core import RoutingVectorEnv


class ExpertVectorEnv(RoutingVectorEnv):
    """At each layer of a network of experts, which expert, or how many, does an input take?

    ## Features
    The mean of each channel of the features before the experts; of an `ExpertModule`, before their block.

    ## Action
    `Discrete(E)`: action e runs the layer's expert e, which is two matrix products around a hidden layer. Experts are
    ordered from narrow to wide. Some may have the same width. The first may have no hidden units: it passes the
    features through at no cost. Of an `ExpertModule`, a network of your own with mixtures of experts, action c lets
    each token of the input take as many experts as the backbone's `counts` say, from few to all that the layer takes by
    itself. Which ones, and their weights, is up to the layer's own router.

    ## Episode
    One input. The episode ends after the last layer, so it has as many steps as the network has layers.

    ## Source
    Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, Shazeer et al., ICLR 2017; one
    choice a layer as in Switch Transformers, Fedus et al., JMLR 2022; experts of unequal width as in HMoE, Wang et
    al., EMNLP 2025. Their gates are trained by backpropagation; here the choice is an action. The price in the
    observation follows Odena et al. 2017. How many experts a token takes is decided by the router's confidence in
    Harder Tasks Need More Experts, Huang et al., ACL 2024; here, for all tokens of an input, by a policy.

    ## Version history
    v0: the first version.
    """

    decision = "expert"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained network of three layers."""
        return ExpertNet(input_shape, stem=8, channels=16, layers=3, widths=(0, 8, 32, 32))  # type: ignore[arg-type]
