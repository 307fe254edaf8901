"""The walk: the one contract between a dynamic network and whoever decides its routes.

A backbone is a walk through decision points. An environment walks it with an agent's actions, a plugged
model walks it with a policy's; both run this code, so what is trained is what is deployed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from dynrl.files import fingerprint, load_tensors, save_tensors
from dynrl.ops.backend import small_steps_by_kernels
from dynrl.routes import draw_routes

END = -1  # the point at which finished rows stand


@dataclass(frozen=True)
class Point:
    """A place where one of `n` choices is made. A row passes it once, or up to `visits` times: a loop."""

    name: str
    n: int
    visits: int = 1


class Walk:
    """B slots: what belongs to a row for good, addressed by `State.rows`. It never moves while features are compacted.

    Attributes:
        inputs: [B, ...], what each row was given.
        steps: [B] int64, decisions taken so far.
        macs: [B] int64, MACs spent so far, router excluded.
        route: [B, T] int64, what was run at each step, -1 where nothing has been decided (yet).
        last: [B] int64, 1 + the last choice, 0 before the first.
        outputs: [B, ...] once some row has an output, else None.
        own: name to [B, ...], what a family keeps for each slot beside that; 0 where a slot is refilled.
        all_rows: [B] int64, 0 ... B-1. A state whose `rows` is this very tensor holds every slot in order, and all its
            rows have taken `common_steps` decisions, a host int; of a gated walk, how often gates have been taken.

    A gated walk (`Backbone.gated`) takes every row everywhere and weights what it computes. The fields above then
    follow each row along its likeliest choices, and there are also:

    Attributes:
        weight: [B] float32, differentiable, the share of each row that is still walking.
        present: [B] bool, whether the row's likeliest choices have led it where the walk stands.
        expected_macs: [B] float32, differentiable, the MACs of all choices taken by their gates.
    """

    weight: Tensor
    present: Tensor
    expected_macs: Tensor
    _left: Tensor | None  # of a gated walk: what has left it, the sum of weight x output

    def __init__(self, inputs: Tensor, max_steps: int) -> None:
        size, device = inputs.shape[0], inputs.device  # len() would make a traced size a constant
        self.inputs = inputs
        self.all_rows = torch.arange(size, device=device)
        self.steps = torch.zeros(size, dtype=torch.int64, device=device)
        self.macs = torch.zeros(size, dtype=torch.int64, device=device)
        self.route = torch.full((size, max_steps), -1, dtype=torch.int64, device=device)
        self.last = torch.zeros(size, dtype=torch.int64, device=device)
        self.outputs: Tensor | None = None
        self.own: dict[str, Tensor] = {}
        self.common_steps = 0

    def __len__(self) -> int:
        return self.all_rows.shape[0]

    def copy(self) -> Walk:
        """A walk of its own, sharing nothing that changes."""
        twin = copy.copy(self)
        twin.steps, twin.macs, twin.route = self.steps.clone(), self.macs.clone(), self.route.clone()
        twin.inputs, twin.last = self.inputs.clone(), self.last.clone()
        twin.outputs = None if self.outputs is None else self.outputs.clone()
        twin.own = {name: value.clone() for name, value in self.own.items()}
        return twin

    def refill(self, rows: Tensor, inputs: Tensor) -> None:
        """Give the slots `rows` new inputs, as if they had never walked."""
        self.inputs[rows] = inputs
        self.steps[rows] = 0
        self.macs[rows] = 0
        self.route[rows] = -1
        self.last[rows] = 0
        for value in self.own.values():
            value[rows] = 0

    def at(self, field: Tensor, rows: Tensor) -> Tensor:
        """`field[rows]`, without the copy where `rows` is every slot in order."""
        return field if rows is self.all_rows else field[rows]

    def charge(self, rows: Tensor, macs: Tensor | int) -> None:
        """Add `macs` (one number, or [n]) to the bill of `rows`."""
        if rows is self.all_rows:
            self.macs += macs
        else:
            self.macs[rows] += macs

    def decided(self, rows: Tensor, action: Tensor, costs: Tensor) -> None:
        """Write down that `rows` took `action` [n], count the step, and charge what it `costs` [choices]."""
        if rows is self.all_rows:
            if small_steps_by_kernels(action):
                from dynrl.ops.kernels.decide import record

                record(action.contiguous(), costs, self.route, self.steps, self.last, self.macs)
            else:
                self.route[:, self.common_steps] = action
                self.steps += 1
                self.last = action + 1
                self.macs += costs.index_select(0, action)
            self.common_steps += 1
        else:
            self.route[rows, self.steps[rows]] = action
            self.steps[rows] += 1
            self.last[rows] = action + 1
            self.macs[rows] += costs.index_select(0, action)

    def put_output(self, rows: Tensor, value: Tensor) -> None:
        """Set the output of `rows` to `value` [n, ...]; differentiable."""
        if rows is self.all_rows:
            self.outputs = value
            return
        if self.outputs is None:
            self.outputs = value.new_zeros(len(self), *value.shape[1:])
        # Writing in place would break the graph of outputs written before, or change a tensor handed out already.
        self.outputs = self.outputs.index_copy(0, rows, value.to(self.outputs.dtype))

    # gated walks -------------------------------------------------------------------------------------------

    def take_all(self) -> None:
        """Become a gated walk, at its begin; other walks pay nothing for what is made here."""
        self._left = None
        self.weight = torch.ones(len(self), device=self.all_rows.device)
        self.present = torch.ones_like(self.all_rows, dtype=torch.bool)
        self.expected_macs = self.macs.float()

    def take_gates(self, gates: Tensor, costs: Tensor) -> None:
        """Write down the likeliest choice of the rows present, and charge `costs` [n] by `gates` [B, n]."""
        action = gates.argmax(1)
        # Rows elsewhere have nothing written yet at the step that `follow` gave them.
        taken = torch.where(self.present, action, -1)
        self.route = self.route.scatter(1, self.steps.unsqueeze(1), taken.unsqueeze(1))
        self.last = torch.where(self.present, action + 1, self.last)
        self.macs = self.macs + costs[action] * self.present
        self.expected_macs = self.expected_macs + self.weight * (gates.float() * costs).sum(1)
        self.steps = self.steps + 1
        self.common_steps += 1

    def leave(self, gates: Tensor, choice: int) -> None:
        """Let the share of each row that takes `choice` by `gates` [B, n] end, with the output it has now."""
        share = gates[:, choice]
        part = self._weighted_output(self.weight * share)
        self._left = part if self._left is None else self._left + part
        self.weight = self.weight * (1 - share)
        self.present = self.present & (gates.argmax(1) != choice)

    def follow(self) -> None:
        """Count each row's own steps, and give rows elsewhere the walk's: their gates have a weight all the same."""
        own, most = (self.route >= 0).sum(1), self.route.shape[1] - 1
        self.steps = torch.where(self.present, own, min(self.common_steps, most))

    def finish(self) -> None:
        """End a gated walk: what has not left has the last output."""
        if self._left is not None:
            self.outputs = self._left + self._weighted_output(self.weight)
        self.steps = (self.route >= 0).sum(1)

    def _weighted_output(self, weight: Tensor) -> Tensor:
        assert self.outputs is not None, "a row leaves with the output it has: put it first"
        return weight.to(self.outputs.dtype).view(-1, *[1] * (self.outputs.dim() - 1)) * self.outputs


@dataclass
class State:
    """Rows of a walk that stand at one point.

    Attributes:
        walk, point, rows: whose, where, and which slots [n].
        features: [n, ...], the backbone's own; None at END.
        seen: what `observe` finds in these features, where a backbone knows that without another look; else None.
    """

    walk: Walk
    point: int
    rows: Tensor
    features: Tensor | None
    seen: Tensor | None = None

    @property
    def count(self) -> int:
        """How many rows stand here."""
        return self.rows.shape[0]  # len() would make a traced size a constant

    def copy(self) -> State:
        """Branch off: a state on a walk of its own. The only way to advance from one state twice."""
        walk = self.walk.copy()
        rows = walk.all_rows if self.rows is self.walk.all_rows else self.rows.clone()
        return State(walk, self.point, rows, None if self.features is None else self.features.clone())

    def where(self, chosen: Tensor, point: int) -> State:
        """The rows for which `chosen` [n] bool holds, standing at `point`."""
        features = None if self.features is None else self.features[chosen]
        return State(self.walk, point, self.rows[chosen], features)

    def along(self, route: Tensor) -> Tensor:
        """[n], the next action of each row in `route` [B, max_steps]."""
        walk, rows = self.walk, self.rows
        return route[:, walk.common_steps] if rows is walk.all_rows else route[rows, walk.steps[rows]]


def merge(states: list[State]) -> dict[int, State]:
    """Join states of one walk that stand at the same point; empty ones vanish. The result is keyed by point."""
    merged: dict[int, State] = {}
    for state in states:
        if state.count == 0:
            continue
        if state.point not in merged:
            merged[state.point] = state
            continue
        other = merged[state.point]
        assert other.walk is state.walk, "states of different walks cannot merge"
        features = None if state.features is None else torch.cat([other.features, state.features])  # type: ignore[list-item]
        merged[state.point] = replace(other, rows=torch.cat([other.rows, state.rows]), features=features, seen=None)
    return merged


def nearest_open(mask: Tensor, wanted: Tensor) -> Tensor:
    """[n, k]: for each of `wanted` [n or 1, k] the nearest choice open in `mask` [n, choices], the lower of two."""
    choices = torch.arange(mask.shape[1], device=mask.device)
    distance = (choices - wanted.unsqueeze(2)).abs()
    return distance.masked_fill(~mask.unsqueeze(1), torch.iinfo(torch.int64).max).argmin(2)


def choice_rates(points: Sequence[Point], route: Tensor) -> dict[str, float]:
    """How often each choice but 0 was taken at each point, over all its visits.

    The rates go by the point's name, and `/choice` behind it where there are more than two choices.

    Args:
        points: a backbone's.
        route: [B, columns], what ran, -1 where a row never was.
    """
    rates = {}
    for point, taken in zip(points, route.split([point.visits for point in points], 1), strict=True):
        for choice in range(1, point.n):
            tag = point.name if point.n == 2 else f"{point.name}/{choice}"
            rates[tag] = float((taken == choice).sum() / (taken >= 0).sum().clamp_min(1))
    return rates


class Backbone(nn.Module):
    """A network with decision points. A family fills in the hooks of the first part.

    A family sets, in `__init__`: `config` (JSON-able keyword arguments that rebuild it), `input_shape` (of one
    input), `points`, `feature_width` (of the widest point), `max_steps` (decisions of the longest walk),
    `full_route` ([max_steps], the actions of the dense network), and by `_set_costs`: `start_macs` (what every row
    pays before its first decision, or whatever it decides), `costs` ([points, num_choices] int64, what a row pays for
    each choice at each point, the fixed parts it then passes included; -1 where the point has no such choice) and
    `dense_macs`.
    """

    family: ClassVar[str]  # its name in files and in the registry
    decision: ClassVar[str]  # the decision it poses, a name in the registry of decisions
    scores: ClassVar[dict[str, tuple[int, bool]]] = {}  # column of `observe`, and whether more of it means surer
    rule: ClassVar[str | None] = None  # the rule of thumb that it is known for, a name in `dynrl.evaluation.RULES`
    captures: ClassVar[bool] = True  # whether a walk can be captured as a CUDA graph
    config: dict[str, Any]
    input_shape: tuple[int, ...]
    points: tuple[Point, ...]
    feature_width: int
    max_steps: int
    full_route: tuple[int, ...]
    num_choices: int  # of the point that has most
    start_macs: int
    costs: Tensor
    dense_macs: int  # of one row on the full route

    # for the family to write -------------------------------------------------------------------------------

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        """Run what comes before the first decision on `inputs` [n, ...] and stand at the first point."""
        raise NotImplementedError

    def _run(self, state: State, action: Tensor) -> list[State]:
        """Run each row's chosen branch, on the rows that need it only; one state per point reached.

        The choice is open, written down (`walk.steps` counts it) and paid for. A row that ends gets its output by
        `walk.put_output`, here or before.
        """
        raise NotImplementedError

    def observe(self, state: State) -> Tensor:
        """[n, f] float32, f <= feature_width: a cheap summary of where each row stands. Changes nothing."""
        raise NotImplementedError

    def project(self, state: State, weight: Tensor, start: Tensor) -> Tensor:
        """[n, k]: `start` [n, k] + `observe(state)` @ `weight` [feature_width, k]: what is linear in the features.

        Without what `foreknown(weight)` gives.
        """
        features = self.observe(state)
        return torch.addmm(start, features, weight[: features.shape[1]])

    def foreknown(self, weight: Tensor) -> Tensor | None:
        """[max_steps, k], the part of `observe(state)` @ `weight` that hangs on the step alone; None: there is none."""
        return None

    def _gated_run(self, state: State, gates: Tensor) -> State:
        """`_run` for all rows at once, each choice computed and weighted by its gate; differentiable.

        At one-hot gates it gives what `_run` gives. Where rows may end, `walk.leave(gates, choice)` lets those that
        take `choice` go with the output they have; a loop ends where `walk.common_steps == max_steps`. Where ways part
        and meet, it sets `walk.weight` and `walk.present` to who is at the point that it returns.

        Args:
            state: every row of the walk, in order.
            gates: [B, point's n], 0 for closed choices; taken and paid for, as in `_run`.
        """
        raise NotImplementedError

    def open_choices(self, state: State) -> Tensor | None:
        """[n, point's n] bool: the choices that are open; None where all are."""
        return None

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Any]:
        """What walking `route` would cost at best: a function that runs the same layers on as many rows.

        The decisions are known and the rows already lie together: no router, no gather, no scatter. What it computes
        is meaningless; only the time it takes is.

        Args:
            inputs: [B, *input_shape].
            route: [B, max_steps], what ran: the full route or `Walk.route`, -1 from a row's end on.
        """
        raise NotImplementedError

    def dense_twins(self, inputs: Tensor) -> dict[str, Callable[[], Any]]:
        """Other ways to compute the full route on `inputs`, by name: a vendor's layer, say. Timed beside `ideal`."""
        return {}

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """The outputs whose losses pretraining adds up, each backpropagated before the next is computed.

        Here one: that of random routes. A family whose choices need other training says so by its own.

        Args:
            inputs: [B, *input_shape].
            rate: [B] in [0, 1], from the cheapest choices to the dearest, see `draw_routes`; None for the full route
                only.
            generator: of what is drawn.

        Yields:
            [k * B, ...]: k outputs of each input from one pass, batch after batch.
        """
        yield self(inputs, None if rate is None else draw_routes(self.column_costs, rate, generator))

    def for_inference(self) -> Self:
        """A frozen copy that computes the same faster (batch norm folded, say)."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    def _set_costs(self, start_macs: int, costs: Sequence[Sequence[int]]) -> None:
        """Set `num_choices`, `start_macs`, `costs` (a row a point, of as many as it has choices) and `dense_macs`.

        `points`, `max_steps` and `full_route` stand already; the full route is at point t at step t, or stays at the
        last point.
        """
        self.num_choices = max(point.n for point in self.points)
        table = torch.full((len(self.points), self.num_choices), -1)
        for point, row in enumerate(costs):
            table[point, : len(row)] = torch.tensor(row)
        self.start_macs = start_macs
        self.register_buffer("costs", table, persistent=False)
        last = len(self.points) - 1
        self.dense_macs = start_macs + sum(costs[min(t, last)][choice] for t, choice in enumerate(self.full_route))

    # the walk ----------------------------------------------------------------------------------------------

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
    def thrift(self) -> Tensor:
        """[columns, num_choices]: how dear each choice is in the long run; -1: there is none."""
        return self.column_costs

    @property
    def may_close(self) -> bool:
        """Whether some choice is closed somewhere."""
        fewer = any(point.n < self.num_choices for point in self.points)
        return fewer or type(self).open_choices is not Backbone.open_choices

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
        # A sum is NaN or infinite if any element is, at a tenth of the time of isfinite().all().
        if inputs.is_floating_point() and not torch.isfinite(inputs.sum(dtype=torch.float32)):
            raise ValueError("the inputs hold NaN or infinity; clean them first")

    def begin(self, inputs: Tensor, walk: Walk | None = None, rows: Tensor | None = None) -> State:
        """Put inputs at the first decision point.

        Args:
            inputs: [n, *input_shape].
            walk: refill slots of this walk instead of starting a new one of n slots.
            rows: [n], which slots to refill.
        """
        if walk is None:
            walk = Walk(inputs, self.max_steps)
            rows = walk.all_rows
        else:
            assert rows is not None
            walk.refill(rows, inputs)
        walk.charge(rows, self.start_macs)
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
        state.walk.decided(state.rows, action, self.costs[state.point])
        return self._run(state, action)

    def output(self, state: State) -> Tensor:
        """[n, ...]: what the network says of the state's rows; defined at END."""
        outputs = state.walk.outputs
        assert outputs is not None, "no row of this walk has an output yet"
        return state.walk.at(outputs, state.rows)

    def run(self, inputs: Tensor, choose: Callable[[State], Tensor]) -> Walk:
        """Walk all rows from begin to END, asking `choose(state) -> [n] int64` at every point."""
        state = self.begin(inputs)
        walk = state.walk
        pending = {state.point: state}
        while pending:
            # The earliest point first: rows that reach a later point by different branches then merge there.
            state = pending.pop(min(pending))
            reached = self.advance(state, choose(state))
            if pending or len(reached) > 1:
                pending = merge([*pending.values(), *reached])
            else:
                pending = {reached[0].point: reached[0]}
            pending.pop(END, None)
        return walk

    def gated(self, inputs: Tensor, choose: Callable[[State], Tensor]) -> Walk:
        """Walk all rows through all choices, each weighted by its gate; differentiable. What gates are trained on.

        Args:
            inputs: [B, *input_shape].
            choose: from a state that holds every row to float gates [B, num_choices], which sum to 1 in each row; asked
                at every point in turn. `observation` may be called on that state. The weight of a closed choice
                goes to the nearest open one.

        Returns:
            the walk: `outputs`, `expected_macs`, and what the likeliest choices were (`route`, `steps`, `macs`): at
            one-hot gates all that `run` gives.
        """
        state = self.begin(inputs)
        walk = state.walk
        walk.take_all()
        while state.point != END:
            gates = choose(state)
            if tuple(gates.shape) != (len(inputs), self.num_choices):
                raise ValueError(f"expected gates of shape {(len(inputs), self.num_choices)}, got {tuple(gates.shape)}")
            gates = self._open_gates(state, gates)
            walk.take_gates(gates, self.costs[state.point, : gates.shape[1]])
            state = self._gated_run(state, gates)
            walk.follow()
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
            route: None for the dense network; integer actions [B, max_steps], computed on the rows that need it
                only; or float gates [B, max_steps, num_choices], each choice's weight at each step: everything is
                computed and weighted, differentiable in the gates, equal to the actions at one-hot gates.

        Returns:
            [B, ...], the outputs.
        """
        if route is None:
            route = self.dense_actions(len(inputs), inputs.device)
        if route.is_floating_point():
            expected = (len(inputs), self.max_steps, self.num_choices)
            if tuple(route.shape) != expected:
                raise ValueError(f"expected gates of shape {expected}, got {tuple(route.shape)}")
            every = torch.arange(len(inputs), device=inputs.device)
            return self.gated(inputs, lambda state: route[every, state.walk.steps]).outputs  # type: ignore[return-value]
        return self.run_route(inputs, route).outputs  # type: ignore[return-value]

    def run_route(self, inputs: Tensor, route: Tensor) -> Walk:
        """`forward` with integer actions, returning the whole walk (outputs, MACs, what ran)."""
        expected = (inputs.shape[0], self.max_steps)
        if tuple(route.shape) != expected or route.is_floating_point():
            raise ValueError(f"expected integer actions of shape {expected}, got {route.dtype} {tuple(route.shape)}")
        if is_compiling():
            pass  # a tracer cannot look at values
        elif len(route) and not 0 <= int(route.min()) <= int(route.max()) < self.num_choices:
            raise ValueError(
                f"expected actions in 0..{self.num_choices - 1}, got {int(route.min())}..{int(route.max())}"
            )
        route = route.to(inputs.device, torch.int64)
        return self.run(inputs, lambda state: state.along(route))

    def dense_actions(self, size: int, device: torch.device | str = "cpu") -> Tensor:
        """[size, max_steps]: the full route, for every row."""
        return torch.tensor(self.full_route, device=device).expand(size, -1)

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
