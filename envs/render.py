"""What an environment shows of one row: as text (`ansi`), or as a picture (`rgb_array`).

Both are made of NumPy alone, so that rendering asks for no package that the environment does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynrl.backbones import Point

SIDE, PAD, CELL, WRAP = 192, 8, 20, 16  # pixels of an input's sides, of borders and of a cell; cells in a line
PAPER, EMPTY, HERE, SPENT = (255, 255, 255), (224, 224, 224), (214, 69, 65), (60, 60, 60)
LEAST, MOST = np.array((198, 219, 239)), np.array((8, 69, 148))  # the colours of the first and the last choice


@dataclass(frozen=True)
class Shown:
    """This is what is shown of one row.

    Attributes:
        points: the backbone's points.
        route: [columns], the choice in each column; -1 where the row has not been.
        column: the column of the decision that comes next; None once the walk has ended.
        spent: the MACs so far, as a share of the dense network's.
        price: the price of the dense network's compute.
        worth: the task's metric of the answer by its name; empty before the end.
        picture: [height, width, 3] uint8, the input if it is an image.
    """

    points: Sequence[Point]
    route: np.ndarray
    column: int | None
    spent: float
    price: float
    worth: dict[str, float]
    picture: np.ndarray | None


def text(shown: Shown) -> str:
    """Return a line for each decision so far, one for the decision that comes next, and one with what was spent."""
    names = [(point, visit) for point in shown.points for visit in range(point.visits)]
    lines = []
    for column, ((point, visit), choice) in enumerate(zip(names, shown.route.tolist(), strict=True)):
        if choice < 0 and column != shown.column:
            continue
        name = point.name if point.visits == 1 else f"{point.name} [{visit}]"
        lines.append(f"{name:20} {'?' if column == shown.column else choice} of 0 to {point.n - 1}")
    ended = ", ".join(f"{name} {value:g}" for name, value in shown.worth.items())
    lines.append(f"spent {shown.spent:.3f} of the dense MACs at price {shown.price:g}{ended and f'; ended: {ended}'}")
    return "\n".join(lines)


def picture(shown: Shown) -> np.ndarray:
    """Return [height, width, 3] uint8: the input if it is an image, and the route beside it above what it cost.

    Each column of the route is a cell: grey where the row has not been, framed in red where the next decision is, else
    the bluer the higher the choice. The bar below is full where the dense network's MACs are spent.
    """
    columns = len(shown.route)
    height = max(SIDE, -(-columns // WRAP) * CELL + 2 * CELL)
    route = np.full((height + 2 * PAD, WRAP * CELL + 2 * PAD, 3), PAPER, np.uint8)
    counts = [point.n for point in shown.points for _ in range(point.visits)]
    for column, (count, choice) in enumerate(zip(counts, shown.route.tolist(), strict=True)):
        y, x = (PAD + CELL * at for at in divmod(column, WRAP))
        if column == shown.column:
            route[y : y + CELL, x : x + CELL] = HERE
        share = choice / max(1, count - 1)
        colour = EMPTY if choice < 0 else LEAST + share * (MOST - LEAST)
        route[y + 2 : y + CELL - 2, x + 2 : x + CELL - 2] = colour
    bar = route[PAD + height - CELL : PAD + height, PAD:-PAD]
    bar[:] = EMPTY
    bar[:, : round(min(1.0, shown.spent) * bar.shape[1])] = SPENT if shown.spent <= 1 else HERE
    if shown.picture is None:
        return route
    rows, wide = shown.picture.shape[:2]
    at = [np.arange(SIDE) * size // SIDE for size in (rows, wide)]
    beside = np.full((route.shape[0], SIDE + PAD, 3), PAPER, np.uint8)
    beside[PAD : PAD + SIDE, PAD:] = shown.picture[at[0]][:, at[1]]
    return np.concatenate([beside, route], 1)


# The modes in which environments render.
MODES: dict[str, Callable[[Shown], Any]] = {"ansi": text, "rgb_array": picture}
