"""Defaults of `dynrl train`: for each decision and data set, a backbone, how it is pretrained, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dynrl.backbones import FAMILIES, Backbone
from dynrl.data import Dataset, check_dataset
from dynrl.pretraining import Recipe


@dataclass(frozen=True)
class Defaults:
    """One row of the table.

    Attributes:
        family: of the backbone.
        backbone: keyword arguments of the family, beside `input_shape` and `classes`.
        pretraining: how the backbone is trained.
        steps: decisions a policy is trained for.
    """

    family: str
    backbone: dict[str, Any]
    pretraining: Recipe
    steps: int

    def build(self, dataset: Dataset, seed: int) -> Backbone:
        """A fresh backbone for `dataset`, its weights drawn from `seed`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return FAMILIES[self.family](input_shape=dataset.input_shape, classes=dataset.classes, **self.backbone)


DEFAULTS: dict[tuple[str, str], Defaults] = {
    ("skip", "digits"): Defaults(
        family="gated_resnet",
        backbone={"layers": (3, 4, 4), "widths": (16, 32, 64)},
        pretraining=Recipe(epochs=24, batch_size=100),
        steps=300_000,
    ),
    ("skip", "fashion-mnist"): Defaults(
        family="gated_resnet",
        backbone={"layers": (3, 4, 4), "widths": (32, 64, 128), "stem_stride": 2},
        pretraining=Recipe(epochs=16, batch_size=128, least_rate=0.35, full_share=0.25),
        steps=1_000_000,
    ),
    ("exit", "digits"): Defaults(
        family="exit_resnet",
        backbone={"layers": (3, 4, 4), "widths": (16, 32, 64), "exits": (0, 2, 4, 6, 8)},
        pretraining=Recipe(epochs=16, batch_size=100),
        steps=200_000,
    ),
    ("exit", "fashion-mnist"): Defaults(
        family="exit_resnet",
        backbone={"layers": (3, 4, 4), "widths": (32, 64, 128), "stem_stride": 2, "exits": (1, 3, 5, 7, 9)},
        pretraining=Recipe(epochs=16, batch_size=128),
        steps=600_000,
    ),
}


def defaults(decision: str, data: str) -> Defaults:
    """The row for that decision and data set, or a ValueError that lists the data sets there are for it."""
    check_dataset(data)
    if (decision, data) not in DEFAULTS:
        known = sorted(d for name, d in DEFAULTS if name == decision)
        raise ValueError(f"no defaults for {decision!r} on {data!r}; there are for {known}")
    return DEFAULTS[decision, data]
