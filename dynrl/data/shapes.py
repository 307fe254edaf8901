"""In the task of shapes, a question asks whether a thing is in an image of coloured shapes, or where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dynrl.data.base import Dataset, Split, drawn

COLOURS = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], np.float32)  # red, green, blue
FORMS = 3  # circles, squares, triangles
SIDE, CELL = 3, 10  # the grid has SIDE x SIDE cells of CELL x CELL pixels
PROPERTIES = len(COLOURS) + FORMS
MOVES = ((0, -1), (0, 1), (-1, 0), (1, 0))  # left of, right of, above, below: rows and columns on
BITS = 2 * PROPERTIES + len(MOVES)
FULL = 0.5  # how often a cell holds a shape that nobody placed there
ALONE = 0.25  # the share of training questions that ask for one thing


@dataclass(frozen=True)
class Questions:
    """Questions [n] each: is there a `thing`, or is there one `move` (next to, on that side of) an `other`?

    A thing is (colour, form), each of them -1 if it may be any.

    Attributes:
        thing, other: [n, 2]; an `other` without colour and form is none, and the question is for one thing.
        move: [n], an index into `MOVES`; -1 in questions for one thing.
    """

    thing: np.ndarray
    other: np.ndarray
    move: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Questions:
        return Questions(self.thing[rows], self.other[rows], self.move[rows])

    def bits(self) -> np.ndarray:
        """Return a 1 for each property of the thing, the move, each property of the other: [n, BITS] float32."""
        marks = np.zeros((len(self.move), BITS), np.float32)
        places = (
            (self.thing[:, 0], 0), (self.thing[:, 1], len(COLOURS)), (self.move, PROPERTIES),
            (self.other[:, 0], PROPERTIES + len(MOVES)), (self.other[:, 1], PROPERTIES + len(MOVES) + len(COLOURS)),
        )  # fmt: skip
        for value, first in places:
            rows = np.flatnonzero(value >= 0)
            marks[rows, first + value[rows]] = 1
        return marks

    def modules(self) -> np.ndarray:
        """Return how many modules answer each question: [n].

        One finds each property, one joins each to those before, one moves the other's place, and one answers.
        """
        finds = (self.thing >= 0).sum(1) + (self.other >= 0).sum(1)
        return 2 * finds + (self.move >= 0)


def _pairs(rng: np.random.Generator) -> list[np.ndarray]:
    """Part all pairs of things into those of training, validation and test questions: [pairs, 2, 2] each."""
    things = [(colour, form) for colour in range(-1, len(COLOURS)) for form in range(-1, FORMS)][1:]
    pairs = rng.permutation(np.array([(thing, other) for thing in things for other in things]))
    return np.split(pairs, [len(pairs) * 6 // 10, len(pairs) * 7 // 10])


PAIRS = _pairs(np.random.default_rng(0))


def _questions(part: int, count: int, rng: np.random.Generator) -> Questions:
    """Draw questions of a split: 0 for training, 1 for validation, 2 for test."""
    pairs = PAIRS[part]
    single = (pairs < 0).sum((1, 2))  # of two things that may have one property only
    weight = 1.5**single  # so a thing of one property is as likely as one of two, though there are fewer
    drawn = pairs[rng.choice(len(pairs), count, p=weight / weight.sum())]
    asked = Questions(drawn[:, 0], drawn[:, 1], rng.integers(0, len(MOVES), count))
    alone = rng.random(count) < (ALONE if part == 0 else 0)
    asked.other[alone], asked.move[alone] = -1, -1
    return asked


def _holds(cells: np.ndarray, thing: np.ndarray) -> np.ndarray:
    """Return where `cells` [n, SIDE, SIDE, 2] hold `thing` [n, 2]: bool [n, SIDE, SIDE]."""
    wanted = thing[:, None, None]
    found: np.ndarray = ((wanted < 0) | (cells == wanted)).all(3) & (cells[..., 0] >= 0)
    return found


def answers(cells: np.ndarray, asked: Questions) -> np.ndarray:
    """Return the answers to questions on `cells` [n, SIDE, SIDE, 2], (colour, form) or -1 twice: bool [n]."""
    thing, other = _holds(cells, asked.thing), _holds(cells, asked.other)
    right = np.asarray(thing.any((1, 2)))
    for move, (down, on) in enumerate(MOVES):
        beside = np.zeros_like(other)  # where a neighbour on that side of an `other` lies
        for row in range(SIDE):
            for column in range(SIDE):
                if 0 <= row + down < SIDE and 0 <= column + on < SIDE:
                    beside[:, row + down, column + on] = other[:, row, column]
        right = np.where(asked.move == move, (thing & beside).any((1, 2)), right)
    return right


def _place(cells: np.ndarray, rows: np.ndarray, at: np.ndarray, thing: np.ndarray, rng: np.random.Generator) -> None:
    """Put `thing` [k, 2] into the cells `at` [k, 2] of the images `rows` [k]; what it may be any of is drawn."""
    drawn = np.stack([rng.integers(0, len(COLOURS), len(rows)), rng.integers(0, FORMS, len(rows))], 1)
    cells[rows, at[:, 0], at[:, 1]] = np.where(thing < 0, drawn, thing)


def _draw_cells(asked: Questions, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw images for questions with the answers `wanted` [n] bool: [n, SIDE, SIDE, 2], see `answers`.

    Two cells are filled in each image. For a yes, they hold the thing and the other where they should be. For a no,
    each holds what is asked for, or else anything, anywhere; images in which that makes a yes are drawn again.
    """
    count = len(wanted)
    cells, left = np.full((count, SIDE, SIDE, 2), -1), np.arange(count)
    moves = np.array([*MOVES, (0, 0)])  # the last one is for -1, no move
    while len(left):
        size, mine, yes = len(left), asked[left], wanted[left]
        fresh = np.stack(
            [rng.integers(0, len(COLOURS), (size, SIDE, SIDE)), rng.integers(0, FORMS, (size, SIDE, SIDE))], 3
        )
        fresh[rng.random((size, SIDE, SIDE)) >= FULL] = -1
        step = moves[mine.move]
        at = rng.integers(0, SIDE, (size, 2))
        at = np.where(yes[:, None], np.clip(at, np.maximum(0, -step), SIDE - 1 - np.maximum(0, step)), at)
        to = np.where(yes[:, None], at + step, rng.integers(0, SIDE, (size, 2)))
        every = np.arange(size)
        for where, thing in ((at, mine.other), (to, mine.thing)):
            shown = yes | (rng.random(size) < 0.5)
            _place(fresh, every, where, np.where(shown[:, None], thing, -1), rng)
        fits = answers(fresh, mine) == yes
        cells[left[fits]] = fresh[fits]
        left = left[~fits]
    return cells


def _stamps() -> np.ndarray:
    """Return each form at each of nine places within its cell: [FORMS, 9, CELL, CELL] float32, 0 or 1."""
    y, x = np.mgrid[0 : CELL - 2, 0 : CELL - 2] - (CELL - 3) / 2
    half = (CELL - 2) / 2
    drawn = np.stack([x**2 + y**2 <= half**2, np.abs(x + y) < CELL, np.abs(x) <= (y + half) / 2]).astype(np.float32)
    stamps = np.zeros((FORMS, 9, CELL, CELL), np.float32)
    for place in range(9):
        top, left = divmod(place, 3)
        stamps[:, place, top : top + CELL - 2, left : left + CELL - 2] = drawn
    return stamps


def draw_images(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return images [n, 3, SIDE * CELL, SIDE * CELL] float32 of `cells`.

    Each shape is anywhere in its cell, and of any brightness from a half on.
    """
    stamps, count = _stamps(), len(cells)
    place, bright = rng.integers(0, 9, (count, SIDE, SIDE)), rng.uniform(0.5, 1, (count, SIDE, SIDE))
    light = COLOURS[cells[..., 0]] * (bright * (cells[..., 0] >= 0)).astype(np.float32)[..., None]
    images = np.empty((count, 3, SIDE * CELL, SIDE * CELL), np.float32)
    for row in range(SIDE):
        for column in range(SIDE):
            shown = stamps[cells[:, row, column, 1], place[:, row, column]]
            part = slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)
            images[:, :, *part] = light[:, row, column, :, None, None] * shown[:, None]
    return images


def _draw(part: int, count: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    asked, wanted = _questions(part, count, rng), rng.permutation(count) < count // 2
    inputs = np.zeros((count, 4, SIDE * CELL, SIDE * CELL), np.float32)
    inputs[:, :3] = draw_images(_draw_cells(asked, wanted, rng), rng)
    inputs[:, 3, 0, :BITS] = asked.bits()
    modules = torch.from_numpy(asked.modules()).float()
    return Split(torch.from_numpy(inputs), torch.from_numpy(wanted).long(), difficulty={"modules": modules})


def shapes() -> Dataset:
    """Is there a red square above a circle? Images of 3x3 shapes and questions; 10,000 / 2,000 / 4,000 rows.

    Each cell of 10x10 pixels is empty or holds a circle, square or triangle in red, green or blue. A question is for a
    thing (a colour, a form, or both), mostly next to another thing on a side. Half of the answers are yes. The image is
    in the first three channels. The first numbers of the fourth are the question: a 1 for each property of the thing,
    for left of, right of, above or below, and for each property of the other.

    Questions in the validation and test splits are for pairs of things that training never asks for together, on any
    side. How many modules answer a question goes along. The task follows SHAPES (Andreas et al. 2016, CVPR, section
    5), where questions of different splits differ, too.
    """
    draws = [partial(_draw, part) for part in range(3)]
    return drawn("shapes", 2, (10_000, 2_000, 4_000), draws, names=("no", "yes"))
