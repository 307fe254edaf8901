"""Rules of thumb for where to look are orders of parts that need no policy; a row stops where it is sure enough."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynrl.backbones import Backbone, Looks, State
from dynrl.data import Split
from dynrl.evaluation.routes import FITTED, Fit, Found, PolicyFor, best_within
from dynrl.ops.exit_scores import exit_scores
from dynrl.policies import RoutePolicy

LEVELS = 64  # how many thresholds are tried


class Looking(RoutePolicy):
    """This policy looks where most is left of what an order goes by, until the highest probability is high enough.

    What lies in a part that a row has looked at counts no more.

    Args:
        backbone: the backbone that the policy is for.
        order: a name in the backbone's `orders`.
        scale: the scale of the parts.
        threshold: the probability at which a row stops.
    """

    def __init__(self, backbone: Looks, order: str, scale: int, threshold: float) -> None:
        super().__init__()
        self.order, self.scale, self.threshold = order, scale, threshold
        self._of = (backbone,)  # in a tuple, since the backbone is no part of the policy

    def route(self, inputs: Tensor) -> Tensor:
        """Return the parts at which rows look if they are never sure, then stops: [B, columns]."""
        (backbone,) = self._of
        may = (backbone.scale == self.scale).expand(len(inputs), -1)
        left, shares = backbone.orders[self.order](backbone, inputs), backbone.shares
        route = torch.zeros(len(inputs), backbone.columns, dtype=torch.int64, device=inputs.device)
        for look in range(min(backbone.columns, int(may[0].sum()))):
            there = (left @ shares).masked_fill(~may, -torch.inf)
            window = there.argmax(1)
            may = may.scatter(1, window.unsqueeze(1), False)  # nor again where nothing is left
            left = left * (1 - shares.t()[window])
            route[:, look] = 1 + window
        return route

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """Return a `Policy.chooser` that follows the order until a row is sure enough."""
        follow, (column, _) = super().chooser(backbone, price), backbone.scores["top-1"]

        def at(state: Any) -> Tensor:
            window, sure = follow(state), backbone.observe(state)[:, column] >= self.threshold
            return window.masked_fill(sure, 0)

        return at


def looking(backbone: Backbone) -> dict[str, Fit]:
    """Return a rule for each order."""
    assert isinstance(backbone, Looks), "the rule is that of its families"
    return {name: partial(fit_order, order=name) for name in backbone.orders}


@torch.inference_mode()
def fit_order(backbone: Backbone, split: Split, order: str) -> PolicyFor:
    """Find out what each scale and threshold costs and reaches, by one walk a scale; see `dynrl.evaluation.rules`."""
    assert isinstance(backbone, Looks), "the rule is that of its families"
    split, found = split.head(FITTED), list[Found]()
    look, start = float(backbone.costs[0, 1]), float(backbone.start_macs)
    for scale in backbone.scale.unique().tolist():
        route, said = Looking(backbone, order, scale, torch.inf).route(split.inputs), list[Tensor]()

        def listen(state: State, route: Tensor = route, said: list[Tensor] = said) -> Tensor:
            said.append(backbone.output(state))
            return state.along(route)

        walk = backbone.run(split.inputs[:], listen)
        said.append(walk.outputs)  # type: ignore[arg-type]
        most = int((walk.route > 0).sum(1).max())  # a row that has no place left stops by a decision that is no look
        outputs = torch.stack(said).float()  # [looks + 1, n, classes]
        metric = torch.stack([split.task.score(each, split.targets) for each in outputs])
        sure = torch.stack([exit_scores(each)[:, 0] for each in outputs])
        sure[-1] = torch.inf
        for threshold in [0.0, *sure[:-1].quantile(torch.linspace(0, 1, LEVELS)).tolist(), torch.inf]:
            stop = (sure >= threshold).int().argmax(0, keepdim=True)
            looks = stop.clamp_max(most).double().mean()
            cost = (start + look * float(looks)) / backbone.dense_macs
            reached = split.task.mean(metric.gather(0, stop).squeeze(0), split.targets)
            found.append(Found(Looking(backbone, order, scale, threshold), cost, reached))
    return best_within(found, split.task)
