"""A backbone is the contract between a dynamic network and whatever decides its routes.

A backbone is walked through its decision points (`dynrl.backbones.walk`). An environment walks it with an agent's
actions, a routed model with a policy's. Both run this code, so what is trained is what is deployed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.walk import END, CostTable, Point, State, Walk, merge
from dynrl.files import fingerprint, save_tensors
from dynrl.inputs import Form, as_inputs
from dynrl.ops.backend import may_look
from dynrl.provenance import Provenance, Standard
from dynrl.routes import draw_routes
from dynrl.schema import check_counts

OUT_OF_REACH = 2**62  # more MACs than any walk costs

Parts = list[list[int]]  # parts of an image, each [top, left, height, width] in pixels; or of a text, in words


def nearest_open(mask: Tensor, wanted: Tensor) -> Tensor:
    """Return the open choice of `mask` [n, choices] nearest to each of `wanted` [n or 1, k]: [n, k], lower first."""
    choices = torch.arange(mask.shape[1], device=mask.device)
    distance = (choices - wanted.unsqueeze(2)).abs()
    return distance.masked_fill(~mask.unsqueeze(1), torch.iinfo(torch.int64).max).argmin(2)


@dataclass(frozen=True)
class Answer:
    """An answer is an output of some rows of a batch, to be trained on.

    Attributes:
        output: [n, ...], of the form of the network's output.
        rows: [n] int64, the rows of the batch.
        weight: the weight of its loss.
    """

    output: Tensor
    rows: Tensor
    weight: float = 1.0


class Backbone(nn.Module):
    """A backbone is a network with decision points.

    A family writes the methods of the first part and states the class facts. Its `__init__` sets `config` (the keyword
    arguments that rebuild it, as JSON can hold them) and `input_shape` (the shape of one input), and calls `_pose`.

    Class facts:
        family: the family's name in files and in the registry `FAMILIES`.
        decision: the decision that the family poses, a name in `dynrl.envs.DECISIONS`.
        scores: the columns of `observe` that say how sure the network is: name -> (column, whether higher means surer).
            Rules of thumb put thresholds on these scores.
        rule: the rule of thumb that reports compare learned policies with, a name in `dynrl.evaluation.RULES`.
        stops: the choice that ends a walk wherever it is taken; None if there is none.
        speaks: whether there is an output at every point, not only at the end.
        hindsight: whether pretraining counts each row's best answer only, since a policy will stop there; if not, it
            adds up the losses of all answers.
        auxiliary_weight: the weight in training of the answers of `auxiliary`, at all points together, where that of
            outputs is 1.
        gates: whether gates can be trained on the family, so that a differentiable walk makes sense.
        exports: whether a routed model can be written as a torch.export or ONNX program.
        captures: the ways in which points can run where what a routed model runs is recorded as CUDA graphs, names in
            `dynrl.deploy.graphs.WAYS`.
        budgets: the shares of the dense MACs at which reports ask.

    Attributes:
        why: why a network of yours runs as it is, held at its parts, and is not exported; else empty.
    """

    family: ClassVar[str]
    decision: ClassVar[str]
    scores: ClassVar[Mapping[str, tuple[int, bool]]] = {}
    rule: ClassVar[str | None] = None
    stops: ClassVar[int | None] = None
    speaks: ClassVar[bool] = False
    hindsight: ClassVar[bool] = False
    auxiliary_weight: ClassVar[float] = 1.0
    gates: ClassVar[bool] = True
    exports: ClassVar[bool] = False
    why: str = ""
    captures: ClassVar[tuple[str, ...]] = ()
    budgets: ClassVar[tuple[float, ...]] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

    config: dict[str, Any]
    input_shape: Any  # a tuple of sizes; name -> such a tuple if inputs are several tensors
    input_dtype: str | dict[str, str | None] | None = None  # the type of inputs, by name; None: that of the weights
    input_name: str = "inputs"  # what exported programs call the inputs
    points: tuple[Point, ...]
    full_route: tuple[int, ...]  # the dense network's choice in each column; -1 in columns that it never visits
    feature_width: int  # the most numbers that `observe` shows at any point
    suggested: int = 0  # how many of the features, the last ones, are log-odds of as many choices (see `observe`)
    num_choices: int  # the most choices that any point has
    max_steps: int  # the number of decisions of the longest walk
    costs: Tensor  # [points, num_choices] int64 MACs, -1 where there is no such choice
    start_macs: int
    dense_macs: int  # the MACs of one row on the full route
    trained_on: Provenance | None = None  # the data that the weights were trained on; None if they were not
    standard: Standard | None = None  # of weights from elsewhere: what they want inputs to be standardised by
    thrift: Tensor  # [columns, num_choices] float64: how dear each choice is in the long run

    # for the family to write -------------------------------------------------------------------------------

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        """Run what comes before the first decision on `inputs` [n, ...] and stand at the first point."""
        raise NotImplementedError

    def _run(self, state: State, action: Tensor) -> list[State]:
        """Run each row's chosen branch, only on the rows that chose it, and return one state for each point reached.

        The choice is open, is already recorded (`state.visit` counts it) and paid for. This method charges what a
        choice costs beyond the table, by `walk.charge`. A row that ends gets its output by `walk.put_output`, here or
        before.
        """
        raise NotImplementedError

    def _run_rows(self, state: State, index: Tensor) -> State:
        """Do `_run` where the host knows how many rows take choice 1, and return the state of those that go on.

        A family whose rows end (0) or go on (1) at each point writes it if it can be recorded in pieces. Nothing may
        wait for the device. Rows that have ended are left where they are.

        Args:
            state: rows at one point, whose choices are recorded and paid for.
            index: [k] int64, the places in `state` of the rows that take choice 1; some may be there more than once.
        """
        raise NotImplementedError

    def _run_block(self, state: State, index: Tensor) -> Any:
        """Run a block on the rows `index` of a state, and return the features of all rows; the block may change them.

        A family whose rows run a block (1) or do not (0) writes this and `_run_rest`, in the place of `_run_rows`. It
        may be called for some of the rows that run first, and for the others then.
        """
        raise NotImplementedError

    def _run_rest(self, state: State) -> State:
        """Go on from behind the block of a point, where the features of `state` are, and return the state reached."""
        raise NotImplementedError

    def observe(self, state: State) -> Tensor:
        """Return a cheap summary of each row at this point, [n, f] float32 with f <= feature_width; change nothing.

        It is asked for at END, too: an environment shows an ended row until its reset.

        A backbone may have an opinion of many choices. Then the last `suggested` features are its log-odds of as many
        choices, the last ones, and an untrained policy draws by them. Without it, a policy of a hundred choices would
        have to find the few good ones of each input by chance.
        """
        raise NotImplementedError

    def projector(self, weight: Tensor) -> Callable[[State, Tensor], Tensor]:
        """Return a function from (state, start [n, k]) to `start` + `observe(state)` @ `weight`.

        A policy whose first layer is linear asks for it: `start` is what its other inputs add up to. A family that can
        compute the sum without writing its features down first has its own. A point that shows fewer features than
        `feature_width` takes the first rows of `weight`.

        Args:
            weight: [feature_width, k], the weight of that layer.
        """

        def project(state: State, start: Tensor) -> Tensor:
            features = self.observe(state)
            return torch.addmm(start, features, weight[: features.shape[1]])

        return project

    def _gated_run(self, state: State, gates: Tensor) -> State:
        """Do `_run` for all rows at once, with each choice computed and weighted by its gate; differentiable.

        At one-hot gates, the result is that of `_run`. Where rows may end, `walk.leave(gates, choice)` lets those that
        take `choice` leave with their present output. A loop ends where `state.visit` has reached the point's visits.
        Where ways part and meet, the family sets `walk.weight` and `walk.present` for the point that it returns. What a
        choice costs beyond the table is charged by `walk.charge_gates`.

        Args:
            state: all rows of a `GatedWalk`, in order.
            gates: [B, choices of the point], the choices' weights, 0 for closed ones; recorded and paid for already.
        """
        raise NotImplementedError

    def open_choices(self, state: State) -> Tensor | None:
        """Return which choices are open, [rows, choices of the point] bool; None stands for all of them."""
        return None

    def leads_to(self, column: int, choice: int) -> int:
        """Return the column of the decision that a row comes to by `choice` in `column`; END if it ends.

        Here it is the next column, or END for the choice that `stops`. A family in which rows part writes its own. The
        cheapest way from each column to an end must never be closed, because a limit on what a row may spend counts on
        it.
        """
        return column + 1 if choice != self.stops and column + 1 < self.columns else END

    def waiting(self, state: State) -> Tensor | None:
        """Return how many decisions wait behind each choice on ways that `leads_to` does not tell of; None if none do.

        Only a family in which a row walks several ways one after the other has some. They are [n, choices of the point]
        int64.
        """
        return None

    def surcharge(self, column: int, choice: int) -> int:
        """Return the most MACs that `choice` in `column` is charged beyond the table (`walk.charge`)."""
        return 0

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Any]:
        """Return a function that takes the least time for `route`: it runs the same layers on as many rows.

        The decisions are known, and the rows are already sorted: there is no router, no gather and no scatter. So what
        tells where rows go is left out, although walks are charged for it: the scorers of tokens and cells (and the
        weights that they give), the routers of nodes, and what a last layer says for routers only. All other layers
        run on exactly as many rows, tokens or cells. What the function computes is meaningless; only its time counts.

        Args:
            inputs: [B, *input_shape].
            route: [B, columns], what ran; -1 where a row never was.
        """
        raise NotImplementedError

    def whole(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the full route; a family that can compute them without a walk has its own."""
        return self(inputs)

    @property
    def whole_macs(self) -> int:
        """The MACs of `whole` for one row; a family whose `whole` leaves out parts of the full route has its own."""
        return self.dense_macs

    def constant_routes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return routes for all inputs alike that reports show beside others, whatever the budget: names and routes.

        Here they make the same choice everywhere, from the last to the first, if there are more than two choices.
        """
        kinds = range(self.num_choices) if self.num_choices > 2 else range(0)
        return [("uniform", (choice,) * self.columns) for choice in reversed(kinds)]

    @classmethod
    def joined(cls, backbones: Sequence[Backbone]) -> Self:
        """Return one backbone that is made of several trained ones, for a family that chooses between networks."""
        raise ValueError(f"expected one folder with a backbone of {cls.decision!r}, got {len(backbones)}")

    def dense_twins(self, inputs: Tensor) -> dict[str, Callable[[], Any]]:
        """Return other ways to compute the full route on `inputs`, by name, such as a vendor's layer; all are timed."""
        return {}

    def regions(self, inputs: Tensor, route: Tensor) -> list[list[Parts]]:
        """Return the parts of its input that each row ran or looked at along `route` [B, columns], for reports to draw.

        Each row has a list for each of its decisions, in turn. A part is [top, left, height, width] in pixels; of a
        text, a line of words. Here there is none: most networks see all of their input.
        """
        return [[] for _ in range(len(inputs))]

    def ready(self, state: State) -> State:
        """Return a copied `state` after all that it has to do before it can go on; what follows may then be timed."""
        return state

    def by_chance(self) -> Self | None:
        """Return a copy in which chance chooses which parts of an input run, as many; None if no part is chosen.

        It is for networks that choose this themselves, where the decision is how many.
        """
        return None

    def auxiliary(self, state: State) -> Tensor | None:
        """Return what is said of the rows at this point beside the walk, [n, ...] like an output; None if nothing is.

        It is trained with the network, so that `observe` can show it, or rows may end with it.
        """
        return None

    def run_training(self, inputs: Tensor, choose: Callable[[State], Tensor]) -> tuple[Walk, list[Answer]]:
        """Do `run`, and return the walk with all answers to train on: its outputs, and `auxiliary` ones.

        The auxiliary answers at all points together weigh `auxiliary_weight` times as much as the outputs do.
        """
        answers: list[Answer] = []

        def listen(state: State) -> Tensor:
            said = self.auxiliary(state)
            if said is not None:
                answers.append(Answer(said, state.rows, self.auxiliary_weight / len(self.points)))
            return choose(state)

        walk = self.run(inputs, listen)
        assert walk.outputs is not None
        return walk, [Answer(walk.outputs, walk.all_rows), *answers]

    def open_up(self) -> None:
        """Prepare the plain network's weights for random routes, in place, before they are trained; here, do nothing.

        A family in whose plain network some parts never run may give these the weights of others that do.
        """

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield, pass by pass, the answers whose losses pretraining adds up; a pass is backpropagated before the next.

        Here there is one pass, of random routes. A family whose choices need other training writes its own.

        Args:
            inputs: [B, *input_shape].
            rate: [B] in [0, 1], from the cheapest choices to the dearest (`draw_routes`); None takes the full route.
            generator: the source of the draws of routes.

        Yields:
            the answers of one pass.
        """
        if rate is None:
            yield [Answer(self(inputs), torch.arange(len(inputs), device=inputs.device))]
            return
        route = draw_routes(self.thrift, rate, generator).to(inputs.device)
        yield self.run_training(inputs, lambda state: state.along(route))[1]

    def lengthen(self, max_steps: int) -> None:
        """Let walks take up to `max_steps` decisions, more than the network was trained for.

        Raises:
            ValueError: the family has no loop that may go on, or was trained for more.
        """
        raise ValueError(
            f"a walk through {type(self).__name__} takes at most {self.max_steps} decisions; only a network with a "
            "loop that may go on takes more"
        )

    def for_inference(self) -> Self:
        """Return a frozen copy that computes the same faster, for example with batch norm folded."""
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
        """State which decisions the network poses.

        Args:
            points: the points, in an order in which rows meet them; loops return to a point.
            costs: for each point, the MACs of each choice, including the fixed parts that a row then passes; -1 where
                there is no such choice.
            start_macs: the MACs that every row pays, whatever it decides; they are charged before the first decision.
            full_route: the dense network's choice in each column (one for each visit of each point); -1 in columns that
                the dense network never visits.
            feature_width: the most numbers that `observe` shows.
            thrift: for each point, how dear each choice is in the long run, if this order differs from that of `costs`:
                a choice may cost now what it saves later. Random routes draw by it.
            max_steps: the number of decisions of the longest walk, if that is less than all columns.
            charged_macs: the MACs that the full route is charged beyond `costs` (`walk.charge`).

        Raises:
            ValueError: costs are no whole numbers of at least 0, or a list has another length than the points ask for.
        """
        self.points, self.num_choices = tuple(points), max(point.n for point in points)
        counts = [point.n for point in points]
        for what, rows in (("costs", costs), ("thrift", costs if thrift is None else thrift)):
            if (given := [len(row) for row in rows]) != counts:
                raise ValueError(
                    f"{what}: expected a row for each point, a number for each choice, {counts}, got rows of {given}"
                )
        for point, row in zip(points, costs, strict=True):
            check_counts(f"the costs of {point.name!r}", row, -1, OUT_OF_REACH)
        check_counts("start_macs and charged_macs", (start_macs, charged_macs), 0, OUT_OF_REACH)
        self.start_macs, self.feature_width = start_macs, feature_width
        self.full_route = tuple(full_route)
        choices = [counts[point] for point in self.column_point.tolist()]
        if len(self.full_route) != self.columns or not all(
            -1 <= choice < n for choice, n in zip(self.full_route, choices, strict=True)
        ):
            raise ValueError(
                f"full_route: expected a choice for each column (one for each visit of each point), of {choices} "
                f"choices, or -1 where the dense network never is, got {self.full_route}"
            )
        self.max_steps = self.columns if max_steps is None else max_steps
        if not 1 <= self.max_steps <= self.columns:
            raise ValueError(f"max_steps: expected 1 to {self.columns}, the number of columns, got {max_steps}")
        self.register_buffer("costs", self._table(costs).long(), persistent=False)
        self.thrift = self.column_costs.double() if thrift is None else self._table(thrift)[self.column_point]
        full = zip(self.column_point.tolist(), self.full_route, strict=True)
        dense = [costs[point][choice] for point, choice in full if choice >= 0]
        self.dense_macs = self.start_macs + charged_macs + sum(dense)
        if -1 in dense or not self.dense_macs:
            raise ValueError(
                f"full_route: expected choices that there are, and some MACs, as other routes cost shares of them, got "
                f"choices of {dense} MACs and {self.start_macs} at the start"
            )

    def _table(self, rows: Sequence[Sequence[float]]) -> Tensor:
        """Return `rows`, one a point, as [points, num_choices] float64, with -1 where a row is shorter."""
        table = torch.full((len(self.points), self.num_choices), -1.0, dtype=torch.float64)
        for point, row in enumerate(rows):
            table[point, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return table

    # what it poses -----------------------------------------------------------------------------------------

    @property
    def columns(self) -> int:
        """The number of columns of a route, one for each visit that a row may make to a point."""
        return sum(point.visits for point in self.points)

    @property
    def column_point(self) -> Tensor:
        """The point that each column of a route belongs to, in the order of the points: [columns] int64."""
        return torch.arange(len(self.points)).repeat_interleave(torch.tensor([p.visits for p in self.points]))

    @property
    def column_costs(self) -> Tensor:
        """The cost of each choice in each column, [columns, num_choices] int64 on the CPU; -1 for no such choice."""
        return self.costs.cpu()[self.column_point]

    def least_macs(self, look: int = 0) -> Tensor:
        """Return what each choice and the cheapest way from there to an end cost: [columns, num_choices] int64.

        The table is on the CPU, and holds `OUT_OF_REACH` where there is no such choice.

        Args:
            look: the MACs that each decision costs in addition.

        Raises:
            ValueError: the family charges more than its table holds, and does not say how much.
        """
        costs = [
            [
                cost + look + self.surcharge(column, choice) if cost >= 0 else OUT_OF_REACH
                for choice, cost in enumerate(row)
            ]
            for column, row in enumerate(self.column_costs.tolist())
        ]
        full = sum(costs[column][choice] - look for column, choice in enumerate(self.full_route) if choice >= 0)
        if self.start_macs + full != self.dense_macs:
            raise ValueError(
                f"{type(self).__name__} charges MACs beyond its table and does not say how many: its `surcharge` adds "
                f"up to a dense network of {self.start_macs + full:,} MACs, expected {self.dense_macs:,}"
            )
        least, found = list[list[int]](), [[OUT_OF_REACH] * len(row) for row in costs]
        # Columns mostly lead to later ones, so one pass from the last to the first is enough, and the next finds no
        # change. Where points take turns in a loop, there are more passes.
        while found != least:
            least = [list(row) for row in found]
            for column in reversed(range(self.columns)):
                for choice, cost in enumerate(costs[column]):
                    if cost == OUT_OF_REACH:
                        continue
                    after = self.leads_to(column, choice)
                    found[column][choice] = min(OUT_OF_REACH, cost + (0 if after == END else min(found[after])))
        return torch.tensor(least)

    @property
    def mac_table(self) -> CostTable:
        """The cost table that walks are charged by default."""
        return CostTable(self.start_macs, self.costs, self.dense_macs)

    def time_table(self, times: Mapping[str, Any]) -> CostTable:
        """Return a cost table of times measured on one machine, in milliseconds.

        Args:
            times: {"start": milliseconds before the first decision, "choices": the milliseconds of each choice at each
                point}, as `dynrl.evaluation.step_times` measures them.

        Raises:
            ValueError: `times` is not one finite number of at least 0 for each choice at each point, and more than 0 at
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
        """Whether any choice may be closed at any point."""
        fewer = any(point.n < self.num_choices for point in self.points)
        return fewer or type(self).open_choices is not Backbone.open_choices

    def dense_actions(self, size: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the full route for each of `size` rows, [size, columns], with choice 0 in columns it never visits."""
        return torch.tensor(self.full_route, device=device).clamp_min(0).expand(size, -1)

    @property
    def form(self) -> Form:
        """What one input is."""
        return Form(self.input_shape, self.input_dtype)

    # the walk ----------------------------------------------------------------------------------------------

    def check_inputs(self, inputs: Any) -> None:
        """Refuse, with a ValueError, inputs that would fail later or silently pass on NaN."""
        self.form.check(as_inputs(inputs), next(self.parameters()).dtype)

    def random_inputs(self, rows: int, generator: torch.Generator | None = None) -> Any:
        """Return inputs [rows, *input_shape] of random numbers, of the type that the network takes; integers are 1."""
        if self.form.dtype is not None or self.form.named:
            return self.form.example(rows, next(self.parameters()))
        return torch.randn(rows, *self.input_shape, generator=generator, dtype=next(self.parameters()).dtype)

    def begin(
        self,
        inputs: Any,
        walk: Walk | None = None,
        rows: Tensor | None = None,
        table: CostTable | None = None,
    ) -> State:
        """Put inputs at the first decision point and return their state.

        Args:
            inputs: [n, *input_shape], or several tensors by name if `input_shape` is by name.
            walk: a walk whose slots are refilled; None starts a new walk of n slots.
            rows: [n] int64, the slots to refill.
            table: the cost table of a new walk (see `time_table`); None charges MACs. `walk` keeps its own.
        """
        inputs = as_inputs(inputs)
        if walk is None:
            walk = Walk(inputs, self.points, self.mac_table, table)
            rows = walk.all_rows
        else:
            assert rows is not None
            walk.refill(rows, inputs)
        walk.begin(rows)
        return self._start(walk, rows, inputs)

    def advance(self, state: State, action: Tensor) -> list[State]:
        """Run the chosen branches and return one state for each point reached; `state` must not be used again.

        Args:
            state: rows at one point.
            action: [n] int64 in 0 ... num_choices - 1. In place of a closed choice, the nearest open one is run,
                charged and recorded (the lower of two equally near ones).
        """
        return self._run(state, self.take(state, action))

    def take(self, state: State, action: Tensor) -> Tensor:
        """Record and charge the choices that `advance` would run, and return them: [n] int64."""
        mask = self.open_choices(state)
        if mask is not None:
            action = nearest_open(mask, action.unsqueeze(1)).squeeze(1)
        elif self.points[state.point].n < self.num_choices:
            action = action.clamp_max(self.points[state.point].n - 1)
        state.walk.decided(state, action)
        return action

    def output(self, state: State) -> Tensor:
        """Return the outputs [n, ...] of the state's rows; there is one at END, and at every point if it `speaks`."""
        outputs = state.walk.outputs
        assert outputs is not None, "no row of this walk has an output yet"
        return state.get(outputs)

    def run(self, inputs: Any, choose: Callable[[State], Tensor]) -> Walk:
        """Walk all rows from the beginning to END, asking `choose(state) -> [n] int64` at every point."""
        state = self.begin(inputs)
        walk = state.walk
        pending = {state.point: state}
        while pending:
            # The earliest point comes first, so that rows that reach a later point by different branches merge there.
            state = pending.pop(min(pending))
            reached = [state for state in self.advance(state, choose(state)) if state.point != END]
            if pending or len(reached) > 1:
                pending = merge([*pending.values(), *reached])
            else:
                pending = {state.point: state for state in reached}
        return walk

    def gated(self, inputs: Any, choose: Callable[[State], Tensor]) -> GatedWalk:
        """Walk all rows through all choices, each weighted by its gate; differentiable, so that gates can be trained.

        Args:
            inputs: [B, *input_shape].
            choose: a function from a state that holds every row to float gates [B, num_choices], which sum to 1 in each
                row; it is called at every point in turn, and may ask a sight what it sees of the state. The weight of a
                closed choice goes to the nearest open one.

        Returns:
            the walk, with `outputs`, `expected_macs`, and what the likeliest choices give (`route`, `steps`, `macs`).
            At one-hot gates, all of this equals what `run` gives.
        """
        inputs = as_inputs(inputs)
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
        """Move the weights of closed choices in `gates` [B, num_choices] to the nearest open ones."""
        mask, count = self.open_choices(state), self.points[state.point].n
        choices = torch.arange(self.num_choices, device=gates.device).unsqueeze(0)
        if mask is not None:
            target = nearest_open(mask, choices)
        elif count < self.num_choices:
            target = choices.clamp_max(count - 1).expand(len(gates), -1)
        else:
            return gates
        return gates.new_zeros(len(gates), count).scatter_add(1, target, gates)

    def forward(self, inputs: Any, route: Tensor | None = None) -> Tensor:
        """Return the outputs of a whole walk.

        Args:
            inputs: [B, *input_shape].
            route: None for the dense network. Integer actions [B, columns] compute each choice only on the rows that
                take it. Float gates [B, columns, num_choices] compute everything and weight each choice in each column;
                this is differentiable in the gates, and equal to the actions at one-hot gates.

        Returns:
            [B, ...], the outputs.
        """
        inputs = as_inputs(inputs)
        if route is None:
            route = self.dense_actions(len(inputs), inputs.device)
        if route.is_floating_point():
            expected = (len(inputs), self.columns, self.num_choices)
            if tuple(route.shape) != expected:
                raise ValueError(f"expected gates of shape {expected}, got {tuple(route.shape)}")
            return self.gated(inputs, lambda state: state.along(route)).outputs  # type: ignore[return-value]
        return self.run_route(inputs, route).outputs  # type: ignore[return-value]

    def run_route(self, inputs: Any, route: Tensor) -> Walk:
        """Do `forward` with integer actions, and return the whole walk: outputs, MACs and what ran."""
        inputs = as_inputs(inputs)
        expected = (inputs.shape[0], self.columns)
        if tuple(route.shape) != expected or route.is_floating_point():
            raise ValueError(f"expected integer actions of shape {expected}, got {route.dtype} {tuple(route.shape)}")
        if may_look() and len(route) and not 0 <= int(route.min()) <= int(route.max()) < self.num_choices:
            raise ValueError(
                f"expected actions in 0..{self.num_choices - 1}, got {int(route.min())}..{int(route.max())}"
            )
        route = route.to(inputs.device, torch.int64)
        return self.run(inputs, lambda state: state.along(route))

    # data --------------------------------------------------------------------------------------------------

    def standardised_by(self, standard: Any) -> Self:
        """Say what inputs are standardised by for weights that were trained elsewhere, and return this backbone.

        Without a word, inputs are standardised by the mean and the deviation of the data that a policy learns on. Only
        these two are taken: what else a recipe does, such as resizing, is for the data set.

        Args:
            standard: what `dynrl.provenance.Standard.of` takes: a mean and a deviation, or an object that has them. The
                pair (0, 1) leaves inputs as the data set gives them.

        Raises:
            ValueError: it is something else, it is for another number of channels, or the backbone was trained by dynrl
                and knows its standard.
        """
        if self.trained_on is not None:
            raise ValueError(
                f"this backbone was trained on {self.trained_on.data}, which says what inputs are standardised by; "
                "leave the standard out"
            )
        found = Standard.of(standard)
        found.check(self.input_shape)
        if self.form.named:
            raise ValueError("inputs by name are handed on as they are; standardise them in the data set")
        self.standard = found
        return self

    @property
    def known(self) -> Provenance | Standard | None:
        """What is known of the inputs that the weights are for (`Dataset.seen_by`)."""
        return self.trained_on or self.standard

    # files -------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Return a digest of weights and shape; a policy file holds that of the backbone it was trained for."""
        return fingerprint(self.state_dict(), [self.family, self.config])

    def save(self, path: str | Path, **notes: Any) -> None:
        """Write weights, config, what they were trained on, and `notes` (accuracies and so on, as JSON) to a file."""
        if self.trained_on is not None:
            notes["trained_on"] = self.trained_on.to_dict()
        elif self.standard is not None:
            notes["standard"] = asdict(self.standard)
        metadata = {"family": self.family, "config": self.config, "notes": notes}
        save_tensors(path, "backbone", self.state_dict(), metadata)
