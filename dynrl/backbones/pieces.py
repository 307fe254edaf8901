"""A walk in pieces is recorded as CUDA graphs from point to point, for blocks that are any module.

A piece gathers the rows that take choice 1, computes the branch, puts them back, and goes on to the next point. Between
pieces the host waits for one number, how many rows will run. It replays the piece for the least recorded number that
holds them, filled up with repeats of the last row. Pieces are recorded when they are first needed. The idea is that of
vLLM's piecewise graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynrl.backbones.base import Backbone
from dynrl.backbones.walk import END, CostTable, State, Walk
from dynrl.ops.move import each, tensors_of
from dynrl.ops.partition import partition
from dynrl.ops.recorder import Recorder, Replay, Told

STEPS = 16  # a point is recorded for so many numbers of rows, evenly spaced up to the batch


@dataclass
class _Place:
    """What stands at one point, in tensors that stay where they are.

    Attributes:
        rows: [B] int64, the slots of the rows; the walk's `all_rows` where they are together.
        features: [B, ...] each, the features of the rows.
        index: [B] int64, the places of the rows that take choice 1, the last of them again behind the last.
        told: how many rows take choice 1.
        ways: for each capacity: what replays its piece, the capacity that it computes, and the milliseconds.
    """

    rows: Tensor
    features: Any
    index: Tensor
    told: Told
    ways: dict[int, tuple[Replay, int, float]] = field(default_factory=dict)


class Pieces:
    """These are the pieces of one network for one batch size.

    Args:
        backbone: a network that can be recorded in pieces (`Backbone.captures`).
        inputs: the tensor whose values each replay walks.
        recorder: what records.
        arrived: a function that is called, and recorded, with the state at each point.
        table: the cost table of the walk; None charges MACs.

    Attributes:
        walk: the walk, whose records stay where they are.
        start: replays what comes before the first decision, up to `arrived`.
    """

    def __init__(
        self, backbone: Backbone, inputs: Tensor, recorder: Recorder, arrived: Callable[[Pieces, State], None],
        table: CostTable | None = None,
    ) -> None:  # fmt: skip
        size = len(inputs)
        self._backbone, self._recorder, self._arrived = backbone, recorder, arrived
        self._places = dict[int, _Place]()
        self._outputs: Tensor | None = None
        self._capacities = [0, *sorted({math.ceil(size * step / STEPS) for step in range(1, STEPS + 1)})]
        self.walk = Walk(inputs, backbone.points, backbone.mac_table, table)
        self._begin()
        for point in range(len(backbone.points)):  # makes what stands at the points
            # Where no row runs a block, it shows whether the features stay where they are.
            self._go_on(point, size if backbone.speaks else 0)
        self.start = recorder.record(self._begin)

    def state(self, point: int) -> State:
        """Return the state at `point`, whose features the next replay may overwrite."""
        if point == END:
            return State(self.walk, END, self.walk.all_rows)
        place = self._places[point]
        return State(self.walk, point, place.rows, place.features)

    def decide(self, state: State, action: Tensor) -> None:
        """Record and charge the choices [n] of `state`, and sort its rows by them; this is to be recorded."""
        place, walk, count = self._places[state.point], self.walk, state.count
        walk.visits_together[state.point] = 0
        going = self._backbone.take(state, action) == 1
        if not state.together and state.point:  # repeats behind the rows that have arrived do not count
            going &= walk.all_rows[:count] < self._places[state.point - 1].told.there
        part = partition((~going).long(), 2)
        run = part.offsets[1:2].long()
        # All places are written, because a piece of more rows than have arrived may be the fastest that holds them.
        place.index.copy_(part.order.index_select(0, torch.minimum(walk.all_rows, (run - 1).clamp_min(0))))
        place.told.there.copy_(run)
        place.told.send()

    def running(self, point: int) -> int:
        """Wait for the device, and return how many rows at `point` take choice 1."""
        return self._places[point].told.read()[0]

    def go_on(self, point: int, count: int) -> None:
        """Replay what follows the decision at `point`, of which `count` rows take choice 1, up to `arrived`."""
        self._piece(point, count)()

    def changing(self, point: int) -> list[Tensor]:
        """Return what replays at `point` change and may not do twice."""
        return self.state(point).written

    def _begin(self) -> None:
        walk = self.walk
        walk.reset()
        walk.begin(walk.all_rows)
        self._arrive(self._backbone._start(walk, walk.all_rows, walk.inputs))

    def _go_on(self, point: int, capacity: int) -> None:
        self._arrive(self._backbone._run_rows(self.state(point), self._places[point].index[:capacity]))

    def _arrive(self, state: State) -> None:
        self._keep_outputs()
        if state.point == END:
            return
        place = self._place(state)
        if place.rows is not self.walk.all_rows:
            place.rows[: state.count].copy_(state.rows)
        each(partial(_leave, state.count), place.features, state.features)
        with self._recorder.counts():
            self._arrived(self, state)

    def _keep_outputs(self) -> None:
        walk = self.walk
        if walk.outputs is None or walk.outputs is self._outputs:
            return
        if self._outputs is None:
            self._outputs = torch.empty_like(walk.outputs)
        self._outputs.copy_(walk.outputs)
        walk.outputs = self._outputs

    def _place(self, state: State) -> _Place:
        """Return the place of `state`; if it is the first one there, make it: then all rows are there."""
        if state.point not in self._places:
            features = each(partial(_room, self._places.get(state.point - 1)), state.features)
            rows = state.rows if state.together else torch.empty_like(state.rows)
            index = torch.zeros_like(rows)  # at first, one row stands for all
            self._places[state.point] = _Place(rows, features, index, Told(rows.device, 1))
        return self._places[state.point]

    def _piece(self, point: int, count: int) -> Replay:
        """Return the fastest piece of `point` that holds `count` rows."""
        size, ways = len(self.walk), self._places[point].ways
        capacity = next(capacity for capacity in self._capacities if capacity >= count)
        for needed in (size, capacity):
            if needed not in ways:
                keep, run = self.changing(point), partial(self._go_on, point, needed)
                replay = self._recorder.record(run, keep)
                ways[needed] = replay, needed, self._recorder.milliseconds(replay, keep)
                # To compute all rows may take less time than to gather some, where they are many or a batch is small.
                if needed and ways[size][2] <= ways[needed][2]:
                    ways[needed] = ways[size]
        return ways[capacity][0]

    def report(self) -> list[dict[str, Any]]:
        """Return, for each point, how many rows are computed for each number of rows that was recorded."""
        return [
            {
                "point": self._backbone.points[point].name,
                "computes": {capacity: rows for capacity, (_, rows, _) in sorted(place.ways.items())},
            }
            for point, place in sorted(self._places.items())
        ]


def _leave(count: int, room: Tensor, value: Tensor) -> Tensor:
    if room.data_ptr() != value.data_ptr():
        room[:count].copy_(value)
    return room


def _room(before: _Place | None, value: Tensor) -> Tensor:
    """Return `value` itself if it is what lay at the point before, changed in place; else room for it."""
    stays = before is not None and any(value is part for part in tensors_of(before.features))
    return value if stays else torch.empty_like(value)
