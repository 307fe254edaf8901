"""`dynrl/Exit-v0` is the environment of the decision at which classifier an input leaves a network."""

from __future__ import annotations

from dynrl.backbones import Backbone, ExitResNet
from dynrl.envs.core import RoutingVectorEnv


class ExitVectorEnv(RoutingVectorEnv):
    """At each classifier on the way through a network, does the input stop with its answer or go on to the next one?

    ## Features
    They say how sure the exit is (`dynrl.ops.exit_scores`: the highest probability, its lead over the second one and
    the entropy, each from 0 to 1). Then follows the mean of each channel of the features before the exit; of maps of
    several scales, of the coarsest. A network with the setting `sees="scores"` does without the means: where a policy
    has few inputs to learn on, it would know them by heart.

    ## Action
    `Discrete(2)`: 0 stops; 1 goes on, so that the blocks up to the next exit and its classifier run.

    ## Episode
    One image. The episode ends where the image stops or at the last exit, where there is nothing to decide. So it
    has at most one step less than there are exits.

    ## Source
    BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks, Teerapittayanon et al., ICPR 2016 (exits by
    thresholds on the entropy); Multi-Scale Dense Networks for Resource Efficient Image Classification, Huang et al.,
    ICLR 2018 (exits by thresholds on the highest probability, under a budget). Reports compare the learned policy with
    both rules.

    ## Version history
    v0: the first version.
    """

    decision = "exit"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained ResNet with four exits."""
        return ExitResNet(input_shape, layers=(2, 2, 2), widths=(8, 16, 32), exits=(0, 2, 4))
