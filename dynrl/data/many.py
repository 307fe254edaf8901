"""This data set holds many tasks; extra channels of each input say which task it belongs to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.data.base import Augmentation, Dataset, standardised
from dynrl.data.images import digit_images, fashion_images

# The pairs of classes of clothes that are told apart: shirts, tops, shoes, long clothes, the rest.
PAIRS = ((0, 6), (2, 4), (5, 7), (1, 3), (8, 9))
TASKS = len(PAIRS) + 2  # the other two ask for one of ten digits, and for the right angles that clothes are turned by


QUESTIONS = 5  # which digit, whether it is odd, whether more than four, how it is turned, whether it is mirrored


def digit_tasks() -> Dataset:
    """Five equally frequent tasks on handwritten digits, enlarged to 16x16; 8,000 / 1,000 / 2,000 rows.

    One task asks which digit an image shows, one whether it is odd, one whether it is more than four, one by which
    right angle it is turned, and one whether it is mirrored. The form is that of `many_tasks`: the image in the first
    channel, then a channel for each task.
    """
    made, tasks = [], []
    for seed, (digits, count) in enumerate(zip(digit_images(), (8_000, 1_000, 2_000), strict=True)):
        rng = np.random.default_rng(seed)
        task = torch.from_numpy(rng.integers(0, QUESTIONS, count))
        rows = torch.from_numpy(rng.integers(0, len(digits[0]), count))
        turns, mirrored = torch.from_numpy(rng.integers(0, 4, count)), torch.from_numpy(rng.integers(0, 2, count))
        images, known = F.interpolate(digits[0][rows], size=16, mode="bilinear"), digits[1][rows].long()
        images[task == 3] = _turned(images[task == 3], turns[task == 3])
        images[(task == 4) & (mirrored == 1)] = images[(task == 4) & (mirrored == 1)].flip(3)
        answers = torch.stack([known, known % 2, (known > 4).long(), turns, mirrored])
        made.append(_told(images, task, answers.gather(0, task.unsqueeze(0))[0], QUESTIONS))
        tasks.append(task)
    return _with_tasks(standardised("digit-tasks", 10, Augmentation(shift=1), made), tasks)


def many_tasks() -> Dataset:
    """Seven equally frequent tasks on images of 28x28; 20,000 / 2,000 / 5,000 rows.

    Five tasks tell two kinds of clothes apart, one tells ten digits apart, and one tells how clothes are turned. An
    input has the image in its first channel. Then follows a channel for each task, of which the one of the input's own
    task is 1. All tasks share ten classes, and tasks with fewer answers use the first ones. The data set follows those
    on which routing networks are tried (Rosenbaum et al. 2018, ICLR, section 4), whose tasks are pairs of classes, too.
    """
    counts, made, tasks = (20_000, 2_000, 5_000), [], []
    for seed, (clothes, digits, count) in enumerate(zip(fashion_images(), digit_images(), counts, strict=True)):
        rng = np.random.default_rng(seed)
        task = torch.from_numpy(rng.integers(0, TASKS, count))
        images, labels = torch.empty(count, 1, 28, 28), torch.empty(count, dtype=torch.int64)
        for k in range(TASKS):
            mine = (task == k).nonzero().flatten()
            images[mine], labels[mine] = _drawn(k, len(mine), clothes, digits, rng)
        made.append(_told(images, task, labels, TASKS))
        tasks.append(task)
    return _with_tasks(standardised("many-tasks", 10, Augmentation(shift=1), made), tasks)


def _told(images: Tensor, task: Tensor, labels: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
    """Return images with a channel for each task behind them, and their labels."""
    planes = F.one_hot(task, tasks).float()[:, :, None, None].expand(-1, -1, *images.shape[2:])
    return torch.cat([images, planes], 1), labels


def _with_tasks(data: Dataset, tasks: list[Tensor]) -> Dataset:
    """Return a data set whose splits say which task each input belongs to, for reports."""
    train, validation, test = (
        replace(split, difficulty={"task": task.float()})
        for split, task in zip((data.train, data.validation, data.test), tasks, strict=True)
    )
    return replace(data, train=train, validation=validation, test=test)


def _turned(images: Tensor, turns: Tensor) -> Tensor:
    """Turn each of `images` [n, 1, side, side] by `turns` [n] right angles."""
    pairs = zip(images, turns.tolist(), strict=True)
    return torch.stack([torch.rot90(image, turn, (1, 2)) for image, turn in pairs])


def _drawn(
    task: int, count: int, clothes: tuple[Tensor, Tensor], digits: tuple[Tensor, Tensor], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw `count` images [count, 1, 28, 28] of one task, and return them with their classes."""
    if task < len(PAIRS):
        first, second = PAIRS[task]
        images, labels = clothes
        ours = ((labels == first) | (labels == second)).nonzero().flatten()
        rows = ours[torch.from_numpy(rng.integers(0, len(ours), count))]
        return images[rows], (labels[rows] == second).long()
    if task == len(PAIRS):
        images, labels = digits
        rows = torch.from_numpy(rng.integers(0, len(images), count))
        return F.interpolate(images[rows], size=28, mode="bilinear"), labels[rows].long()
    images, turns = clothes[0], torch.from_numpy(rng.integers(0, 4, count))
    rows = torch.from_numpy(rng.integers(0, len(images), count))
    return _turned(images[rows], turns), turns
