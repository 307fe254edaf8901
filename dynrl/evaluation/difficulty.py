"""Difficulty tells whether compute goes where it is needed: what a split says makes its inputs hard, beside MACs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynrl.data import Split

BINS = 8


def bins(numbers: Tensor) -> list[Tensor]:
    """Part the rows of `numbers` [n] from low to high: by value where there are few, else by quantile.

    Equal numbers are always in one bin, so that there may be fewer than `BINS`, and bins of different sizes.

    Returns:
        rows, bool [n] each; none is empty.
    """
    if len(numbers.unique()) <= BINS:
        place = numbers.unique(return_inverse=True)[1]
    else:
        shares, numbers = torch.arange(1, BINS).double() / BINS, numbers.double()
        place = torch.bucketize(numbers, torch.quantile(numbers, shares, interpolation="lower").unique())
    return [place == i for i in place.unique().tolist()]


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's rank correlation of two columns of numbers [n]; None where one of them is constant.

    Equal numbers share the mean of their ranks (Spearman 1904, American Journal of Psychology 15).
    """
    first, second = (_ranks(x) for x in (a, b))
    first, second = first - first.mean(), second - second.mean()
    scale = (first.square().sum() * second.square().sum()).sqrt()
    return float(first @ second / scale) if scale > 0 else None


def _ranks(numbers: Tensor) -> Tensor:
    _, place, counts = numbers.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place].double()


def correlations(split: Split, macs: Tensor) -> dict[str, float | None]:
    """Return, for each of the split's difficulties, Spearman's correlation with what was spent [n]."""
    return {name: spearman(macs, numbers) for name, numbers in split.difficulty.items()}


def by_difficulty(split: Split, metric: Tensor, macs: Tensor) -> dict[str, dict[str, Any]]:
    """Average the metric [n] and the share of MACs [n] over bins of each of the split's difficulties.

    Returns:
        {name: {"bins": [{"from", "to", "inputs", the metric, "macs_fraction"}], "spearman"}}; empty where a split says
        nothing of difficulty.
    """
    found, targets = {}, split.targets.cpu()
    for name, numbers in split.difficulty.items():
        rows = [
            {
                "from": float(numbers[mine].min()), "to": float(numbers[mine].max()), "inputs": int(mine.sum()),
                split.task.metric: split.task.mean(metric[mine], targets[mine]),
                "macs_fraction": float(macs[mine].mean()),
            }
            for mine in bins(numbers)
        ]  # fmt: skip
        found[name] = {"bins": rows, "spearman": spearman(macs, numbers)}
    return found


def bin_name(row: dict[str, Any]) -> str:
    """Name a bin by its ends."""
    return f"{row['from']:.3g}" if row["from"] == row["to"] else f"{row['from']:.3g} to {row['to']:.3g}"
