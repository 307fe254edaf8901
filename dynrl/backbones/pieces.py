"""A walk in pieces is recorded as CUDA graphs from point to point, for blocks that are any module.

A piece gathers the rows that take choice 1, computes the branch, puts them back, and goes on to the next point. Each
slot has its place at every point, so rows may stand at several points at the same time. At each point the host waits
for one number, how many rows run. It replays the piece for the least recorded number that holds them, filled up with
repeats of the last row, which write the same once more. Pieces are recorded when they are first needed. The idea is
that of vLLM's piecewise graphs.

Where rows run a block or do not, and stay together, the device does not idle while the host waits. The piece starts for
as many rows as ran there last time. If there are more, the others follow in a second piece.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynrl.backbones.base import Backbone
from dynrl.backbones.walk import END, CostTable, State, Walk
from dynrl.ops.move import as_rows, each, put_rows, take_rows, tensors_of
from dynrl.ops.partition import partition
from dynrl.ops.recorder import Recorder, Replay, Told
from dynrl.ops.running import running

STEPS = 32  # a point is recorded for so many numbers of rows, evenly spaced up to the batch


@dataclass
class _Place:
    """What stands at one point, in tensors that stay where they are.

    Attributes:
        features: [B, ...] each, the features of each slot; None at END.
        told: how many rows take choice 1.
        ways: for each capacity: what replays its piece, the capacity that it computes, and the milliseconds.
        rest: what replays what comes behind a block, if rows stay together.
        spare: [1, ...] each, the features of the first row that a block changes, as they were before (`as_rows`).
        ran: how many rows ran the block last time; at first, none.
    """

    features: Any
    told: Told
    ways: dict[int, tuple[Replay, int, float]] = field(default_factory=dict)
    rest: Replay | None = None
    spare: Any = None
    ran: int = 0


class Pieces:
    """These are the pieces of one network for one batch size.

    Args:
        backbone: a network that can be recorded in pieces (`Backbone.captures`).
        inputs: the tensor whose values each replay walks.
        recorder: what records.
        arrived: a function that is called, and recorded, with the state of rows that have come to a point or to END.
            There may be rows more than once.
        table: the cost table of the walk; None charges MACs.

    Attributes:
        walk: the walk, whose records stay where they are.
    """

    def __init__(
        self, backbone: Backbone, inputs: Tensor, recorder: Recorder, arrived: Callable[[Pieces, State], None],
        table: CostTable | None = None,
    ) -> None:  # fmt: skip
        size = len(inputs)
        self._backbone, self._recorder, self._arrived = backbone, recorder, arrived
        self._outputs: Tensor | None = None
        self._capacities = sorted({math.ceil(size * step / STEPS) for step in range(1, STEPS + 1)})
        self.walk = Walk(inputs, backbone.points, backbone.mac_table, table)
        # For each point, the slots that go on from there, the last of them again behind the last; and in the last line,
        # which is that of END, those that begin anew. At first, one slot stands for all.
        self._index = inputs.new_zeros(len(backbone.points) + 1, size, dtype=torch.int64)
        self._places = {END: _Place(None, Told(inputs.device, 1))}
        self._begin()
        for point in range(len(backbone.points)):  # makes what stands at the points
            if backbone.speaks:
                self._go_on(point, size)
            else:
                self._rest(point)
        self._start = recorder.record(self._begin)

    def state(self, point: int) -> State:
        """Return all slots as a state at `point`, whose features the next replay may overwrite."""
        return State(self.walk, point, self.walk.all_rows, self._places[point].features)

    def start(self) -> None:
        """Replay what comes before the first decision of all rows, up to `arrived`."""
        self.walk.outputs = self._outputs  # a walk that has gone on without a recording has put its own there
        self._start()

    def decide(self, state: State, action: Tensor) -> None:
        """Record and charge the choices [n] of `state`, and sort its rows by them; this is to be recorded."""
        point, told = state.point, self._places[state.point].told
        self.walk.visits_together[point] = 0
        # Repeats behind the rows that have arrived do not count.
        arrived = None if state.together else self._places[point - 1].told.there
        running(self._backbone.take(state, action), state.rows, self._index[point], told.there, arrived)
        told.send()

    def decide_apart(self, at: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Do `decide` for all slots, each at its own point; this is to be recorded.

        Args:
            at: [B] int64, the point at which each slot stands; those at END decide nothing.
            action: [B] int64.

        Returns:
            the slots [B], sorted by what they do, and the bounds [points + 3] of: going on from each of the points, in
            their order; stopping; standing at END before.
        """
        walk, last = self.walk, len(self._backbone.points)
        walk.decided_apart(at, action)
        does = at.masked_fill(action != 1, last).masked_fill_(at == END, last + 1)
        part = partition(does, last + 2)
        bounds = part.offsets.long()
        begins, behind = bounds[:last, None], bounds[1 : last + 1, None]
        # All of it is written, because a piece of more rows than have arrived may be the fastest that holds them.
        places = torch.minimum(walk.all_rows + begins, (behind - 1).clamp_min(0))
        self._index[:last].copy_(part.order[places])
        return part.order, bounds

    def begin_anew(self, rows: Tensor) -> None:
        """Put `rows` [n], n > 0, at the first point, with the inputs that lie in their slots now, up to `arrived`."""
        self._index[END].copy_(rows.index_select(0, self.walk.all_rows.clamp_max(len(rows) - 1)))
        self.go_on(END, len(rows))

    def running(self, point: int) -> int:
        """Wait for the device, and return how many rows at `point` take choice 1."""
        told = self._places[point].told
        told.sent()
        return int(told.read()[0])

    def go_on(self, point: int, count: int) -> None:
        """Replay what follows the decision at `point`, where `count` rows go on and the others end, up to `arrived`."""
        self._piece(point, count)[0]()

    def go_on_together(self, point: int) -> None:
        """Replay what follows the decision at `point`, where rows run a block or do not, up to `arrived`."""
        place, index = self._places[point], self._index[point]
        place.told.sent()
        held = self._run(point, place.ran)
        count = place.ran = int(place.told.read()[0])
        if count > held:
            index.copy_(index[(self.walk.all_rows + held).clamp_max_(len(index) - 1)])
            self._run(point, count - held)
        elif held and not count:  # what stands for the last row that runs is one that does not
            each(lambda part, spare: as_rows(part).index_copy_(0, index[:1], spare), place.features, place.spare)
        if place.rest is None:
            place.rest = self._recorder.record(partial(self._rest, point), self.state(point).written)
        place.rest()

    def _begin(self) -> None:
        walk = self.walk
        walk.reset()
        walk.begin(walk.all_rows)
        self._arrive(self._backbone._start(walk, walk.all_rows, walk.inputs))

    def _go_on(self, point: int, capacity: int) -> None:
        index, walk = self._index[point, :capacity], self.walk
        if point == END:
            walk.forget(index)
            walk.begin(index)
            self._arrive(self._backbone._start(walk, index, take_rows(walk.inputs, index)))
        elif self._backbone.speaks:
            self._arrive(self._backbone._run_rows(self.state(point), index))
        else:
            place = self._places[point]
            if place.spare is None:
                place.spare = each(lambda part: as_rows(part)[:1].clone(), place.features)
            each(
                lambda spare, part: torch.index_select(as_rows(part), 0, index[:1], out=spare),
                place.spare,
                place.features,
            )
            each(_move, place.features, self._backbone._run_block(self.state(point), index))

    def _run(self, point: int, count: int) -> int:
        """Replay the block of `point` for `count` rows, and return how many rows that may have been."""
        if count == 0:
            return 0
        replay, held, _ = self._piece(point, count)
        replay()
        return held

    def _rest(self, point: int) -> None:
        self._arrive(self._backbone._run_rest(self.state(point)))

    def _arrive(self, state: State) -> None:
        self._keep_outputs()
        if not state.ended:
            each(partial(_leave, state), self._place(state).features, state.features)
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
            features = each(partial(_room, self._places[state.point - 1]), state.features)
            self._places[state.point] = _Place(features, Told(state.rows.device, 1))
        return self._places[state.point]

    def _piece(self, point: int, count: int) -> tuple[Replay, int, float]:
        """Return the fastest piece of `point` that holds `count` rows, as one of `_Place.ways`."""
        size, ways = len(self.walk), self._places[point].ways
        capacity = self._capacities[bisect_left(self._capacities, count)]
        for needed in (size, capacity):
            if needed not in ways:
                keep, run = self.state(point).written, partial(self._go_on, point, needed)
                replay = self._recorder.record(run, keep)
                ways[needed] = replay, needed, self._recorder.milliseconds(replay, keep)
                # To compute all rows may take less time than to gather some, where they are many or a batch is small.
                if ways[size][2] <= ways[needed][2]:
                    ways[needed] = ways[size]
        return ways[capacity]

    def report(self) -> list[dict[str, Any]]:
        """Return, for each point, how many rows are computed for each number of rows that was recorded."""
        return [
            {
                "point": self._backbone.points[point].name,
                "computes": {capacity: rows for capacity, (_, rows, _) in sorted(place.ways.items())},
            }
            for point, place in sorted(self._places.items())
            if point != END
        ]


def _leave(state: State, room: Tensor, value: Tensor) -> Tensor:
    if state.together:
        return _move(room, value)
    put_rows(room, state.rows, value)
    return room


def _move(room: Tensor, value: Tensor) -> Tensor:
    return room if room.data_ptr() == value.data_ptr() else room.copy_(value)


def _room(before: _Place, value: Tensor) -> Tensor:
    """Return `value` itself if it is what lay at the point before, changed in place; else room for it."""
    return value if any(value is part for part in tensors_of(before.features)) else torch.empty_like(value)
