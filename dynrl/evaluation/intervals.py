"""Whether one policy beats another: what each says of every input at equal compute, and how sure the difference is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from dynrl import evaluation as ev
from dynrl.backbones import Backbone
from dynrl.data import Split
from dynrl.deploy import RoutedModel
from dynrl.heuristics import Fit
from dynrl.policies import RandomPolicy, StaticPolicy
from dynrl.tasks import Task

BUDGETS = (0.3, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the dense MACs

# What is reached with a budget: the metric of each input [n], and the mean share of the dense MACs. None: nothing is so
# cheap. Where a budget is more than can be spent, what spends most.
Reach = Callable[[float], tuple[Tensor, float] | None]


@dataclass(frozen=True)
class Front:
    """What one contender reaches at each of `BUDGETS`.

    Attributes:
        metric: [seeds, budgets, n], of each input; NaN where no seed, or not every one, is so cheap.
        macs: [seeds, budgets], shares of the dense network's.
    """

    metric: Tensor
    macs: Tensor

    @classmethod
    def of(cls, seeds: Iterable[Reach], count: int, tick: Callable[[], Any] = lambda: None) -> Front:
        """Ask each seed for each budget; `count` inputs; `tick` is called after each."""
        nothing = (torch.full((count,), torch.nan), torch.nan)
        found = []
        for reach in seeds:
            row = []
            for budget in BUDGETS:
                row.append(reach(budget) or nothing)
                tick()
            found.append(row)
        metric = torch.stack([torch.stack([m for m, _ in row]) for row in found])
        macs = torch.tensor([[spent for _, spent in row] for row in found])
        missing = macs.isnan().any(0)
        metric[:, missing], macs[:, missing] = torch.nan, torch.nan
        return cls(metric, macs)

    @property
    def reached(self) -> Tensor:
        """[budgets] bool."""
        return ~self.macs[0].isnan()


def model_reach(model: RoutedModel, split: Split) -> Reach:
    """A calibrated policy's."""
    fractions, known = [macs for _, macs in model.curve], {}

    def reach(budget: float) -> tuple[Tensor, float] | None:
        if budget < min(fractions):
            return None
        model.set_budget(min(budget, max(fractions)))
        if model.price not in known:
            metric, route = ev.score_rows(model, split)
            known[model.price] = metric, float(route.macs_fraction.mean())
        return known[model.price]

    return reach


def random_reach(backbone: Backbone, split: Split, validation: Split, seed: int) -> Reach:
    """Random routes of as many MACs."""

    def reach(budget: float) -> tuple[Tensor, float] | None:
        rate = ev.random_rate(backbone, validation.inputs[:256], budget)
        return None if rate is None else _along(backbone, RandomPolicy(backbone.column_costs, rate, seed), split)

    return reach


def routes_reach(backbone: Backbone, split: Split, found: Sequence[tuple[tuple[int, ...], float, float]]) -> Reach:
    """One route for all inputs: of those `found` (route, MACs fraction, metric on validation data) that a budget
    allows, the best.
    """

    def reach(budget: float) -> tuple[Tensor, float] | None:
        best = ev.affordable(found, budget, split.task)
        return None if best is None else _along(backbone, StaticPolicy(best), split)

    return reach


def networks_reach(networks: Sequence[Backbone], dense_macs: int, split: Split, validation: Split) -> Reach:
    """Plain networks, each trained alone: of those that a budget allows, the best on validation data."""

    def rows(network: Backbone, of: Split) -> Tensor:
        return ev.score_routes(network, network.dense_actions(len(of)), of).metric

    known = [(n, n.dense_macs / dense_macs, float(rows(n, validation).mean())) for n in networks]

    def reach(budget: float) -> tuple[Tensor, float] | None:
        best = ev.affordable(known, budget, split.task)
        return None if best is None else (rows(best, split), best.dense_macs / dense_macs)

    return reach


def rule_reach(fit: Fit, backbone: Backbone, split: Split, validation: Split) -> Reach:
    """A rule fitted on validation data (see `dynrl.heuristics`)."""
    policy_for = fit(backbone, validation)

    def reach(budget: float) -> tuple[Tensor, float] | None:
        rule = policy_for(budget)
        if rule is None:
            return None
        metric, route = ev.score_rows(RoutedModel(backbone, rule), split)
        return metric, float(route.macs_fraction.mean())

    return reach


def fixed_reach(metric: Tensor, macs: float) -> Reach:
    """The same at every budget: what is shown beside contenders and is none itself."""
    return lambda budget: (metric, macs)


def _along(backbone: Backbone, policy: RandomPolicy | StaticPolicy, split: Split) -> tuple[Tensor, float]:
    scored = ev.score_routes(backbone, policy.route(split.inputs), split)
    return scored.metric, float(scored.macs.mean())


# How sure ---------------------------------------------------------------------------------------------------


def area(front: Front, reached: Tensor) -> Tensor:
    """[seeds, n]: the metric's mean over the budgets `reached` [budgets] bool, by the trapezoidal rule."""
    at = torch.tensor(BUDGETS)[reached]
    if len(at) == 1:
        return front.metric[:, reached].squeeze(1)
    return torch.trapezoid(front.metric[:, reached].transpose(1, 2), at) / (at[-1] - at[0])


def paired(ours: Tensor, theirs: Tensor, by_seed: bool = False) -> tuple[float, float, float]:
    """Mean of `ours` less mean of `theirs`, with the ends of its 95 % interval.

    Student's t, its variance the sum of those of a mean over inputs (of the difference on each, so that what both sides
    have in common cancels) and of a mean over the seeds of each side, its degrees of freedom by Satterthwaite (1946,
    Biometrics Bulletin 2). A bootstrap over three seeds covers the truth in 80 % of cases, not 95 (measured). Of one
    seed nothing is known of the spread over seeds: the interval is that over inputs alone.

    Args:
        ours: [seeds, n].
        theirs: [other seeds, n], the same inputs.
        by_seed: whether seed i is the same network on both sides: what its networks have in common cancels, too.
    """
    ours, theirs = ours.double(), theirs.double()
    sides = [ours - theirs] if by_seed else [ours, theirs]
    parts = [(ours.mean(0) - theirs.mean(0), ours.shape[1])]
    parts += [(side.mean(1), len(side)) for side in sides if len(side) > 1]
    variances = [(float(values.var()) / count, count - 1) for values, count in parts]
    total = sum(variance for variance, _ in variances)
    difference = float(ours.mean() - theirs.mean())
    if total == 0:
        return difference, difference, difference
    freedom = total**2 / sum(variance**2 / known for variance, known in variances)
    reach = float(student.ppf(0.975, freedom)) * total**0.5
    return difference, difference - reach, difference + reach


def at_equal_macs(
    models: Sequence[RoutedModel], one_price: Sequence[RoutedModel], split: Split, task: Task
) -> dict[str, float] | None:
    """How much better policies for all prices (`models`) are than some that were trained at one price only
    (`one_price`, seeds of it), told to spend what those do on average; what both spend and reach, too. None where one
    of them cannot spend that.
    """
    alone = [ev.score_rows(model, split) for model in one_price]
    theirs = torch.stack([metric for metric, _ in alone])
    budget = sum(float(route.macs_fraction.mean()) for _, route in alone) / len(alone)
    if any(budget > max(macs for _, macs in model.curve) for model in models):
        return None
    reached = [found for model in models if (found := model_reach(model, split)(budget))]
    if len(reached) < len(models):
        return None
    ours = torch.stack([metric for metric, _ in reached])
    gain, low, high = _better(ours, theirs, task)
    return {
        "difference": gain, "low": low, "high": high,
        "macs_fraction": sum(macs for _, macs in reached) / len(reached), "one_price_macs_fraction": budget,
        "metric": float(ours.mean()), "one_price_metric": float(theirs.mean()),
    }  # fmt: skip


def _better(ours: Tensor, theirs: Tensor, task: Task, by_seed: bool = False) -> tuple[float, float, float]:
    """`paired`, of [seeds, n] each of the task's metric, so that more is better."""
    sign = 1 if task.error(0.0) > task.error(1.0) else -1
    return paired(sign * ours, sign * theirs, by_seed)


def differences(ours: Front, theirs: Front, task: Task, by_seed: bool = False) -> dict[str, dict[str, float]]:
    """How much better `ours` is, in the metric's units (more is better, whichever it is): by area over the budgets that
    both reach (`area`), and at each of them (`0.5`). `by_seed`: see `paired`.
    """
    both = ours.reached & theirs.reached
    sides: dict[str, tuple[Tensor, Tensor]] = {}
    if both.any():
        sides["area"] = (area(ours, both), area(theirs, both))
    for i in both.nonzero().flatten().tolist():
        sides[f"{BUDGETS[i]:.3g}"] = (ours.metric[:, i], theirs.metric[:, i])
    return {
        name: dict(zip(("difference", "low", "high"), _better(a, b, task, by_seed), strict=True))
        for name, (a, b) in sides.items()
    }
