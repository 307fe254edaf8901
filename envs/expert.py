"""Expert choice: `dynrl/Expert-v0`."""

from __future__ import annotations

from dynrl.backbones import Backbone, ExpertNet
from dynrl.envs.core import RoutingVectorEnv


class ExpertVectorEnv(RoutingVectorEnv):
    """At each layer of a network of experts: which one shall transform this image's features?

    ## Features
    The mean of each channel of the features that stand before the experts.

    ## Action
    `Discrete(E)`: e takes the layer's expert e, two products of so many hidden units. Experts stand from narrow to
    wide; some may have the same width, and the first may have none: it hands the features through at no cost.

    ## Episode
    One image. It ends after the last layer: every episode has as many steps as the network has layers.

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
        """A small untrained network of three layers."""
        return ExpertNet(input_shape, stem=8, channels=16, layers=3, widths=(0, 8, 32, 32))  # type: ignore[arg-type]
