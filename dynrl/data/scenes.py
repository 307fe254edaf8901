"""In a scene, one thing of random size lies at a random place among random amounts of clutter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.data.base import Augmentation, Dataset, Parts, Split, scaled
from dynrl.data.images import digit_images, fashion_images
from dynrl.data.stored import statistics


@dataclass(frozen=True)
class Scene:
    """A scene says what each image holds.

    Attributes:
        side: the image's width and height in pixels.
        sizes: the least and the most pixels of the thing's width and height.
        pieces: the most pieces of clutter.
        piece: the width and height of a piece in pixels.
    """

    side: int
    sizes: tuple[int, int]
    pieces: int
    piece: int


DIM = 0.6  # the brightness of the dimmest things and pieces, as a share


def draw_scenes(things: Tensor, scene: Scene, rows: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw a scene around each of the things at `rows`.

    A piece of clutter is a square that is cut out of another thing, of a size in the same range. Where a piece and
    the thing overlap, the brighter one shows.

    Args:
        things: [m, 1, height, width], in 0 to 1.
        scene: what each image holds.
        rows: [n] int64.
        seed: the seed of places, sizes and pieces.

    Returns:
        the images [n, 1, side, side], and what makes them hard: the thing's size and the number of pieces, [n] each.
    """
    rng, count, (least, most) = np.random.default_rng(seed), len(rows), scene.sizes
    # Things are drawn into squares that may reach beyond the image, where they are empty.
    canvas = torch.zeros(count, scene.side + most, scene.side + most)

    def paste(at: Tensor, shown: Tensor, size: np.ndarray, corner: np.ndarray, square: int, place: np.ndarray) -> None:
        """Paste squares on the canvases `at` [k], at `place` [2, k]; each shows a thing of that size and corner."""
        light = torch.from_numpy(rng.uniform(DIM, 1, (len(at), 1, 1))).float()
        pixels = resized(shown, square, size, corner)[:, 0] * light
        every = torch.arange(square)
        top, left = torch.from_numpy(place).unsqueeze(2)
        where = at.view(-1, 1, 1), (top + every).unsqueeze(2), (left + every).unsqueeze(1)
        canvas[where] = canvas[where].maximum(pixels)

    sizes, pieces = rng.integers(least, most + 1, count), rng.integers(0, scene.pieces + 1, count)
    corners = rng.integers(0, scene.side - sizes + 1, (2, count))
    paste(torch.arange(count), things[rows], sizes, np.zeros((2, count)), most, corners)
    for number in range(scene.pieces):
        mine = np.flatnonzero(pieces > number)
        others, big = rng.integers(len(things), size=len(mine)), rng.integers(least, most + 1, len(mine))
        cut = rng.integers(0, big - scene.piece + 1, (2, len(mine)))
        place = rng.integers(0, scene.side - scene.piece + 1, (2, len(mine)))
        paste(torch.from_numpy(mine), things[torch.from_numpy(others)], big, cut, scene.piece, place)
    images = canvas[:, : scene.side, : scene.side].unsqueeze(1).clone()
    return images, {"size": torch.from_numpy(sizes).float(), "clutter": torch.from_numpy(pieces).float()}


def resized(things: Tensor, square: int, size: np.ndarray, corner: np.ndarray) -> Tensor:
    """Resize each thing to `size` [n] pixels, and return the square of it that begins at `corner` [2, n].

    Args:
        things: [n, 1, height, width].
        square: the width and height of what is returned, in pixels.
        size: [n], the width and height that each thing gets.
        corner: [2, n], the row and column of the resized thing where the square begins.

    Returns:
        [n, 1, square, square], zero where the square reaches beyond its thing.
    """
    matrix = torch.zeros(len(things), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.from_numpy(square / size).float()
    matrix[:, :, 2] = torch.from_numpy((square + 2 * corner[::-1] - size) / size).t().float()
    grid = F.affine_grid(matrix, [len(things), 1, square, square], align_corners=False)
    return F.grid_sample(things, grid, align_corners=False)


def _scenes(name: str, scene: Scene, things: Parts, sizes: tuple[int, int, int]) -> Dataset:
    """Make a data set whose splits show things of the same split; other seeds draw other training images."""

    def draw(part: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        shown, labels = things[part]
        rows = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(max(sizes[part], len(shown))))
        rows = rows[: sizes[part]] % len(shown)
        images, difficulty = draw_scenes(shown, scene, rows, seed)
        return images, labels[rows].long(), difficulty

    made = [draw(part, part) for part in range(3)]
    mean, deviation = statistics(made[0][0])

    def split(images: Tensor, labels: Tensor, difficulty: dict[str, Tensor]) -> Split:
        return Split(scaled(images, mean, deviation), labels, difficulty=difficulty)

    train, validation, test = (split(*part) for part in made)
    return Dataset(
        name, 10, train, validation, test, Augmentation(), mean, deviation,
        anew=lambda seed: split(*draw(0, 1000 + seed)), dtype="uint8",
    )  # fmt: skip


def digit_scenes() -> Dataset:
    """Digits of random size among up to 8 pieces of other digits, 48x48; 10,000 / 1,000 / 2,000 rows."""
    scene = Scene(side=48, sizes=(12, 20), pieces=8, piece=8)
    return _scenes("digit-scenes", scene, digit_images(), (10_000, 1_000, 2_000))


def digit_scenes_large() -> Dataset:
    """Digits of random size among up to 16 pieces of other digits, 128x128; 10,000 / 1,000 / 2,000 rows."""
    scene = Scene(side=128, sizes=(12, 20), pieces=16, piece=8)
    return _scenes("digit-scenes-large", scene, digit_images(), (10_000, 1_000, 2_000))


def fashion_scenes() -> Dataset:
    """Clothes of random size among up to 8 pieces of other clothes, 64x64; 20,000 / 2,000 / 5,000 rows."""
    scene = Scene(side=64, sizes=(16, 28), pieces=8, piece=10)
    return _scenes("fashion-scenes", scene, fashion_images(), (20_000, 2_000, 5_000))
