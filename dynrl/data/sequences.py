"""These data sets have sequences [n, steps, numbers a step]: adding, parity, clips, and images read piece by piece."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dynrl.data.base import Augmentation, Dataset, Split, drawn, standardised
from dynrl.data.images import digit_images, fashion_images
from dynrl.tasks import Regression

STEPS = 50  # the length of sequences of the adding task


def adding() -> Dataset:
    """The adding task asks for the sum of the two marked numbers among 50; 40,000 / 2,000 / 5,000 rows.

    The task is that of Hochreiter & Schmidhuber (1997, section 5.4). Each step is a number, uniform in -0.5 to 0.5, and
    its mark, 0 or 1. As in Skip RNN (Campos et al. 2018, section 4.1), one mark is in the first tenth and the other in
    the last half, so at least 40 % of the steps carry no information. The answer 0 has a squared error of 1/6; a
    network is said to solve the task at a hundredth of that.
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


MOST_BITS = 24  # the length of sequences of the parity task


def prefix() -> Dataset:
    """The parity task asks whether the number of ones among the first bits is odd; 20,000 / 2,000 / 5,000 rows.

    The number of bits that count is random: from 2 to 6 in half of the rows, from 2 to 24 in the other half. A step is
    a bit, +1 or -1, and a 1 that says that it counts; after the last bit that counts, all numbers are zero. The task
    follows prefix sums (Schwarzschild et al. 2021, NeurIPS) and the parity task of adaptive computation time (Graves
    2016, section 3.1).
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

    return drawn("prefix", 2, (20_000, 2_000, 5_000), [draw] * 3)


FRAMES, MARKS, SIGNS, SIGN = 16, 4, 5, 15  # a clip's frames, those marked at most, the signs and a sign's numbers


def clips() -> Dataset:
    """In clips of 16 frames, the answer is the highest sign in the 1 to 4 marked ones; 20,000 / 2,000 / 5,000 rows.

    A frame has 16 numbers: the mark, near 1 in marked frames and near 0 in others, and then one of five signs, which
    are fixed vectors, in noise. Signs are drawn alike in all frames. So who sees the marks need only look at the marked
    frames, and may stop at the highest sign of all: 2.05 looks on average do.
    """
    signs = np.random.default_rng(7).normal(size=(SIGNS, SIGN))

    def draw(count: int, seed: int) -> Split:
        rng = np.random.default_rng(seed)
        marks = rng.integers(1, MARKS + 1, count)
        marked = rng.permuted(np.tile(np.arange(FRAMES), (count, 1)), axis=1) < marks[:, None]
        shown = rng.integers(SIGNS, size=(count, FRAMES))
        seen = np.concatenate([marked[:, :, None], signs[shown]], 2)
        spread = np.array([0.1] + [0.5] * SIGN)
        frames = seen + spread * rng.normal(size=seen.shape)
        return Split(
            torch.from_numpy(frames).float(), torch.from_numpy(np.where(marked, shown, 0).max(1)),
            difficulty={"marked frames": torch.from_numpy(marks).float()},
        )  # fmt: skip

    return drawn("clips", SIGNS, (20_000, 2_000, 5_000), [draw] * 3)


def sequential_digits() -> Dataset:
    """The 8x8 pixels of the digits one by one, in 64 steps; 1,257 / 180 / 360 rows.

    Each of the 64 steps is a grey value, its row and its column (one-hot). The place is given because a network that
    has skipped pixels cannot count where it is, and would recognise far fewer images from half of their pixels.
    """
    row, column = torch.arange(64) // 8, torch.arange(64) % 8
    place = torch.cat([torch.eye(8)[row], torch.eye(8)[column]], 1)
    parts = [
        (torch.cat([images.view(-1, 64, 1), place.expand(len(images), -1, -1)], 2), labels)
        for images, labels in digit_images()
    ]
    return standardised("sequential-digits", 10, Augmentation(), parts)


def sequential_fashion_mnist() -> Dataset:
    """The clothes row by row from the top, in 28 steps of 28 numbers; 55,000 / 5,000 / 10,000 rows."""
    parts = [(images.squeeze(1), labels) for images, labels in fashion_images()]
    return standardised("sequential-fashion-mnist", 10, Augmentation(), parts)
