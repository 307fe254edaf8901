"""Early exit: `dynrl/Exit-v0`."""

from __future__ import annotations

from dynrl.backbones import Backbone, ExitResNet
from dynrl.envs.core import RoutingVectorEnv


class ExitVectorEnv(RoutingVectorEnv):
    """At each classifier on the way through a network: stop with its answer, or go on to the next?

    ## Features
    How sure the exit is (`dynrl.ops.exit_scores`: its highest probability, its lead over the second, the entropy, each
    in 0 ... 1), and the mean of each channel of the features before it.

    ## Action
    `Discrete(2)`: 0 stops, 1 goes on: the blocks up to the next exit and its classifier run.

    ## Episode
    One image. It ends where it stops, or at the last exit, which leaves nothing to decide: at most one step less than
    there are exits.

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
        """A small untrained ResNet with four exits."""
        return ExitResNet(input_shape, layers=(2, 2, 2), widths=(8, 16, 32), exits=(0, 2, 4))
