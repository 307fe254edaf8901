"""Rules of thumb that a decision is known for are fitted on validation data and compared with learned policies.

`RULES` holds the rules by name, and `Backbone.rule` names the one that a family is known for. A plugin adds a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dynrl.backbones import Backbone, NeuralTree, State
from dynrl.data import Split
from dynrl.deploy import RoutedModel
from dynrl.evaluation.by_task import tables
from dynrl.evaluation.cascades import cascades
from dynrl.evaluation.layouts import layouts
from dynrl.evaluation.looking import looking
from dynrl.evaluation.routes import FITTED, Fit, PolicyFor, cheapest_choices
from dynrl.evaluation.scores import score
from dynrl.inputs import Inputs, repeat_first
from dynrl.policies import ThresholdPolicy
from dynrl.policies.threshold import fit_thresholds

HALVINGS = 12


def thresholds(backbone: Backbone) -> dict[str, Fit]:
    """Return a threshold rule for each score that the family computes anyway (`Backbone.scores`)."""
    return {f"threshold {name}": partial(fit_score, name=name) for name in backbone.scores}


def trees(backbone: Backbone) -> dict[str, Fit]:
    """Return the threshold on routers, and of a forest one on the vote of paths that the trees' own routers prefer."""
    assert isinstance(backbone, NeuralTree), "the rules are those of its family"
    rules = thresholds(backbone)
    if backbone.config["forest"] > 1:
        (_, paths), *_ = backbone.constant_routes()
        rules["threshold vote"] = partial(fit_score, name="router", unsure=paths)
    return rules


# Each entry maps a backbone to the rules to fit, by the names that reports show.
RULES: dict[str, Callable[[Backbone], Mapping[str, Fit]]] = {
    "threshold": thresholds,
    "trees": trees,
    "cascade": cascades,
    "looks": looking,
    "table": tables,
    "layouts": layouts,
}


def rules_of(backbone: Backbone) -> Mapping[str, Fit]:
    """Return the rules that the backbone's family is known for; there are none if it names none."""
    if backbone.rule is None:
        return {}
    if backbone.rule not in RULES:
        raise ValueError(
            f"{type(backbone).__name__} asks for the rule {backbone.rule!r}; expected one of {sorted(RULES)}. "
            "Add yours to dynrl.evaluation.RULES"
        )
    return RULES[backbone.rule](backbone)


@torch.inference_mode()
def fit_score(backbone: Backbone, split: Split, name: str, unsure: tuple[int, ...] | None = None) -> PolicyFor:
    """Fit thresholds on one of the family's scores: sure rows take the cheapest choice, others that of `unsure`.

    This is a route, by default the full one. If the cheapest choice ends the walk wherever it is another (an exit's
    stop), the thresholds are those of `fit_thresholds`.
    In other families (a loop, for example), each point's threshold is the same quantile of its scores; the quantile is
    found by walking.
    """
    column, rising = backbone.scores[name]
    route = torch.tensor(unsure or backbone.full_route).clamp_min(0)
    seen = _scores_along(route, backbone, split, column)
    exits = leaving(backbone, split.inputs, route)

    def policy(values: Tensor) -> ThresholdPolicy:  # one value a point
        return ThresholdPolicy(backbone, name, values[backbone.column_point], route)

    if exits is not None:
        whole, costs = torch.stack([seen[column] for column in exits.columns], 1), exits.macs

        def by_shares(budget: float) -> ThresholdPolicy | None:
            wanted = budget * backbone.dense_macs
            if wanted < costs[0]:
                return None
            values = torch.zeros(len(seen))  # where sure rows and others take the same choice, any will do
            values[exits.columns] = fit_thresholds(whole, costs, min(wanted, float(costs[-1])), rising)
            return policy(values)

        return by_shares
    return partial(_by_quantile, backbone, split.head(FITTED), seen, rising, policy)


def _scores_along(route: Tensor, backbone: Backbone, split: Split, column: int) -> list[Tensor]:
    """Return for each point the scores [visits] of all rows, in order, that stand there on `route` [columns]."""
    seen: list[list[Tensor]] = [[] for _ in backbone.points]
    for inputs in split.inputs.split(256):
        routes = route.to(inputs.device).expand(len(inputs), -1)

        def go_on(state: State, routes: Tensor = routes) -> Tensor:
            seen[state.point].append(backbone.observe(state)[state.rows.argsort(), column].float().cpu())
            return state.along(routes)

        backbone.run(inputs, go_on)
    return [torch.cat(parts) if parts else torch.zeros(1) for parts in seen]


class Leaving(NamedTuple):
    """The ways to leave a network with exits in a row: at each of K - 1 exits in turn, and last the whole route.

    Attributes:
        columns: the columns of the exits, which are their points, too: K - 1.
        routes: [K, columns] int64.
        macs: [K] int64, what each way costs, rising.
    """

    columns: list[int]
    routes: Tensor
    macs: Tensor


@torch.inference_mode()
def leaving(backbone: Backbone, inputs: Inputs, whole: Tensor) -> Leaving | None:
    """Return the ways to leave the route `whole` [columns] by the cheapest choice where this is another one.

    If a point is met more than once, or such a choice does not end the walk, or is not met, there is None. `inputs`
    [n, ...] may be any of the network's.
    """
    cheapest = cheapest_choices(backbone)
    exits = (whole != cheapest).nonzero().squeeze(1)
    routes = whole.repeat(len(exits) + 1, 1)
    routes[torch.arange(len(exits)), exits] = cheapest[exits]
    walk = backbone.run_route(repeat_first(inputs, len(routes)), routes)
    ran = walk.route.cpu() >= 0
    ended = ran[:-1] == ran[-1] & (torch.arange(backbone.columns) <= exits.unsqueeze(1))
    once = backbone.columns == len(backbone.points)
    return Leaving(exits.tolist(), routes, walk.macs.cpu()) if once and ended.all() and ran[-1, exits].all() else None


@torch.inference_mode()
def _by_quantile(
    backbone: Backbone,
    split: Split,
    seen: list[Tensor],
    rising: bool,
    policy: Callable[[Tensor], ThresholdPolicy],
    budget: float,
) -> ThresholdPolicy | None:
    """Find the thresholds at which a walk costs `budget` on average; all are the same quantile of their scores.

    A budget above the dearest walk gets this walk.
    """

    def at(share: float) -> ThresholdPolicy:
        if share in (0.0, 1.0):  # no row is sure, or every row
            end = torch.inf if (share == 0.0) == rising else -torch.inf
            return policy(torch.full((len(seen),), end))
        rank = 1 - share if rising else share
        return policy(torch.stack([values.quantile(rank) for values in seen]))

    def cost(share: float) -> float:
        return score(RoutedModel(backbone, at(share)), split).macs_fraction

    if budget < cost(1.0):
        return None
    if budget >= cost(0.0):
        return at(0.0)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    return at(high)  # within the budget
