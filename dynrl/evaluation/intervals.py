"""Intervals tell whether one contender beats another, input by input, where both spend the same compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynrl.evaluation.contenders import Contender
from dynrl.tasks import Task


@dataclass(frozen=True)
class Front:
    """A front is what one contender reaches at each of several budgets.

    Attributes:
        budgets: shares of the dense MACs, rising.
        metric: [seeds, budgets, n], the metric of each input; NaN where a budget is out of reach.
        macs: [seeds, budgets], the mean MACs as shares of the dense network's.
    """

    budgets: tuple[float, ...]
    metric: Tensor
    macs: Tensor

    @classmethod
    def of(
        cls, contender: Contender, budgets: Sequence[float], count: int, tick: Callable[[], Any] = lambda: None
    ) -> Front:
        """Ask a contender for each budget, or once if the contender heeds none.

        `count` is the number of inputs. `tick` is called after each answer.
        """
        if not contender.asked:
            answers = [contender.reach(None)] * len(budgets)
            tick()
        else:
            answers = []
            for budget in budgets:
                answers.append(contender.reach(budget))
                tick()
        seeds = max(len(answer or [None]) for answer in answers)  # a contender that reaches nothing has one seed of NaN
        metric = torch.full((seeds, len(budgets), count), torch.nan)
        macs = torch.full((seeds, len(budgets)), torch.nan)
        for i, answer in enumerate(answers):
            for seed, reached in enumerate(answer or ()):
                metric[seed, i], macs[seed, i] = reached.metric, float(reached.macs.mean())
        return cls(tuple(budgets), metric, macs)

    @property
    def reached(self) -> Tensor:
        """Tell which budgets are within reach: [budgets] bool."""
        return ~self.macs[0].isnan()


def area(front: Front, reached: Tensor) -> Tensor:
    """Average the metric over the budgets `reached` [budgets] bool, by the trapezoidal rule: [seeds, n]."""
    at = torch.tensor(front.budgets)[reached]
    if len(at) == 1:
        return front.metric[:, reached].squeeze(1)
    return torch.trapezoid(front.metric[:, reached].transpose(1, 2), at) / (at[-1] - at[0])


def paired(ours: Tensor, theirs: Tensor, by_seed: bool = False) -> tuple[float, float, float]:
    """Return the mean of `ours` less the mean of `theirs`, with the ends of its 95 % interval.

    The interval is Student's t. Its variance is a sum: the variance of the mean over inputs, plus the variance of the
    mean over the seeds of each side. The first is taken of the difference on each input, so that what both sides have
    in common cancels. The degrees of freedom are Satterthwaite's (1946, Biometrics Bulletin 2). A bootstrap over three
    seeds would be too narrow. One seed says nothing about the spread over seeds: a side with one seed adds nothing to
    the variance, and the interval is too narrow by that much.

    Args:
        ours: [seeds, n], the metric of one side.
        theirs: [other seeds, n], the metric of the other side on the same inputs.
        by_seed: whether seed i is the same network on both sides; then what its two results have in common cancels,
            too.
    """
    from scipy.stats import t as student  # not at the top of the file: plugging a model needs torch alone

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


def better(ours: Tensor, theirs: Tensor, task: Task, by_seed: bool = False) -> tuple[float, float, float]:
    """Return `paired` of the task's metric [seeds, n] on each side, turned so that more is better."""
    sign = 1 if task.error(0.0) > task.error(1.0) else -1
    return paired(sign * ours, sign * theirs, by_seed)


def differences(ours: Front, theirs: Front, task: Task, by_seed: bool = False) -> dict[str, dict[str, float]]:
    """Measure how much better `ours` is than `theirs`, in the metric's units; positive is better.

    The result has one entry for the area over the budgets that both reach ("area", with the first one, "from", and the
    last one, "to") and one for each of these budgets ("0.5", for example). See `paired` for `by_seed`.
    """
    both = ours.reached & theirs.reached
    sides: dict[str, tuple[Tensor, Tensor]] = {}
    if both.any():
        sides["area"] = (area(ours, both), area(theirs, both))
    for i in both.nonzero().flatten().tolist():
        sides[f"{ours.budgets[i]:.3g}"] = (ours.metric[:, i], theirs.metric[:, i])
    found = {
        name: dict(zip(("difference", "low", "high"), better(a, b, task, by_seed), strict=True))
        for name, (a, b) in sides.items()
    }
    if "area" in found:
        shared = [budget for budget, reached in zip(ours.budgets, both.tolist(), strict=True) if reached]
        found["area"] |= {"from": shared[0], "to": shared[-1]}
    return found


def verdict(of: dict[str, float]) -> str:
    """Say in one word what an interval tells: "better", "worse" or "even"."""
    return "better" if of["low"] > 0 else "worse" if of["high"] < 0 else "even"
