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


VIEWS = 5  # upright, turned by one to three right angles, and mirrored


def digit_tasks() -> Dataset:
    """Handwritten digits in five views, which are tasks of their own, 16x16; 6,285 / 900 / 1,800 rows.

    Each task is to recognise digits as another camera shows them: upright, turned by one, two or three right angles, or
    mirrored. Each image is there in each view. The form is that of `many_tasks`: the image in the first channel, then a
    channel for each task.
    """
    made, tasks = [], []
    for seed, (digits, known) in enumerate(digit_images()):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(VIEWS * len(digits)))
        task = torch.arange(VIEWS).repeat_interleave(len(digits))[order]
        upright = F.interpolate(digits, size=16, mode="bilinear")
        views = [*(torch.rot90(upright, turns, (2, 3)) for turns in range(4)), upright.flip(3)]
        made.append(_told(torch.cat(views)[order], task, known.repeat(VIEWS)[order], VIEWS))
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
