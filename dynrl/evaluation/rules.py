"""Rules of thumb that a decision is known for stand beside the learned policies, fitted on validation data.

`RULES` holds them by name, and `Backbone.rule` names the one that a family is known for. A plugin adds one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from dynrl.backbones import Backbone, State
from dynrl.data import Split
from dynrl.deploy import RoutedModel
from dynrl.evaluation.routes import cheapest_choices
from dynrl.evaluation.scores import score
from dynrl.policies import Policy, ThresholdPolicy
from dynrl.policies.threshold import fit_thresholds

# From a budget (a share of the dense MACs) to the policy that meets it, or None where that is out of reach.
PolicyFor = Callable[[float], Policy | None]
Fit = Callable[[Backbone, Split], PolicyFor]
FITTED = 1024  # rows of a split that a rule is fitted on where each try is a walk
HALVINGS = 12


def thresholds(backbone: Backbone) -> dict[str, Fit]:
    """Give a threshold rule for each score that the family gives by itself (`Backbone.scores`)."""
    return {f"threshold {name}": partial(fit_score, name=name) for name in backbone.scores}


# By name: a function from a backbone to the rules to fit, by the names that reports show.
RULES: dict[str, Callable[[Backbone], Mapping[str, Fit]]] = {"threshold": thresholds}


def rules_of(backbone: Backbone) -> Mapping[str, Fit]:
    """Give the rules that the backbone's family is known for; none where it names none."""
    if backbone.rule is None:
        return {}
    if backbone.rule not in RULES:
        raise ValueError(
            f"{type(backbone).__name__} asks for the rule {backbone.rule!r}; expected one of {sorted(RULES)}. "
            "Add yours to dynrl.evaluation.RULES"
        )
    return RULES[backbone.rule](backbone)


@torch.inference_mode()
def fit_score(backbone: Backbone, split: Split, name: str) -> PolicyFor:
    """Fit thresholds on a native score: rows that are sure take the cheapest choice, all others the full route's.

    Where the cheapest choice ends the walk at every point (an exit's stop), thresholds are those of `fit_thresholds`.
    Elsewhere (a loop's, say) every point's threshold is the same quantile of its scores, found by walking.
    """
    column, rising = backbone.scores[name]
    seen = _scores_on_full_route(backbone, split, column)
    full = backbone.dense_actions(1)[0].cpu()
    cheapest = cheapest_choices(backbone)
    left, costs = _leave_at_each(backbone, split, full, cheapest)

    def policy(values: Tensor) -> ThresholdPolicy:  # one a point
        return ThresholdPolicy(backbone, name, values[backbone.column_point])

    if left:
        whole = torch.stack(seen, 1)

        def by_shares(budget: float) -> ThresholdPolicy | None:
            wanted = budget * backbone.dense_macs
            if not costs[0] <= wanted <= costs[-1]:
                return None
            return policy(fit_thresholds(whole, costs, wanted, rising))

        return by_shares
    return partial(_by_quantile, backbone, split.head(FITTED), seen, rising, policy)


def _scores_on_full_route(backbone: Backbone, split: Split, column: int) -> list[Tensor]:
    """Return for each point the scores [visits] of all rows that stand there on the full route."""
    seen: list[list[Tensor]] = [[] for _ in backbone.points]
    for inputs in split.inputs.split(256):
        route = backbone.dense_actions(len(inputs), inputs.device)

        def go_on(state: State, route: Tensor = route) -> Tensor:
            seen[state.point].append(backbone.observe(state)[:, column].float().cpu())
            return state.along(route)

        backbone.run(inputs, go_on)
    return [torch.cat(parts) if parts else torch.zeros(1) for parts in seen]


def _leave_at_each(backbone: Backbone, split: Split, full: Tensor, cheapest: Tensor) -> tuple[bool, Tensor]:
    """Tell whether the cheapest choice ends the walk at every point, each met once, and what leaving there costs.

    Returns:
        the answer, and [points + 1] MACs of leaving at each point in turn and of the full route.
    """
    columns = torch.arange(backbone.columns)
    routes = full.repeat(len(columns) + 1, 1)
    routes[columns, columns] = cheapest
    inputs = split.inputs[:1].expand(len(routes), *split.inputs.shape[1:])
    walk = backbone.run_route(inputs, routes)
    ran = walk.route.cpu() >= 0
    ended = ran[:-1] == (columns <= columns.unsqueeze(1))
    once = len(columns) == len(backbone.points)
    return once and bool(ended.all()) and bool(ran[-1].all()), walk.macs.cpu()


@torch.inference_mode()
def _by_quantile(
    backbone: Backbone,
    split: Split,
    seen: list[Tensor],
    rising: bool,
    policy: Callable[[Tensor], ThresholdPolicy],
    budget: float,
) -> ThresholdPolicy | None:
    """Find thresholds that let such a share of the rows be sure that a walk costs `budget` on average."""

    def at(share: float) -> ThresholdPolicy:
        if share in (0.0, 1.0):  # nobody is sure, or everybody
            end = torch.inf if (share == 0.0) == rising else -torch.inf
            return policy(torch.full((len(seen),), end))
        rank = 1 - share if rising else share
        return policy(torch.stack([values.quantile(rank) for values in seen]))

    def cost(share: float) -> float:
        return score(RoutedModel(backbone, at(share)), split).macs_fraction

    if not cost(1.0) <= budget <= cost(0.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    return at(high)  # within the budget
