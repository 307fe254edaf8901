"""The contract between a dynamic network and whoever decides its routes.

A backbone is a walk through decision points (`dynrl.backbones.walk`). An environment walks it with an agent's actions,
a plugged model walks it with a policy's. Both run this code, so what is trained is what is deployed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.walk import END, CostTable, Point, State, Walk, merge
from dynrl.files import fingerprint, load_tensors, save_tensors
from dynrl.ops.backend import may_look
from dynrl.routes import draw_routes


def nearest_open(mask: Tensor, wanted: Tensor) -> Tensor:
    """[n, k]: for each of `wanted` [n or 1, k] the nearest choice open in `mask` [n, choices], the lower of two."""
    choices = torch.arange(mask.shape[1], device=mask.device)
    distance = (choices - wanted.unsqueeze(2)).abs()
    return distance.masked_fill(~mask.unsqueeze(1), torch.iinfo(torch.int64).max).argmin(2)


class Backbone(nn.Module):
    """A network with decision points.

    A family fills in the hooks of the first part, says the class facts, and in `__init__` sets `config` (JSON-able
    keyword arguments that rebuild it) and `input_shape` (of one input), and calls `_pose`.

    Class facts:
        family: the family's name in files and in the registry `FAMILIES`.
        decision: the decision that it poses, a name in the registry of decisions.
        scores: what `observe` shows of how sure the network is by itself: the name of each such score, its column, and
            whether more of it means surer. Thresholds on them are the field's own rules.
        rule: the rule of thumb that stands beside learned policies in reports, a name in `dynrl.evaluation.RULES`.
        speaks: whether there is an output at every point, not only at the end.
        gates: whether gates can be trained on it: a differentiable walk makes sense.
        exports: whether a plugged model can be written as a torch.export or ONNX program.
        captures: whether a plugged model can be recorded as a CUDA graph.
    """

    family: ClassVar[str]
    decision: ClassVar[str]
    scores: ClassVar[Mapping[str, tuple[int, bool]]] = {}
    rule: ClassVar[str | None] = None
    speaks: ClassVar[bool] = False
    gates: ClassVar[bool] = True
    exports: ClassVar[bool] = False
    captures: ClassVar[bool] = False

    config: dict[str, Any]
    input_shape: tuple[int, ...]
    points: tuple[Point, ...]
    full_route: tuple[int, ...]  # the dense network's choice in each column; -1 where that never goes
    feature_width: int  # numbers that `observe` shows, at the point that shows most
    num_choices: int  # of the point that has most
    max_steps: int  # decisions of the longest walk
    costs: Tensor  # [points, num_choices] int64 MACs, -1 where there is no such choice
    start_macs: int
    dense_macs: int  # of one row on the full route
    thrift: Tensor  # [columns, num_choices] float64, see `_pose`

    # for the family to write -------------------------------------------------------------------------------

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        """Run what comes before the first decision on `inputs` [n, ...] and stand at the first point."""
        raise NotImplementedError

    def _run(self, state: State, action: Tensor) -> list[State]:
        """Run each row's chosen branch, on the rows that need it only; one state per point reached.

        The choice is open, written down (`state.visit` counts it) and paid for. What a choice costs beyond the table is
        charged here by `walk.charge`. A row that ends gets its output by `walk.put_output`, here or before.
        """
        raise NotImplementedError

    def observe(self, state: State) -> Tensor:
        """[n, f] float32, f <= feature_width: a cheap summary of where each row stands. Changes nothing."""
        raise NotImplementedError

    def projector(self, weight: Tensor) -> Callable[[State, Tensor], Tensor]:
        """A function (state, start [n, k]) to `start` + `observe(state)` @ `weight`, as fast as it can be.

        Args:
            weight: [feature_width, k], of a policy whose first layer is linear in the features.
        """

        def project(state: State, start: Tensor) -> Tensor:
            features = self.observe(state)
            return torch.addmm(start, features, weight[: features.shape[1]])

        return project

    def _gated_run(self, state: State, gates: Tensor) -> State:
        """`_run` for all rows at once, each choice computed and weighted by its gate; differentiable.

        At one-hot gates this gives what `_run` gives. Where rows may end, `walk.leave(gates, choice)` lets those that
        take `choice` go with the output they have; a loop ends where `state.visit` has reached the point's visits.
        Where ways part and meet, the family sets `walk.weight` and `walk.present` to who is at the point it returns.
        What a choice costs beyond the table is charged by `walk.charge_gates`.

        Args:
            state: every row of a `GatedWalk`, in order.
            gates: [B, point's n], 0 for closed choices; taken and paid for, as in `_run`.
        """
        raise NotImplementedError

    def open_choices(self, state: State) -> Tensor | None:
        """[n, point's n] bool: the choices that are open; None where all are."""
        return None

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Any]:
        """What walking `route` would cost at best: a function that runs the same layers on as many rows.

        The decisions are known and the rows already lie together: no router, no gather, no scatter. What the function
        computes is meaningless; only the time that it takes counts.

        Args:
            inputs: [B, *input_shape].
            route: [B, columns], what ran, -1 where a row has not been.
        """
        raise NotImplementedError

    def dense_twins(self, inputs: Tensor) -> dict[str, Callable[[], Any]]:
        """Other ways to compute the full route on `inputs`, by name: a vendor's layer, say. They are timed as dense."""
        return {}

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """The outputs whose losses pretraining adds up, each backpropagated before the next is computed.

        Here there is one: the output of random routes. A family whose choices need other training writes its own.

        Args:
            inputs: [B, *input_shape].
            rate: [B] in [0, 1], from the cheapest choices to the dearest, see `draw_routes`; None for the full route
                only.
            generator: what routes are drawn by.

        Yields:
            [k * B, ...]: k outputs of each input from one pass, batch after batch.
        """
        yield self(inputs, None if rate is None else draw_routes(self.thrift, rate, generator))

    def for_inference(self) -> Self:
        """A frozen copy that computes the same faster (batch norm folded, say)."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    def _pose(
        self,
        points: Sequence[Point],
        *,
        costs: Sequence[Sequence[int]],
        start_macs: int,
        full_route: Sequence[int],
        feature_width: int,
        thrift: Sequence[Sequence[float]] | None = None,
        max_steps: int | None = None,
        charged_macs: int = 0,
    ) -> None:
        """Say which decisions the network poses.

        Args:
            points: in an order in which rows meet them; loops come back.
            costs: for each point the MACs of each choice, the fixed parts that a row then passes included.
            start_macs: what every row pays before its first decision, or whatever it decides.
            full_route: the dense network's choice in each column (one for each visit of each point); -1 in a column
                where the dense network never goes.
            feature_width: the most numbers that `observe` shows.
            thrift: for each point how dear each choice is in the long run, where that is another order than `costs`: a
                choice may cost now what it saves later. Random routes draw by it.
            max_steps: decisions of the longest walk, where that is less than all columns.
            charged_macs: what the full route is charged beyond `costs` (`walk.charge`).
        """
        self.points, self.full_route, self.feature_width = tuple(points), tuple(full_route), feature_width
        self.num_choices = max(point.n for point in points)
        self.max_steps = max_steps or self.columns
        assert len(self.full_route) == self.columns and len(costs) == len(points), "a choice a column, costs a point"
        self.register_buffer("costs", self._table(costs).long(), persistent=False)
        self.thrift = self.column_costs.double() if thrift is None else self._table(thrift)[self.column_point]
        self.start_macs = start_macs
        full = zip(self.column_point.tolist(), self.full_route, strict=True)
        self.dense_macs = start_macs + charged_macs + sum(costs[point][choice] for point, choice in full if choice >= 0)

    def _table(self, rows: Sequence[Sequence[float]]) -> Tensor:
        """[points, num_choices] float64, -1 where `rows` (a row a point) are shorter."""
        table = torch.full((len(self.points), self.num_choices), -1.0, dtype=torch.float64)
        for point, row in enumerate(rows):
            table[point, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return table

    # what it poses -----------------------------------------------------------------------------------------

    @property
    def columns(self) -> int:
        """How many columns a route has: one for each visit that a row may pay to a point."""
        return sum(point.visits for point in self.points)

    @property
    def column_point(self) -> Tensor:
        """[columns] int64: whose visit each column of a route is, in the order of the points."""
        return torch.arange(len(self.points)).repeat_interleave(torch.tensor([p.visits for p in self.points]))

    @property
    def column_costs(self) -> Tensor:
        """[columns, num_choices] int64 on the CPU: what each choice costs at each column's point; -1: there is none."""
        return self.costs.cpu()[self.column_point]

    @property
    def mac_table(self) -> CostTable:
        """What walks are charged by default."""
        return CostTable(self.start_macs, self.costs, self.dense_macs)

    def time_table(self, times: Mapping[str, Any]) -> CostTable:
        """What walks are charged by times measured on one machine, in milliseconds.

        Args:
            times: {"start": milliseconds before the first decision, "choices": those of each choice at each point}, as
                `dynrl.evaluation.step_times` measures them.

        Raises:
            ValueError: `times` are not one finite number of at least 0 for each choice at each point, more than 0 at
                the start.
        """
        counts = [point.n for point in self.points]
        try:
            start, rows = float(times["start"]), [[float(ms) for ms in row] for row in times["choices"]]
            fits = set(times) == {"start", "choices"} and [len(row) for row in rows] == counts
        except (TypeError, ValueError, KeyError):
            fits = False
        if not fits:
            raise ValueError(f"expected times 'start' and 'choices', those of {counts} choices, got {times}")
        if not 0 < start < math.inf or not all(0 <= ms < math.inf for row in rows for ms in row):
            raise ValueError(
                f"expected times of at least 0 milliseconds, and more before the first choice, got {times}"
            )
        full = [*zip(self.column_point.tolist(), self.full_route, strict=True)]
        timed = start + sum(rows[point][choice] for point, choice in full if choice >= 0)
        counted = self.start_macs + sum(int(self.costs[point, choice]) for point, choice in full if choice >= 0)
        # What the full route is charged beyond the tables takes as long for each MAC as what is in them.
        return CostTable(start, self._table(rows).float().to(self.costs.device), timed * self.dense_macs / counted)

    @property
    def may_close(self) -> bool:
        """Whether some choice is closed somewhere."""
        fewer = any(point.n < self.num_choices for point in self.points)
        return fewer or type(self).open_choices is not Backbone.open_choices

    def dense_actions(self, size: int, device: torch.device | str = "cpu") -> Tensor:
        """[size, columns]: the full route, for every row; any choice where that never goes."""
        return torch.tensor(self.full_route, device=device).clamp_min(0).expand(size, -1)

    # the walk ----------------------------------------------------------------------------------------------

    def check_inputs(self, inputs: Tensor) -> None:
        """Refuse, with a ValueError, what would fail later or pass on NaN in silence."""
        if not isinstance(inputs, Tensor) or tuple(inputs.shape[1:]) != self.input_shape:
            got = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"expected inputs of shape [batch, {', '.join(map(str, self.input_shape))}], got {got}")
        if len(inputs) == 0:
            raise ValueError("expected at least one input, got an empty batch")
        weights = next(self.parameters()).dtype
        if inputs.dtype != weights:
            raise ValueError(f"expected inputs of {weights}, got {inputs.dtype}; convert them with .to({weights})")
        # A sum is NaN or infinite if any element is, and takes far less time than isfinite().all().
        if inputs.is_floating_point() and not torch.isfinite(inputs.sum(dtype=torch.float32)):
            raise ValueError("the inputs hold NaN or infinity; clean them first")

    def begin(
        self,
        inputs: Tensor,
        walk: Walk | None = None,
        rows: Tensor | None = None,
        table: CostTable | None = None,
    ) -> State:
        """Put inputs at the first decision point.

        Args:
            inputs: [n, *input_shape].
            walk: refill slots of this walk instead of starting a new one of n slots.
            rows: [n], which slots to refill.
            table: what a new walk charges (`time_table`); None: MACs.
        """
        if walk is None:
            walk = Walk(inputs, self.points, self.mac_table, table)
            rows = walk.all_rows
        else:
            assert rows is not None
            walk.refill(rows, inputs)
        walk.begin(rows)
        return self._start(walk, rows, inputs)

    def advance(self, state: State, action: Tensor) -> list[State]:
        """Run the chosen branches and return one state per point reached; `state` is used up.

        Args:
            state: rows at one point.
            action: [n] int64 in 0 ... n_choices-1. A closed choice is run, charged and written down as the
                nearest open one (the lower of two equally near).
        """
        mask = self.open_choices(state)
        if mask is not None:
            action = nearest_open(mask, action.unsqueeze(1)).squeeze(1)
        elif self.points[state.point].n < self.num_choices:
            action = action.clamp_max(self.points[state.point].n - 1)
        state.walk.decided(state, action)
        return self._run(state, action)

    def output(self, state: State) -> Tensor:
        """[n, ...]: what the network says of the state's rows; defined at END, and at every point if it `speaks`."""
        outputs = state.walk.outputs
        assert outputs is not None, "no row of this walk has an output yet"
        return state.get(outputs)

    def run(self, inputs: Tensor, choose: Callable[[State], Tensor]) -> Walk:
        """Walk all rows from begin to END, asking `choose(state) -> [n] int64` at every point."""
        state = self.begin(inputs)
        walk = state.walk
        pending = {state.point: state}
        while pending:
            # The earliest point first: rows that reach a later point by different branches then merge there.
            state = pending.pop(min(pending))
            reached = [state for state in self.advance(state, choose(state)) if state.point != END]
            if pending or len(reached) > 1:
                pending = merge([*pending.values(), *reached])
            else:
                pending = {state.point: state for state in reached}
        return walk

    def gated(self, inputs: Tensor, choose: Callable[[State], Tensor]) -> GatedWalk:
        """Walk all rows through all choices, each weighted by its gate; differentiable. What gates are trained on.

        Args:
            inputs: [B, *input_shape].
            choose: from a state that holds every row to float gates [B, num_choices], which sum to 1 in each row; asked
                at every point in turn. A sight may be asked what it sees of that state. The weight of a closed choice
                goes to the nearest open one.

        Returns:
            the walk: `outputs`, `expected_macs`, and what the likeliest choices were (`route`, `steps`, `macs`): at
            one-hot gates all that `run` gives.
        """
        walk = GatedWalk(inputs, self.points, self.mac_table)
        walk.begin(walk.all_rows)
        state = self._start(walk, walk.all_rows, inputs)
        while not state.ended:
            gates = choose(state)
            if tuple(gates.shape) != (len(inputs), self.num_choices):
                raise ValueError(f"expected gates of shape {(len(inputs), self.num_choices)}, got {tuple(gates.shape)}")
            gates = self._open_gates(state, gates)
            walk.take(state, gates)
            state = self._gated_run(state, gates)
        walk.finish()
        return walk

    def _open_gates(self, state: State, gates: Tensor) -> Tensor:
        """[B, point's n]: `gates` [B, num_choices] with the weight of closed choices moved as `advance` moves rows."""
        mask, count = self.open_choices(state), self.points[state.point].n
        choices = torch.arange(self.num_choices, device=gates.device).unsqueeze(0)
        if mask is not None:
            target = nearest_open(mask, choices)
        elif count < self.num_choices:
            target = choices.clamp_max(count - 1).expand(len(gates), -1)
        else:
            return gates
        return gates.new_zeros(len(gates), count).scatter_add(1, target, gates)

    def forward(self, inputs: Tensor, route: Tensor | None = None) -> Tensor:
        """The whole walk at once.

        Args:
            inputs: [B, *input_shape].
            route: None for the dense network; integer actions [B, columns], computed on the rows that need it only; or
                float gates [B, columns, num_choices], each choice's weight in each column: everything is computed and
                weighted, differentiable in the gates, equal to the actions at one-hot gates.

        Returns:
            [B, ...], the outputs.
        """
        if route is None:
            route = self.dense_actions(len(inputs), inputs.device)
        if route.is_floating_point():
            expected = (len(inputs), self.columns, self.num_choices)
            if tuple(route.shape) != expected:
                raise ValueError(f"expected gates of shape {expected}, got {tuple(route.shape)}")
            return self.gated(inputs, lambda state: state.along(route)).outputs  # type: ignore[return-value]
        return self.run_route(inputs, route).outputs  # type: ignore[return-value]

    def run_route(self, inputs: Tensor, route: Tensor) -> Walk:
        """`forward` with integer actions, returning the whole walk (outputs, MACs, what ran)."""
        expected = (inputs.shape[0], self.columns)
        if tuple(route.shape) != expected or route.is_floating_point():
            raise ValueError(f"expected integer actions of shape {expected}, got {route.dtype} {tuple(route.shape)}")
        if may_look() and len(route) and not 0 <= int(route.min()) <= int(route.max()) < self.num_choices:
            raise ValueError(
                f"expected actions in 0..{self.num_choices - 1}, got {int(route.min())}..{int(route.max())}"
            )
        route = route.to(inputs.device, torch.int64)
        return self.run(inputs, lambda state: state.along(route))

    # files -------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Identifies weights and shape; a policy file carries that of the backbone it was trained for."""
        return fingerprint(self.state_dict(), [self.family, self.config])

    def save(self, path: str | Path, **notes: Any) -> None:
        """Write weights, config and `notes` (JSON-able: data, accuracies ...) to a safetensors file."""
        metadata = {"family": self.family, "config": self.config, "notes": notes}
        save_tensors(path, "backbone", self.state_dict(), metadata)


def read_backbone_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata of a file written by `Backbone.save`."""
    return load_tensors(path, "backbone")
