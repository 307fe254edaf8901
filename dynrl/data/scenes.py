"""In a scene, one thing lies among random amounts of clutter, or things are near or far, or they are few or many."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.data.base import Dataset, Parts, Split, drawn
from dynrl.data.images import digit_images, fashion_images
from dynrl.tasks import Segmentation


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
        where = _squares(at, place, square)
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


def _squares(at: Tensor, place: np.ndarray, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index of squares of that side on the canvases `at` [k], whose corners are at `place` [2, k]."""
    every = torch.arange(side)
    top, left = torch.from_numpy(place).unsqueeze(2)
    return at.view(-1, 1, 1), (top + every).unsqueeze(2), (left + every).unsqueeze(1)


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


@dataclass(frozen=True)
class View:
    """A view says from where things are seen: all things of an image are of one size.

    Attributes:
        side: the image's width and height in pixels.
        sizes: the least and the most pixels of a thing's width and height.
        share: things are as many as make up this share of the image, at least one.
        most: the most things of an image.
        texture: the brightest that the background may be.
        patch: the width and height of a patch of the background in pixels.
    """

    side: int
    sizes: tuple[int, int]
    share: float
    most: int
    texture: float
    patch: int


EDGE = 0.3  # pixels of a thing that are dimmer count as background


def draw_views(things: Tensor, classes: Tensor, view: View, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images of things from near or from far, on a background of patches.

    Things do not overlap; where the background is brighter, it shows.

    Args:
        things: [m, 1, height, width], in 0 to 1.
        classes: [m] int64.
        view: what each image holds.
        count: the number of images.
        seed: the seed of all draws.

    Returns:
        the images [count, 1, side, side]; the class of each pixel [count, side, side] int64, 0 for the background, else
        1 more than that of the thing; and what makes images hard, [count, 3]: the things' size, their number, and how
        bright the background may be.
    """
    rng, side, most = np.random.default_rng(seed), view.side, view.sizes[1]
    sizes = rng.integers(view.sizes[0], most + 1, count)
    numbers = (view.share * side**2 / sizes**2).astype(np.int64).clip(1, view.most)
    texture = torch.from_numpy(rng.uniform(0, view.texture, count)).float()
    patches = torch.from_numpy(rng.random((count, 1, -(-side // view.patch), -(-side // view.patch)))).float()
    # Places are cells as large as the things, so that none hides another; each image draws the order of its cells.
    across = side // sizes
    luck = rng.random((count, int(across.max()) ** 2))
    order = np.where(np.arange(luck.shape[1]) < across[:, None] ** 2, luck, 2.0).argsort(1)
    corners = rng.integers(0, side - sizes * across + 1, (2, count))
    canvas, labels = torch.zeros(2, count, side + most, side + most)
    canvas[:, :side, :side] = (F.interpolate(patches, size=side, mode="bilinear") * texture.view(-1, 1, 1, 1))[:, 0]
    for number in range(view.most):
        mine = np.flatnonzero(numbers > number)
        shown = torch.from_numpy(rng.integers(len(things), size=len(mine)))
        big = sizes[mine]  # the more things, the smaller: squares need not hold the largest
        square, cell = int(big.max(initial=1)), order[mine, number]
        places = corners[:, mine] + big * np.stack([cell // across[mine], cell % across[mine]])
        where = _squares(torch.from_numpy(mine), places, square)
        light = torch.from_numpy(rng.uniform(DIM, 1, (len(mine), 1, 1))).float()
        pixels = resized(things[shown], square, big, np.zeros((2, len(mine))))[:, 0] * light
        front = (pixels > EDGE) & (pixels >= canvas[where])
        canvas[where] = canvas[where].maximum(pixels)
        labels[where] = torch.where(front, classes[shown].view(-1, 1, 1) + 1.0, labels[where])
    hard = torch.stack([torch.from_numpy(sizes).float(), torch.from_numpy(numbers).float(), texture], 1)
    return canvas[:, :side, :side].unsqueeze(1).clone(), labels[:, :side, :side].long(), hard


@dataclass(frozen=True)
class Page:
    """A page says what each image holds: things in the cells of a grid, at most one in each.

    Attributes:
        across: the number of cells in a row and in a column.
        cell: the width and height of a cell in pixels.
        sizes: the least and the most pixels of a thing's width and height.
    """

    across: int
    cell: int
    sizes: tuple[int, int]


def draw_pages(things: Tensor, page: Page, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pages on which few or many things lie.

    The logarithm of the number of things is uniform, so that few things are more frequent than many.

    Args:
        things: [m, 1, height, width], in 0 to 1.
        page: what each image holds.
        count: the number of images.
        seed: the seed of all draws.

    Returns:
        the images [count, 1, side, side], and which of the things lies in each cell, row by row: [count, cells] int64,
        -1 for none.
    """
    rng, cells, (least, most) = np.random.default_rng(seed), page.across**2, page.sizes
    numbers = np.floor((cells + 1) ** rng.random(count))
    full = rng.random((count, cells)).argsort(1).argsort(1) < numbers[:, None]
    shown = torch.from_numpy(np.where(full, rng.integers(len(things), size=full.shape), -1))
    at, cell = np.nonzero(full)
    size = rng.integers(least, most + 1, len(at))
    corner = page.cell * np.stack(np.divmod(cell, page.across)) + rng.integers(0, page.cell - size + 1, (2, len(at)))
    light = torch.from_numpy(rng.uniform(DIM, 1, (len(at), 1, 1))).float()
    pixels = resized(things[shown[at, cell]], most, size, np.zeros((2, len(at))))[:, 0] * light
    side = page.across * page.cell
    canvas = torch.zeros(count, side + most, side + most)
    # Squares are as large as the largest thing, and may reach into another cell, where they are empty.
    canvas.index_put_(_squares(torch.from_numpy(at), corner, most), pixels, accumulate=True)
    return canvas[:, :side, :side].unsqueeze(1).clone(), shown


def _scenes(name: str, scene: Scene, things: Parts, sizes: tuple[int, int, int]) -> Dataset:
    """Make a data set whose splits show things of the same split."""

    def draw(part: int, count: int, seed: int) -> Split:
        shown, labels = things[part]
        rows = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(max(count, len(shown))))
        rows = rows[:count] % len(shown)
        images, difficulty = draw_scenes(shown, scene, rows, seed)
        return Split(images, labels[rows].long(), difficulty=difficulty)

    return drawn(name, 10, sizes, [partial(draw, part) for part in range(3)], dtype="uint8")


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


def digit_views() -> Dataset:
    """Digits seen from near or far, 40x40, whose pixels have classes; 8,000 / 1,000 / 2,000 rows.

    An image shows one large digit, up to six small ones, or something in between. Training images are drawn anew in
    each epoch.
    """
    view, things = View(side=40, sizes=(8, 32), share=0.3, most=6, texture=0.5, patch=5), digit_images()

    def draw(part: int, count: int, seed: int) -> Split:
        images, labels, hard = draw_views(*things[part], view, count, seed)
        difficulty = dict(zip(("size", "things", "texture"), hard.unbind(1), strict=True))
        return Split(images, labels, Segmentation(), difficulty)

    draws, names = [partial(draw, part) for part in range(3)], ("background", *map(str, range(10)))
    return drawn("digit-views", 11, (8_000, 1_000, 2_000), draws, names=names, dtype="uint8")


def digit_pages() -> Dataset:
    """How many of a page's 1 to 16 digits are even? Images of 32x32; 10,000 / 2,000 / 4,000 rows.

    Few digits are more frequent than many. Each must be read, so their number is kept as `difficulty`. Training images
    are drawn anew in each epoch.
    """
    page, things = Page(across=4, cell=8, sizes=(7, 8)), digit_images()

    def draw(part: int, count: int, seed: int) -> Split:
        digits, labels = things[part]
        images, shown = draw_pages(digits, page, count, seed)
        there = shown >= 0
        even = (there & (labels[shown] % 2 == 0)).sum(1)
        return Split(images, even, difficulty={"digits": there.sum(1).float()})

    draws = [partial(draw, part) for part in range(3)]
    return drawn("digit-pages", page.across**2 + 1, (10_000, 2_000, 4_000), draws, dtype="uint8")
