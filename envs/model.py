"""`dynrl/Model-v0` is the environment of the decision which of several whole models answer."""

from __future__ import annotations

from dynrl.backbones import Backbone, Members
from dynrl.envs.core import RoutingVectorEnv


class ModelVectorEnv(RoutingVectorEnv):
    """Which of several models, cheap to dear, looks at the input first, and is its answer kept or a dearer one asked?

    ## Features
    How sure the last answer is (`dynrl.ops.exit_scores`: the highest probability, its lead over the second one and the
    entropy, each from 0 to 1), how sure the answer before it was, and which probability that one gave to the class that
    is now the likeliest; all are 0 where there is no such answer. Then follow means of the input over 4x4 cells of each
    channel, and its standard deviation.

    ## Action
    `Discrete(K)` for K models. At first, action k runs model k. After model i, 0 stops with its answer, and j runs
    model i + j; there are K - i choices, and a higher action runs the last model.

    ## Episode
    One image. The episode ends where a model's answer is kept, or after the last model. So it has at most K steps.

    ## Source
    IDK Cascades: Fast Deep Learning by Learning not to Overthink, Wang et al., UAI 2018 (thresholds on a score of each
    model); Approximation Algorithms for Cascading Prediction Models, Streeter, ICML 2018 (a greedy choice of models and
    thresholds); Adaptive Neural Networks for Efficient Inference, Bolukbasi et al., ICML 2017 (a policy, learned by
    supervision, between networks). Reports compare the learned policy with all three. A policy that decides upfront
    chooses a model from the input alone. One model at several sizes of its input is the choice of a resolution (Dynamic
    Resolution Network, Zhu et al., NeurIPS 2021).

    ## Version history
    v0: the first version.
    """

    decision = "model"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return three small untrained ResNets."""
        shapes = ({"widths": [4]}, {"widths": [8, 16]}, {"widths": [16, 32]})
        members = [
            {"family": "skip_resnet", "layers": [1] * len(of["widths"]), "stem_stride": 2, **of} for of in shapes
        ]
        return Members(input_shape, members=tuple(members))
