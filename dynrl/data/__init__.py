"""Data sets with fixed train, validation and test splits.

Thresholds, budgets and early stopping see validation only; test is for the report.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from dynrl.data.base import Augmentation, Dataset, Split
from dynrl.data.images import cluttered_fashion_mnist, digits, fashion_mnist
from dynrl.data.sequences import adding, sequential_digits, sequential_fashion_mnist

__all__ = ["DATASETS", "Augmentation", "Dataset", "Split", "check_dataset", "load_dataset"]

DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cluttered-fashion-mnist": cluttered_fashion_mnist,
    "adding": adding,
    "sequential-digits": sequential_digits,
    "sequential-fashion-mnist": sequential_fashion_mnist,
}


def check_dataset(name: str) -> str:
    """`name`, or a ValueError that lists the data sets there are."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; expected one of {sorted(DATASETS)}")
    return name


@lru_cache(maxsize=2)
def load_dataset(name: str) -> Dataset:
    """The data set of that name, loaded once a process. Its tensors are shared: do not write into them."""
    return DATASETS[check_dataset(name)]()
