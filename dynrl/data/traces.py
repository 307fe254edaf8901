"""In curve tracing, a network tells the colour at the other end of a marked curve, whose length is random.

The task follows Pathfinder (Linsley et al. 2018, NeurIPS) and the visual routine of boundary tracing (Ullman 1984,
Cognition), with six answers instead of two. The longer the curve, the more layers a network of small kernels needs.

With fewer curves than colours, training has a first thing to learn: which colours there are. With as many, every image
holds all of them, and on larger maps some networks stay at chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dynrl.data.base import Dataset, Split, drawn

COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32)
# The grey of a curve's pixels; the weight on going straight; the share of steps in which this weight counts.
GREY, HEADING, KEPT = 0.4, 2.0, 0.5


@dataclass(frozen=True)
class Scene:
    """A scene says what each image holds.

    Attributes:
        side: the image's width and height in pixels.
        strands: the number of curves in an image, each with an end of another colour.
        longest: the steps of the longest curve. Half of the curves draw their length from 2 to a quarter of this
            number, the other half from 2 to the whole number.
    """

    side: int
    strands: int
    longest: int


class _Walkers:
    """The walkers grow one curve in each of n images at the same time; curves touch neither themselves nor others."""

    def __init__(self, scene: Scene, count: int, rng: np.random.Generator) -> None:
        self.width = scene.side + 2  # with a border, so that no neighbour lies outside
        self.rng, self.scene, self.every = rng, scene, np.arange(count)
        inner = np.zeros((self.width, self.width), bool)
        inner[1:-1, 1:-1] = True
        self.outside = ~inner.ravel()
        self.drawn = np.zeros((count, self.width**2), bool)
        self.jumps = np.array([-self.width, 1, self.width, -1])

    def grow(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw another curve into each image, and return its first and last pixel and its steps, each [n]."""
        rng, count = self.rng, len(self.every)
        at = self._free_places()
        first = at.copy()
        self.drawn[self.every, at] = True
        wanted = rng.integers(2, self.scene.longest + 1, count)
        short = rng.random(count) < 0.5
        wanted[short] = rng.integers(2, self.scene.longest // 4 + 1, short.sum())
        heading, steps = rng.integers(0, 4, count), np.zeros(count, np.int64)
        going = self.every
        while True:
            following = at[going, None] + self.jumps  # [going, 4]
            open_ways = ~(self.drawn[going[:, None], following] | self.outside[following])
            beside = np.clip(following[:, :, None] + self.jumps, 0, self.width**2 - 1)
            # The only drawn neighbour of a free way is the pixel that the curve comes from.
            open_ways &= self.drawn[going[:, None, None], beside].sum(2) == 1
            moves = open_ways.any(1) & (steps[going] < wanted[going])
            if not moves.any():
                return first, at, steps
            going, following, open_ways = going[moves], following[moves], open_ways[moves]
            kept, luck = rng.random((count, 1)) < KEPT, rng.random((count, 4))
            straight = (np.arange(4) == heading[going, None]) & kept[going]
            way = np.where(open_ways, luck[going] + HEADING * straight, -1.0).argmax(1)
            at[going], heading[going] = following[np.arange(len(going)), way], way
            steps[going] += 1
            self.drawn[going, at[going]] = True

    def _free_places(self) -> np.ndarray:
        """Return a pixel in each image that touches no curve, [n]."""
        grid = self.drawn.reshape(-1, self.width, self.width)
        near = grid.copy()
        for axis in (1, 2):
            for way in (1, -1):
                near |= np.roll(grid, way, axis)
        luck = self.rng.random(self.drawn.shape, dtype=np.float32)
        luck[near.reshape(luck.shape) | self.outside] = -1.0
        return luck.argmax(1)


def trace_images(scene: Scene, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw `count` images of curves.

    Returns:
        images [count, 3, side, side] in 0 to 1; classes [count], the colour at the end of the curve whose other end is
        white; and the steps from one end to the other [count].
    """
    rng = np.random.default_rng(seed)
    walkers = _Walkers(scene, count, rng)
    starts, ends, steps = (
        np.stack(part, 1) for part in zip(*(walkers.grow() for _ in range(scene.strands)), strict=True)
    )
    pixels, every = np.zeros((count, walkers.width**2, 3), np.float32), np.arange(count)
    pixels[walkers.drawn] = GREY
    colour = rng.permuted(np.tile(np.arange(len(COLOURS)), (count, 1)), axis=1)[:, : scene.strands]
    for strand in range(scene.strands):
        pixels[every, ends[:, strand]] = COLOURS[colour[:, strand]]
    # Any curve may be the marked one if its two ends are not the same pixel or neighbours.
    marked = np.where(steps >= 2, rng.random(steps.shape), -1.0).argmax(1)
    pixels[every, starts[every, marked]] = 1.0
    images = pixels.reshape(count, walkers.width, walkers.width, 3)[:, 1:-1, 1:-1].transpose(0, 3, 1, 2)
    found = (np.ascontiguousarray(images), colour[every, marked], steps[every, marked])
    return torch.from_numpy(found[0]), torch.from_numpy(found[1]), torch.from_numpy(found[2])


def _traces(name: str, scene: Scene, sizes: tuple[int, int, int]) -> Dataset:
    def draw(count: int, seed: int) -> Split:
        images, labels, steps = trace_images(scene, count, seed)
        return Split(images, labels, difficulty={"length": steps.float()})

    # There is one mean for all channels, since no colour is special.
    return drawn(name, len(COLOURS), sizes, [draw] * 3, dtype="uint8", by_channel=False)


def trace() -> Dataset:
    """Six curves of up to 32 steps in 24x24 pixels, of which one is traced; 20,000 / 5,000 / 5,000 rows."""
    return _traces("trace", Scene(side=24, strands=6, longest=32), (20_000, 5_000, 5_000))


def trace_long() -> Dataset:
    """Four curves of up to 64 steps in 32x32 pixels, of which one is traced; 20,000 / 5,000 / 5,000 rows."""
    return _traces("trace-long", Scene(side=32, strands=4, longest=64), (20_000, 5_000, 5_000))


def trace_small() -> Dataset:
    """Four curves of up to 20 steps in 16x16 pixels, of which one is traced; 10,000 / 2,000 / 2,000 rows."""
    return _traces("trace-small", Scene(side=16, strands=4, longest=20), (10_000, 2_000, 2_000))
