"""In a walk, the rows of a batch go their ways through the decision points of a network.

A walk owns B slots. What belongs to a slot (its inputs, what it has spent, what ran, its output) never moves. Features
are compacted: a state holds those of the rows that stand at one point.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dynrl.inputs import Inputs
from dynrl.ops.move import as_rows, each, tensors_of
from dynrl.ops.record import record

END = -1  # the point at which finished rows stand
STOP, GO_ON = 0, 1  # where rows may end: with what they have, or later


@dataclass(frozen=True)
class Point:
    """A point is where one of `n` choices is made. A row passes it once, or up to `visits` times in a loop."""

    name: str
    n: int
    visits: int = 1


@dataclass(frozen=True)
class CostTable:
    """A cost table says what walks are charged: MACs, or milliseconds on one machine.

    Attributes:
        start: the cost that every row pays before its first decision.
        choices: [points, most choices], the cost of each choice at each point; -1 where there is no such choice.
        dense: the cost of the full route, `start` included.
    """

    start: float
    choices: Tensor
    dense: float


class Walk:
    """A walk has B slots, one for each row of a batch, addressed by `State.rows`.

    A route has a column for each visit that a row may make to a point, in the order of the points. A row's k-th
    decision at a point is in that point's k-th column, so chains, loops, branches and trees are one case.

    Attributes:
        inputs: [B, ...], the inputs, or several tensors by name.
        points: the backbone's points.
        route: [B, columns] int64, what ran; -1 where a row has not been.
        steps: [B] int64, the number of decisions so far.
        last: [B] int64, 1 + the last choice; 0 before the first choice.
        macs: [B] int64, the MACs spent so far, without the policy's.
        bill: [B], what the walk's cost table has charged so far; it is `macs` itself if the table is in MACs.
        table: the cost table.
        outputs: [B, ...] once some row has an output, before that None.
        own: name -> [B, ...], other values that a family keeps for each slot; refilling a slot sets them to 0.
        answer: [B, ...], the answer that a policy for whole walks gave at the beginning; None for other policies.
        all_rows: [B] int64, 0 ... B-1. A state whose `rows` is this very tensor object holds every slot in order, and
            all of these rows have gone the same way so far (`State.together`).
    """

    def __init__(
        self, inputs: Inputs, points: Sequence[Point], macs: CostTable, table: CostTable | None = None
    ) -> None:
        size, device = inputs.shape[0], inputs.device  # len() would make a traced size a constant
        self.inputs: Any = inputs
        self.points, self.table = points, table or macs
        self.all_rows = torch.arange(size, device=device)
        self.steps = torch.zeros(size, dtype=torch.int64, device=device)
        self.last = torch.zeros(size, dtype=torch.int64, device=device)
        self.macs = torch.zeros(size, dtype=torch.int64, device=device)
        self._mac_table = macs
        self._charged = None if table is None else torch.zeros(size, dtype=torch.float32, device=device)
        self.first_column, columns = [], 0
        for point in points:
            self.first_column.append(columns)
            columns += point.visits
        self.route = torch.full((size, columns), -1, dtype=torch.int64, device=device)
        # How often the rows that are together (or abreast) have been at each point; and, if rows may differ in this,
        # how often each row.
        self.visits_together = [0] * len(points)
        loops = len(points) > 1 and any(point.visits > 1 for point in points)
        self._visits = torch.zeros(size, len(points), dtype=torch.int64, device=device) if loops else None
        # With one point and no slot refilled, all rows that have not ended have been there equally often, since they
        # take each decision at the same time. So one number tells it, which traced code needs to end a loop.
        self.abreast = len(points) == 1
        self.outputs: Tensor | None = None
        self.own: dict[str, Tensor] = {}
        self.answer: Tensor | None = None

    def __len__(self) -> int:
        return self.all_rows.shape[0]

    @property
    def bill(self) -> Tensor:
        """What the walk's cost table has charged so far: [B]."""
        return self.macs if self._charged is None else self._charged

    @property
    def _ledgers(self) -> list[tuple[Tensor, CostTable]]:
        macs = [(self.macs, self._mac_table)]
        return macs if self._charged is None else [*macs, (self._charged, self.table)]

    def copy(self) -> Walk:
        """Return a copy that shares nothing that changes."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Inputs) and name != "all_rows":
                setattr(twin, name, value.clone())
        twin.visits_together = list(self.visits_together)
        twin.own = {name: value.clone() for name, value in self.own.items()}
        return twin

    def taken(self) -> Walk:
        """Return a walk whose outputs, route, steps, last choices and MACs are its own, and may be written to."""
        twin, records = copy.copy(self), (self.route, self.steps, self.last, self.macs)
        copies = [torch.empty_like(record) for record in records]
        torch._foreach_copy_(copies, records)  # in one launch
        twin.route, twin.steps, twin.last, twin.macs = copies
        twin.outputs = None if self.outputs is None else self.outputs.clone()
        return twin

    def refill(self, rows: Tensor, inputs: Inputs) -> None:
        """Give the slots `rows` new inputs, as if they had never walked."""
        self.inputs[rows] = inputs
        self.forget(rows)

    def forget(self, rows: Tensor) -> None:
        """Let the slots `rows` be as if they had never walked, with the inputs that lie there."""
        self.abreast = False
        for field in (self.steps, self.last, self.macs, self._charged, self._visits, *self.own.values()):
            if field is not None:
                field.index_fill_(0, rows, 0)
        self.route.index_fill_(0, rows, -1)

    @property
    def records(self) -> list[Tensor]:
        """What decisions write, each [B, ...]."""
        some = (self.route, self.steps, self.last, self.macs, self._charged, self._visits)
        return [written for written in some if written is not None]

    def reset(self) -> None:
        """Begin anew with the inputs that lie in `inputs` now; every tensor stays where it is, as CUDA graphs need."""
        for written in self.records:
            written.zero_()
        self.route.fill_(-1)
        self.visits_together = [0] * len(self.points)

    def visits(self, point: int) -> Tensor:
        """Return how many decisions each row has taken at `point`, which may be met more than once: [B] int64."""
        return self.steps if self._visits is None else self._visits[:, point]

    def begin(self, rows: Tensor) -> None:
        """Charge `rows` the cost before the first decision."""
        for ledger, table in self._ledgers:
            if rows is self.all_rows:
                ledger += table.start
            else:
                ledger[rows] += table.start

    def charge(self, rows: Tensor, macs: Tensor | int) -> None:
        """Add `macs`, one number or [n], to the bill of `rows`, for costs that no table can hold.

        If the table is in milliseconds, MACs are converted at the average speed of the dense network.
        """
        for ledger, table in self._ledgers:
            amount = macs if table is self._mac_table else macs * (table.dense / self._mac_table.dense)
            if rows is self.all_rows:
                ledger += amount
            else:
                ledger[rows] += amount

    def decided(self, state: State, action: Tensor) -> None:
        """Record that the rows of `state` took `action` [n], count the decision, and charge it."""
        rows, point, costs = state.rows, state.point, self._mac_table.choices[state.point]
        if rows is self.all_rows:
            # The rows are together, so one number says which visit this is.
            column = self.first_column[point] + self.visits_together[point]
            record(action, costs, self.route[:, column], self.steps, self.last, self.macs)
            self.visits_together[point] += 1
            if self._visits is not None:
                self._visits[:, point] += 1
        else:
            self.route[rows, state.column] = action
            self.visits_together[point] += self.abreast
            self.steps[rows] += 1
            self.last[rows] = action + 1
            self.macs[rows] += costs.index_select(0, action)
            if self._visits is not None:
                self._visits[rows, point] += 1
        if self._charged is not None:
            state.add(self._charged, self.table.choices[point].index_select(0, action))

    def decided_apart(self, at: Tensor, action: Tensor) -> None:
        """Do `decided` for all slots at once, each at its own point, where no point may be visited twice.

        Args:
            at: [B] int64, the point at which each slot stands; those at END decide nothing.
            action: [B] int64.
        """
        points = torch.arange(len(self.points), device=at.device)
        here, decides = at.unsqueeze(1) == points, at != END  # [B, points], as the route has a column for each point
        self.route.copy_(torch.where(here, action.unsqueeze(1), self.route))
        self.steps += decides
        self.last.copy_(torch.where(decides, action + 1, self.last))
        for ledger, table in self._ledgers:
            ledger += (table.choices.t()[action] * here).sum(1)

    def keep(self, name: str, rows: Tensor, value: Tensor) -> None:
        """Set `own[name]` of `rows` to `value` [n, ...], in its memory format; differentiable."""
        if rows is self.all_rows:
            self.own[name] = value
            return
        given, whole = as_rows(value), self.own.get(name)
        moved = given is not value
        if whole is None:
            flat = given.new_zeros(self.all_rows.shape[0], *given.shape[1:])
        else:
            flat, moved = as_rows(whole), as_rows(whole) is not whole
            given = value.permute(0, 2, 3, 1) if moved else value
        flat = flat.index_copy(0, rows, given.to(flat.dtype))
        self.own[name] = flat.permute(0, 3, 1, 2) if moved else flat

    def put_output(self, rows: Tensor, value: Tensor) -> None:
        """Set the output of `rows` to `value` [n, ...]; differentiable."""
        if rows is self.all_rows:
            self.outputs = value
            return
        if self.outputs is None:
            self.outputs = value.new_zeros(self.all_rows.shape[0], *value.shape[1:])  # len() would trace a constant
        # Writing in place would break the graph of earlier outputs, or change a tensor that a caller already has.
        self.outputs = self.outputs.index_copy(0, rows, value.to(self.outputs.dtype))


@dataclass
class State:
    """A state is the rows of a walk that stand at one point.

    Attributes:
        walk, point: the walk, and the point at which the rows stand.
        rows: [n] int64, the slots of the rows.
        features: the backbone's features, a tensor [n, ...] or a tuple of such tensors; None at END.
        held: what a family keeps to go on from this very state; a copy, a part or a merged state has None. At END, it
            may be what the host knows of `rows`: the same numbers.
    """

    walk: Walk
    point: int
    rows: Tensor
    features: Any = None
    held: Any = None

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.rows.shape[0]  # len() would make a traced size a constant

    @property
    def ended(self) -> bool:
        """Whether these rows have finished."""
        return self.point == END

    @property
    def together(self) -> bool:
        """Whether these are all slots in order, and have gone the same way so far."""
        return self.rows is self.walk.all_rows

    @property
    def visit(self) -> int | Tensor:
        """How many decisions these rows have taken at this point: one number if it is the same for all, else [n].

        While `Backbone._run` runs a decision, this decision is already counted.
        """
        if self.together or self.walk.abreast:
            return self.walk.visits_together[self.point]
        return self.walk.visits(self.point)[self.rows]

    @property
    def column(self) -> int | Tensor:
        """The route's column for the rows' next decision here: one number if it is the same for all, else [n]."""
        first = self.walk.first_column[self.point]
        return first if self.walk.points[self.point].visits == 1 else first + self.visit

    def get(self, field: Any) -> Any:
        """Return `field` [B, ...] at these rows; it is not copied if they are together."""
        return field if self.together else field[self.rows]

    def add(self, field: Tensor, amount: Tensor | int) -> None:
        """Add `amount` to `field` [B, ...] at these rows, in place."""
        if self.together:
            field += amount
        else:
            field[self.rows] += amount

    def along(self, route: Tensor) -> Tensor:
        """Return what `route` [B, columns, ...] holds for these rows' next decision: [n, ...]."""
        column = self.column
        return route[:, column] if self.together else route[self.rows, column]

    def copy(self) -> State:
        """Return a state on a copy of the walk; only this way can one state be advanced from twice."""
        walk = self.walk.copy()
        rows = walk.all_rows if self.together else self.rows.clone()
        return State(walk, self.point, rows, each(Tensor.clone, self.features))

    @property
    def written(self) -> list[Tensor]:
        """What may be overwritten where these rows go on."""
        return [*self.walk.records, *self.walk.own.values(), *tensors_of(self.features)]

    def again(self) -> State:
        """Return a state in the very tensors of this one, to go on from first, if what is `written` is put back."""
        walk = copy.copy(self.walk)
        walk.visits_together, walk.own = list(walk.visits_together), dict(walk.own)
        return replace(self, walk=walk, held=copy.copy(self.held))

    def where(self, chosen: Tensor, point: int) -> State:
        """Return the rows for which `chosen` [n] bool holds, as a state at `point`."""
        return State(self.walk, point, self.rows[chosen], each(lambda part: part[chosen], self.features))


def merge(states: Sequence[State]) -> dict[int, State]:
    """Join the states of one walk that stand at the same point; drop empty ones; return them by point."""
    merged: dict[int, State] = {}
    for state in states:
        if not is_compiling() and state.count == 0:  # traced code does not know the count
            continue
        if state.point not in merged:
            merged[state.point] = state
            continue
        other = merged[state.point]
        assert other.walk is state.walk, "states of different walks cannot merge"
        features = each(lambda *parts: torch.cat(parts), other.features, state.features)
        merged[state.point] = replace(other, rows=torch.cat([other.rows, state.rows]), features=features, held=None)
    return merged


def choice_rates(points: Sequence[Point], route: Tensor) -> dict[str, float]:
    """Return how often each choice but 0 was taken at each point, over all its visits.

    A rate's name is the point's name, followed by `/choice` if the point has more than two choices.

    Args:
        points: the points of a backbone.
        route: [B, columns], what ran; -1 where a row never was.
    """
    rates = {}
    for point, taken in zip(points, route.split([point.visits for point in points], 1), strict=True):
        for choice in range(1, point.n):
            tag = point.name if point.n == 2 else f"{point.name}/{choice}"
            rates[tag] = float((taken == choice).sum() / (taken >= 0).sum().clamp_min(1))
    return rates
