"""MSDNet's two protocols: a batch classified within a budget, and the answer of each exit at any time.

Source: Multi-Scale Dense Networks for Resource Efficient Image Classification (Huang et al. 2018, ICLR, section 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dynrl.evaluation.contenders import Contender, Ground, Learned, Reached, Ruled
from dynrl.evaluation.rules import rules_of
from dynrl.evaluation.scores import score_routes
from dynrl.evaluation.thresholds import Leaving, leaving, shares_of
from dynrl.progress import progress, talking
from dynrl.tasks import TASKS, Task

POINTS = 39  # of the curve: q = 1/20, 2/20, ... 39/20


def check_leaving(ground: Ground) -> Leaving:
    """Return the ways to leave the ground's network; refuse, with a ValueError, one without exits in a row."""
    found = leaving(ground.network, ground.validation.inputs, ground.network.dense_actions(1)[0].cpu())
    if found is None:
        raise ValueError(
            f"expected a network with exits in a row for the protocol 'budgeted', got {type(ground.network).__name__}, "
            f"which poses {ground.network.decision!r}; leave --protocol out"
        )
    return found


def budgets(exits: Leaving, dense_macs: int) -> list[float]:
    """Return the budgets of the curve, as rising shares of the dense MACs.

    Budget p of `POINTS` is what is spent if exit k is taken by a share of the inputs in proportion to q^k, q = p / 20.
    """
    q = torch.arange(1, POINTS + 1, dtype=torch.float64).unsqueeze(1) / 20
    shares = q ** torch.arange(len(exits.macs))
    return ((shares / shares.sum(1, keepdim=True)) @ exits.macs.double() / dense_macs).tolist()


def budgeted(ground: Ground, learned: Sequence[Learned], exits: Leaving, show: bool = False) -> dict[str, Any]:
    """Measure both curves on the test split; every point is walked.

    Thresholds and prices are those that meet a budget on validation data. Beside the best thresholds stand
    MSDNet's own, by which fixed shares of the inputs leave at the exits (*shares ...*).

    Args:
        ground: the network and the data.
        learned: the policies that stand beside the thresholds.
        exits: the ways to leave the network.
        show: whether to show progress.

    Returns:
        {"points": a row for each contender and budget, "anytime": a row for each exit, where all inputs leave there}.
    """
    fits = {**rules_of(ground.network), **shares_of(ground.network)}
    rules = [Ruled(name, fit, [ground.network], ground) for name, fit in fits.items()]
    everybody: list[Contender] = [*learned, *rules]
    asked = budgets(exits, ground.network.dense_macs)
    total = sum(contender.passes(asked) for contender in everybody) + len(exits.macs)
    points, anytime = [], []
    with talking(show), progress(total=total, desc="budgeted", unit="pass") as bar:
        for contender in everybody:
            contender.prepare(bar.update)
            for budget in asked:
                reached = contender.reach(budget) if contender.spends(budget) else None
                if reached is not None:
                    points.append(_row(contender, budget, reached, ground.task))
                bar.update()
        for route, macs in zip(exits.routes, exits.macs.tolist(), strict=True):
            walked = score_routes(ground.network, route.expand(len(ground.test), -1), ground.test)
            share = macs / ground.network.dense_macs
            metric = {ground.task.metric: float(walked.metric.mean()), f"{ground.task.metric}_std": 0.0}
            anytime.append({"policy": "anytime", "budget": share, "runs": 1, **metric, "macs_fraction": share})
            bar.update()
    return {"points": points, "anytime": anytime}


def _row(contender: Contender, budget: float, reached: Sequence[Reached], task: Task) -> dict[str, Any]:
    """Return the means over a contender's seeds."""
    metrics = torch.stack([of.metric.double().mean() for of in reached])
    return {
        "policy": contender.name, "kind": contender.kind and contender.kind.to_dict(), "budget": budget,
        "runs": len(reached), task.metric: float(metrics.mean()),
        f"{task.metric}_std": float(metrics.std()) if len(metrics) > 1 else 0.0,
        "macs_fraction": float(torch.stack([of.macs.double().mean() for of in reached]).mean()),
    }  # fmt: skip


def leads(report: dict[str, Any]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Yield for each learned policy its lead over the best threshold all along the curve: (MACs, difference).

    The difference is positive where the policy is better. At the MACs that the policy spends, each rule is read off its
    own curve, between its two nearest points.
    """
    metric, task = report["metric"], TASKS[report["metric"]]
    fronts: dict[str, list[tuple[float, float]]] = {}
    for row in report["budgeted"]["points"]:
        fronts.setdefault(row["policy"], []).append((row["macs_fraction"], row[metric]))
    rules = {name: np.array(sorted(front)).T for name, front in fronts.items() if name not in report["seeds"]}
    sign, best = (1, max) if task.rises else (-1, min)
    for name in report["seeds"]:
        found = []
        for macs, reached in fronts.get(name, []):
            theirs = [float(np.interp(macs, *front)) for front in rules.values() if front[0, 0] <= macs <= front[0, -1]]
            if theirs:
                found.append((macs, sign * (reached - best(theirs))))
        yield name, found


def budgeted_text(report: dict[str, Any]) -> str:
    """Return both curves as a table to print, and how far each policy is ahead of the best threshold."""
    metric, show = report["metric"], TASKS[report["metric"]].show
    rows = report["budgeted"]["points"]
    names = list(dict.fromkeys(row["policy"] for row in rows))
    wide = {name: max(len(name), 15) for name in names}
    lines = [
        f"MSDNet's budgeted batch: {TASKS[metric].heading} at the MACs spent, thresholds fitted on validation data",
        "budget  " + "  ".join(f"{name:>{wide[name]}}" for name in names),
    ]
    for budget in sorted({row["budget"] for row in rows}):
        mine = {row["policy"]: row for row in rows if row["budget"] == budget}
        told = {name: f"{show(row[metric])} at {row['macs_fraction']:.3f}" for name, row in mine.items()}
        lines.append(f"{budget:6.3f}  " + "  ".join(f"{told.get(name, ''):>{wide[name]}}" for name in names))
    anytime = report["budgeted"]["anytime"]
    told_all = ", ".join(f"{show(row[metric])} at {row['macs_fraction']:.3f}" for row in anytime)
    lines.append(f"anytime, all inputs at one exit: {told_all}")
    for name, found in leads(report):
        if found:
            macs, least = min(found, key=lambda row: row[1])
            mean = sum(lead for _, lead in found) / len(found)
            lines.append(
                f"{name} less the best threshold at equal MACs: {show(mean)} in the mean, {show(least)} at {macs:.3f}"
            )
    return "\n".join(lines)
