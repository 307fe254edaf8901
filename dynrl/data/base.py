"""What a data set is: three splits of inputs and targets, and how training inputs are changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.tasks import CLASSIFICATION, Task


@dataclass(frozen=True)
class Split:
    """Inputs and what is asked of them.

    Attributes:
        inputs: [n, ...] float32, ready for a network.
        targets: as the `task` has them: classes [n] int64, say.
        task: what is asked.
        difficulty: what makes an input hard, where that is known: names to numbers [n]. Only reports see it.
    """

    inputs: Tensor
    targets: Tensor
    task: Task = CLASSIFICATION
    difficulty: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def head(self, count: int) -> Split:
        """The first `count` rows (all splits are in random order)."""
        difficulty = {name: numbers[:count] for name, numbers in self.difficulty.items()}
        return Split(self.inputs[:count], self.targets[:count], self.task, difficulty)

    def to(self, device: torch.device, dtype: torch.dtype) -> Split:
        """The same elsewhere, inputs in another type; targets keep theirs."""
        return Split(self.inputs.to(device, dtype), self.targets.to(device), self.task, self.difficulty)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images that leave the class as it is; without any, inputs may be anything."""

    flip: bool = False  # left to right, half of the images
    shift: int = 0  # [pixels], each way
    rotate: float = 0.0  # [degrees], each way
    zoom: float = 0.0  # share of the size, each way

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A changed copy of `images` [n, channels, height, width]; what is not to be changed comes back as it is."""
        if self == Augmentation():
            return images
        count, size = len(images), images.shape[-1]

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator) * 2 - 1

        angle, scale = uniform() * math.radians(self.rotate), 1 + uniform() * self.zoom
        mirror = torch.where(uniform() < 0, -1.0, 1.0) if self.flip else torch.ones(count)
        # A whole number of pixels: a fraction would blur every image that is only shifted.
        dx, dy = ((uniform() * (self.shift + 0.5)).round().clamp(-self.shift, self.shift) * 2 / size for _ in "xy")
        cos, sin = scale * angle.cos(), scale * angle.sin()
        matrix = torch.stack([cos * mirror, -sin, dx, sin * mirror, cos, dy], 1).view(count, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits of one task.

    Attributes:
        classes: outputs that a network for it has; 1 for one number.
        augmentation: of training inputs.
        mean, deviation: the inputs are raw ones (images in 0 to 1) less `mean`, over `deviation`.
        anew: another training split of the same kind and size, drawn by a seed; None where there is but one.
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    augmentation: Augmentation
    mean: float = 0.0
    deviation: float = 1.0
    anew: Callable[[int], Split] | None = None

    @property
    def task(self) -> Task:
        """What is asked of the inputs."""
        return self.train.task

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])

    def in_epoch(self, seed: int, epoch: int) -> Dataset:
        """The same with the training inputs of that epoch: drawn anew where they can be, else its own."""
        return self if self.anew is None else replace(self, train=self.anew(1_000_003 * seed + epoch))

    def split(self, name: str) -> Split:
        """The split of that name."""
        if name not in ("train", "validation", "test"):
            raise ValueError(f"unknown split {name!r}; expected 'train', 'validation' or 'test'")
        return getattr(self, name)


# Inputs [n, ...] in 0 to 1 and labels [n], of the training, validation and test parts, in random order.
Parts = list[tuple[Tensor, Tensor]]


def standardised(name: str, classes: int, augmentation: Augmentation, parts: Parts) -> Dataset:
    """The data set of `parts`, by the training inputs' mean and deviation."""
    mean, deviation = float(parts[0][0].mean()), float(parts[0][0].std())
    train, validation, test = (Split(scaled(inputs, mean, deviation), labels.long()) for inputs, labels in parts)
    return Dataset(name, classes, train, validation, test, augmentation, mean, deviation)


def scaled(inputs: Tensor, mean: float, deviation: float) -> Tensor:
    """`inputs` less `mean`, over `deviation`."""
    return (inputs - mean).div_(deviation)
