"""Sequences [n, steps, numbers a step]: the adding task, parity of a drawn length, and images read bit by bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dynrl.data.base import Augmentation, Dataset, Split, standardised
from dynrl.data.images import digit_images, fashion_images
from dynrl.tasks import Regression

STEPS = 50  # of the adding task


def adding() -> Dataset:
    """Add the two marked ones of 50 numbers (Hochreiter & Schmidhuber 1997, section 5.4); 40,000 / 2,000 / 5,000.

    Each step is a number, even in -0.5 to 0.5, and its mark, 0 or 1. As in Skip RNN (Campos et al. 2018, section 4.1)
    one mark is in the first tenth, the other in the last half: at least 40 % of the steps say nothing. Answering 0
    costs a squared error of 1/6; a network is said to solve the task at a hundredth of that.
    """
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        numbers, marks = rng.uniform(-0.5, 0.5, (count, STEPS)), np.zeros((count, STEPS))
        for first, end in ((0, STEPS // 10), (STEPS // 2, STEPS)):
            marks[np.arange(count), rng.integers(first, end, count)] = 1
        sums = (numbers * marks).sum(1, keepdims=True)
        return torch.from_numpy(np.stack([numbers, marks], 2)).float(), torch.from_numpy(sums).float()

    test, validation, train = (draw(count) for count in (5_000, 2_000, 40_000))
    task = Regression.of(train[1])
    return Dataset("adding", 1, Split(*train, task), Split(*validation, task), Split(*test, task), Augmentation())


MOST_BITS = 24  # of the parity task


def prefix() -> Dataset:
    """Is the number of ones among the first bits odd? How many bits count is drawn; 20,000 / 2,000 / 5,000.

    Half of the rows have 2 to 6 bits, the other half 2 to 24. A step is a bit, +1 or -1, and whether it counts; behind
    the last one that counts all is zero. After prefix sums (Schwarzschild et al. 2021, NeurIPS) and the parity task of
    adaptive computation time (Graves 2016, section 3.1).
    """

    def draw(count: int, seed: int) -> Split:
        rng = np.random.default_rng(seed)
        lengths = np.where(rng.random(count) < 0.5, rng.integers(2, 7, count), rng.integers(2, MOST_BITS + 1, count))
        counts = np.arange(MOST_BITS) < lengths[:, None]
        ones = (rng.random((count, MOST_BITS)) < 0.5) & counts
        steps = np.stack([np.where(counts, np.where(ones, 1.0, -1.0), 0.0), counts], 2)
        return Split(
            torch.from_numpy(steps).float(), torch.from_numpy(ones.sum(1) % 2),
            difficulty={"length": torch.from_numpy(lengths).float()},
        )  # fmt: skip

    train, validation, test = (draw(count, seed) for seed, count in enumerate((20_000, 2_000, 5_000)))
    return Dataset(
        "prefix", 2, train, validation, test, Augmentation(), anew=lambda seed: draw(len(train), 1000 + seed)
    )


def sequential_digits() -> Dataset:
    """The digits' 8x8 pixels one by one: 64 steps of a grey value, its row and its column (one-hot); split as the
    digits are.

    A network that has skipped pixels cannot count where it is. Measured (GRU of 64 units, 200 epochs under random
    routes, validation): half of the pixels, drawn at random, are enough for 60 % of the images without their places
    and for 84 % with them, all pixels for 97 % of them.
    """
    row, column = torch.arange(64) // 8, torch.arange(64) % 8
    place = torch.cat([torch.eye(8)[row], torch.eye(8)[column]], 1)
    parts = [
        (torch.cat([images.view(-1, 64, 1), place.expand(len(images), -1, -1)], 2), labels)
        for images, labels in digit_images()
    ]
    return standardised("sequential-digits", 10, Augmentation(), parts)


def sequential_fashion_mnist() -> Dataset:
    """The clothes row by row, from the top: 28 steps of 28 numbers, split as fashion-mnist is."""
    parts = [(images.squeeze(1), labels) for images, labels in fashion_images()]
    return standardised("sequential-fashion-mnist", 10, Augmentation(), parts)
