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
        planes = F.one_hot(task, TASKS).float()[:, :, None, None].expand(-1, -1, 28, 28)
        made.append((torch.cat([images, planes], 1), labels))
        tasks.append(task)
    data = standardised("many-tasks", 10, Augmentation(shift=1), made)
    train, validation, test = (
        replace(split, difficulty={"task": task.float()})
        for split, task in zip((data.train, data.validation, data.test), tasks, strict=True)
    )
    return replace(data, train=train, validation=validation, test=test)


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
    turned = torch.stack(
        [torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(images[rows], turns, strict=True)]
    )
    return turned, turns
