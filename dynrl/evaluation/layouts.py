"""Rules of thumb for neural modules are the parser's layout of each question, and layouts at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynrl.backbones import Backbone, NeuralModules
from dynrl.backbones.neural_modules import ONE
from dynrl.data import Split
from dynrl.evaluation.routes import FITTED, Fit, PolicyFor
from dynrl.evaluation.scores import score_routes
from dynrl.policies import RandomPolicy, RoutePolicy


class LayoutPolicy(RoutePolicy):
    """This policy gives each input the layout that the backbone's parser makes of its question."""

    def __init__(self, backbone: NeuralModules) -> None:
        super().__init__()
        self._of = (backbone,)  # in a tuple, since the backbone is no part of the policy

    def route(self, inputs: Tensor) -> Tensor:
        """Return each input's route: [B, columns]."""
        (backbone,) = self._of
        return backbone.layout(backbone.question(inputs))


class RandomLayouts(RandomPolicy):
    """This policy puts modules together at random, whatever the question. It never asks the one network."""

    def __init__(self, backbone: NeuralModules) -> None:
        thrift = backbone.thrift.clone()
        thrift[:, ONE] = -1
        super().__init__(thrift, 0.5)


def layouts(backbone: Backbone) -> dict[str, Fit]:
    """Return the rules."""
    assert isinstance(backbone, NeuralModules), "the rules are those of its family"
    return {"expert layout": _fit(LayoutPolicy), "random layout": _fit(RandomLayouts)}


def _fit(kind: Callable[[NeuralModules], RoutePolicy]) -> Fit:
    """Return a rule of one policy, for all budgets that pay for it; see `dynrl.evaluation.rules`."""

    @torch.inference_mode()
    def fit(backbone: Backbone, split: Split) -> PolicyFor:
        assert isinstance(backbone, NeuralModules), "the rule is that of its family"
        policy, split = kind(backbone), split.head(FITTED)
        macs = float(score_routes(backbone, policy.route(split.inputs), split).macs.mean())
        return lambda budget: policy if macs <= budget else None

    return fit
