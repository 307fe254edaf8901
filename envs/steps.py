"""On a CUDA device, an environment records what a step launches, and replays it without Python in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dynrl.backbones import END, Backbone, CostTable, State
from dynrl.backbones.pieces import Pieces
from dynrl.ops.move import put_rows
from dynrl.ops.recorder import Recorder, Told, recorder_for, records

See = Callable[[State, Tensor], Tensor]


class Steps:
    """This is the base class of recorded steps.

    Args:
        backbone: a network that can be recorded in pieces.
        inputs: a batch of inputs; only its size and type count.
        recorder: what records.
        see: a function from a state and the prices [B] to observations [n, width].
        table: the cost table of the walk; None charges MACs.

    Attributes:
        walk: the walk, whose records stay where they are.
    """

    def __init__(
        self, backbone: Backbone, inputs: Tensor, recorder: Recorder, see: See, table: CostTable | None
    ) -> None:
        self._backbone, self._recorder, self._see = backbone, recorder, see
        self._inputs = torch.zeros_like(inputs)
        self._prices = torch.zeros(len(inputs), dtype=torch.float32, device=inputs.device)
        self._actions = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        self._seen: Tensor | None = None  # [B, width], what there is to see of each slot
        self._pieces = Pieces(backbone, self._inputs, recorder, self._arrived, table)
        self.walk = self._pieces.walk

    def begin(self, inputs: Tensor, prices: Tensor) -> State:
        """Put `inputs` [B, ...] at the first point, at `prices` [B], and return their state."""
        self._inputs.copy_(inputs)
        self._prices.copy_(prices)
        self._pieces.start()
        return self._stand(0)

    def begin_some(self, inputs: Tensor, prices: Tensor, rows: Tensor) -> State:
        """Do `begin` in the slots `rows` [n] only."""
        raise NotImplementedError

    def holds(self, states: Collection[State]) -> bool:
        """Tell whether `states` are where the last replays have led."""
        raise NotImplementedError

    def advance(self, states: Collection[State], actions: Tensor) -> list[State]:
        """Do `Backbone.advance` for `states`, at least one, which `holds`, with the actions of all slots [B]."""
        raise NotImplementedError

    def seen(self, rows: Tensor) -> Tensor:
        """Return what is seen of the slots `rows` [n]: [n, width], a new tensor."""
        assert self._seen is not None
        return self._seen.index_select(0, rows)

    def _stand(self, point: int) -> State:
        raise NotImplementedError

    def _arrived(self, _: Pieces, state: State) -> None:
        seen = self._see(state, self._prices)
        if self._seen is None:  # at first, all rows arrive
            self._seen = torch.empty_like(seen)
        if state.together:
            self._seen.copy_(seen)
        else:
            put_rows(self._seen, state.rows, seen)


class Together(Steps):
    """In these steps, all rows stand at one point, as in a chain of blocks that are skipped."""

    def __init__(self, backbone: Backbone, *given: Any) -> None:
        super().__init__(backbone, *given)
        self._at = END
        self._decisions = [self._recorder.record(partial(self._decide, at)) for at in range(len(backbone.points))]

    def begin_some(self, inputs: Tensor, prices: Tensor, rows: Tensor) -> State:
        """Do `Steps.begin_some` without a recording, since the rows part."""
        return self._backbone.begin(inputs, self.walk, rows)

    def holds(self, states: Collection[State]) -> bool:
        """Do `Steps.holds`; rows that have parted go on without a recording."""
        return all(state.walk is self.walk and state.together and state.point == self._at for state in states)

    def advance(self, states: Collection[State], actions: Tensor) -> list[State]:
        """Do `Steps.advance`."""
        at, pieces = self._at, self._pieces
        self._actions.copy_(actions)
        self._decisions[at]()
        pieces.go_on_together(at)
        return [self._stand(at + 1 if at + 1 < len(self._decisions) else END)]

    def _decide(self, point: int) -> None:
        with self._recorder.counts():
            self._pieces.decide(self._pieces.state(point), self._actions)

    def _stand(self, point: int) -> State:
        self._at = point
        return self._pieces.state(point)


class Apart(Steps):
    """In these steps, rows stand at different points, because some exit and begin anew while others go on.

    States have no features: these lie where graphs expect them.
    """

    def __init__(self, backbone: Backbone, inputs: Tensor, *given: Any) -> None:
        self._at = torch.full((len(inputs),), END, device=inputs.device)  # the point at which each slot stands
        super().__init__(backbone, inputs, *given)
        self._size = len(inputs)
        self._told = Told(inputs.device, self._size + len(backbone.points) + 3)  # what `decide_apart` returns
        self._replay = self._recorder.record(self._decide)

    def begin_some(self, inputs: Tensor, prices: Tensor, rows: Tensor) -> State:
        """Do `Steps.begin_some`."""
        self._inputs[rows], self._prices[rows] = inputs, prices
        if len(rows):
            self._pieces.begin_anew(rows)
        return State(self.walk, 0, rows)

    def holds(self, states: Collection[State]) -> bool:
        """Do `Steps.holds`."""
        return all(state.walk is self.walk for state in states)

    def advance(self, states: Collection[State], actions: Tensor) -> list[State]:
        """Do `Steps.advance`. A state at END has its rows on the host, too: `held` [n] int64."""
        self._actions.copy_(actions)
        self._replay()
        self._told.sent()
        walk, told, points = self.walk, self._told.read(), len(self._backbone.points)
        bounds = told[self._size :].tolist()
        for point, (begin, end) in enumerate(pairwise(bounds[: points + 1])):
            if begin < end:
                self._pieces.go_on(point, end - begin)
        here, there = told[: self._size].clone(), self._told.there.clone()  # the next decisions will overwrite them
        going = [there[begin:end] for begin, end in pairwise(bounds[:points])]
        ended = slice(bounds[points - 1], bounds[points + 1])  # behind the last point, or because they have stopped
        reached = [State(walk, point, rows) for point, rows in enumerate(going, 1)]
        return [*reached, State(walk, END, there[ended], held=here[ended])]

    def _stand(self, point: int) -> State:
        return State(self.walk, point, self.walk.all_rows)

    def _decide(self) -> None:
        with self._recorder.counts():
            order, bounds = self._pieces.decide_apart(self._at, self._actions)
            # Rows that stop have arrived; others will be seen somewhere else.
            self._arrived(self._pieces, self._pieces.state(END))
            self._told.there.copy_(torch.cat([order, bounds]))
            self._told.send()

    def _arrived(self, pieces: Pieces, state: State) -> None:
        super()._arrived(pieces, state)
        self._at.index_fill_(0, state.rows, state.point)


def steps_for(backbone: Backbone, inputs: object, see: See, table: CostTable | None) -> Steps | None:
    """Return the steps of a batch like `inputs`; None where nothing can be recorded, which runs as it is."""
    kind = Apart if backbone.speaks else Together
    if not records(inputs) or "pieces" not in backbone.captures or (kind is Apart and backbone.may_close):
        return None
    assert isinstance(inputs, Tensor)
    try:
        return kind(backbone, inputs, recorder_for(inputs), see, table)
    except Exception as error:  # a user's block may do what cannot be recorded; memory may be short
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"environments run without CUDA graphs: {why}", stacklevel=2)
        return None
