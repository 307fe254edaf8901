"""In these recurrent networks, each row decides at each step how much of its hidden state it updates, if any."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dynrl.backbones.base import Answer, Backbone
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.ops.gated_cell import gated_cell, gated_cell_macs, gated_cell_ref, leading_units
from dynrl.ops.routed_linear import column_major
from dynrl.schema import MOST_ROWS, check_count, check_counts, check_one_of

SEES = ("state", "state+input")
MOST_TIMES = 4_000_000  # the numbers of the table that tells the time


def _hats(steps: int, knots: int) -> Tensor:
    """Return hat functions on evenly spaced knots at each step: [steps, knots]."""
    at = torch.arange(steps, dtype=torch.float32) * ((knots - 1) / max(1, steps - 1))
    return (1 - (at.unsqueeze(1) - torch.arange(knots)).abs()).clamp_min(0)


def weights_of(rnn: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights and biases of one of torch's recurrent layers of one layer and direction, as ops take them."""
    return rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0


class Recurrent(Backbone):
    """A network around one of torch's recurrent layers of one layer and direction, whose cell runs for some rows."""

    _frozen = False
    layer: type[nn.GRU] | type[nn.LSTM]  # torch's layer, which defines parameters and their names
    name: str  # the name of the layer in the state_dict

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self._frozen:
            self._lay_out(Tensor.contiguous)  # torch flattens them on CUDA, and takes no other memory order
        super()._apply(fn, recurse)
        if self._frozen:
            self._lay_out(column_major)
        return self

    def for_inference(self) -> Self:
        """Return a frozen copy whose weights have the memory order that is fastest for few rows."""
        twin = super().for_inference()
        twin._frozen = True
        twin._lay_out(column_major)
        return twin

    def _lay_out(self, order: Callable[[Tensor], Tensor]) -> None:
        for rnn in self.modules():
            if isinstance(rnn, nn.RNNBase):
                for weight in weights_of(rnn)[:2]:
                    weight.data = order(weight.data)

    @property
    def rnn(self) -> Any:
        """The layer of torch."""
        return self._modules[self.name]

    @classmethod
    def _check_modules(cls, rnn: Any, head: Any) -> None:
        """Refuse, with a ValueError, a trained layer and a head that no network of this class can hold."""
        kind = cls.layer.__name__
        if type(rnn) is not cls.layer:
            raise ValueError(f"expected an nn.{kind}, got {rnn}; nn.GRU is for SkipGRU, nn.LSTM for SkipLSTM")
        if rnn.num_layers > 1 or rnn.bidirectional or not rnn.bias or rnn.proj_size:
            raise ValueError(f"expected an nn.{kind} of one layer and direction, with biases, unprojected; got {rnn}")
        if not isinstance(head, nn.Linear) or head.in_features != rnn.hidden_size or head.bias is None:
            raise ValueError(f"expected a linear head on {rnn.hidden_size} units with biases, got {head}")

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return weights_of(self.rnn)

    def whole(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the full route, by torch's own layers."""
        raise NotImplementedError

    def dense_twins(self, inputs: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Return `Backbone.dense_twins`: torch's own layers over whole sequences."""
        return {f"nn.{self.layer.__name__}": lambda: self.whole(inputs)}


class SkipRNN(Recurrent):
    """A recurrent network that reads a sequence: at each step, choice c updates the share shares[c] of a row's state.

    With the shares 0 and 1, a step is copied or updated. Any other share is the first so many units: the cell runs as
    if it had no others, so its part of both weights is read only. A linear layer reads the output off the last hidden
    state, and all rows pay for it. `SkipGRU` and `SkipLSTM` set the cell.

    Args:
        input_shape: (steps, numbers a step).
        classes: the number of outputs of the head.
        hidden: the number of hidden units.
        sees: what a policy is shown at a step: "state+input", or "state" alone, so that the input of a step that is
            copied need not even be read.
        knots: how finely a policy is told the time (see `observe`); more knots than steps have no effect.
        shares: the shares of the units that are updated, one for each choice, rising to 1.

    Sources: Skip RNN (Campos et al. 2018, ICLR), whose gate sees the state. Variable computation in recurrent networks
    (Jernite et al. 2017, ICLR): a part of the state, where a unit never reads those behind its part.
    """

    _time: Tensor  # [steps, knots]
    _bands: Tensor  # [choices - 1], the units that a choice updates and the one below does not
    decision = "hidden-update"
    captures: ClassVar[tuple[str, ...]] = ("kernels",)

    def __init__(
        self,
        input_shape: tuple[int, int],
        classes: int = 10,
        hidden: int = 128,
        sees: str = "state",
        knots: int = 16,
        shares: tuple[float, ...] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if len(input_shape) != 2:
            raise ValueError(f"expected inputs of shape (steps, numbers a step), got {tuple(input_shape)}")
        check_one_of("sees", sees, SEES)
        if knots < 1:
            raise ValueError(f"expected at least one knot, got {knots}")
        check_counts("input_shape", input_shape)
        for count, value in (("classes", classes), ("hidden", hidden), ("knots", knots)):
            check_count(count, value, 1, MOST_ROWS)
        if input_shape[0] * min(knots, input_shape[0]) > MOST_TIMES:
            raise ValueError(
                f"expected at most {MOST_TIMES:,} steps times knots, got {input_shape[0]:,} steps and {knots:,} knots"
            )
        self.widths = tuple(math.ceil(share * hidden) for share in shares)
        rising = all(less < more for less, more in pairwise((-1, *self.widths)))
        if len(shares) < 2 or not rising or self.widths[-1] != hidden:
            raise ValueError(
                f"expected two shares or more, each of more of the {hidden} units, the last of all; got "
                f"{tuple(shares)}: {self.widths} units"
            )
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "hidden": hidden, "sees": sees, "knots": knots,
            "shares": [float(share) for share in shares],
        }  # fmt: skip
        steps, width = input_shape
        self.sees_input = sees == "state+input"
        self.hidden = hidden
        rnn = self.layer(width, hidden, batch_first=True)
        self.add_module(self.name, rnn)
        self.fc = nn.Linear(hidden, classes)
        knots = min(steps, knots)
        self.register_buffer("_time", _hats(steps, knots), persistent=False)
        self.register_buffer("_bands", torch.arange(len(shares) - 1), persistent=False)
        self._parts = None if self.widths == (0, hidden) else self.widths
        self.state_width = 2 * hidden if isinstance(rnn, nn.LSTM) else hidden
        gates = len(self.rnn.weight_hh_l0) // hidden
        self._pose(
            [Point("update", len(shares), visits=steps)],
            costs=[[gated_cell_macs(1, width, units, gates) for units in self.widths]],
            start_macs=hidden * classes,
            full_route=(len(shares) - 1,) * steps,
            feature_width=self.state_width + knots + len(self._bands) + (width if self.sees_input else 0),
        )

    @classmethod
    def from_module(cls, rnn: nn.GRU | nn.LSTM, head: nn.Linear, steps: int, **settings: Any) -> Self:
        """Build the backbone from a trained layer and the layer that reads its last hidden state.

        Args:
            rnn: an `nn.GRU` for `SkipGRU`, an `nn.LSTM` for `SkipLSTM`; it is copied.
            head: the layer that reads the last hidden state; it is copied.
            steps: the length of the sequences.
            settings: `sees`, `knots` and `shares`.

        Raises:
            ValueError: the layer is of another type, has more than one layer or direction, or the head does not fit.
        """
        cls._check_modules(rnn, head)
        backbone = cls((steps, rnn.input_size), head.out_features, rnn.hidden_size, **settings)
        backbone.rnn.load_state_dict(rnn.state_dict())
        backbone.fc.load_state_dict(head.state_dict())
        return backbone.eval().to(head.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # Observations are in float32, whatever type the weights have.
        self._time = _hats(*self._time.shape).to(self._time.device)
        return self

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        if "since" not in walk.own:  # the share of the sequence since the last update of each band
            walk.own["since"] = torch.zeros(len(walk), len(self._bands), dtype=torch.float32, device=inputs.device)
        return State(walk, 0, rows, inputs.new_zeros(inputs.shape[0], self.state_width))

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, rows, h, steps = state.walk, state.rows, state.features, state.visit
        self._tick(state, action)
        if isinstance(steps, int):
            h = gated_cell(state.get(walk.inputs[:, steps - 1]), h, action, *self._weights(), widths=self._parts)
            on = State(walk, 0, rows, h)
            return [self._end(on) if steps == self.max_steps else on]
        at = torch.add(steps - 1, rows, alpha=self.max_steps)
        h = gated_cell(walk.inputs.flatten(0, 1), h, action, *self._weights(), x_rows=at, widths=self._parts)
        on, over = State(walk, 0, rows, h), steps == self.max_steps
        ended = on.where(over, END)
        return [self._end(ended), on.where(~over, 0)] if ended.count else [on]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        walk, h, steps = state.walk, state.features, state.visit
        assert isinstance(steps, int), "a gated walk's rows are together"
        self._tick(state, gates.argmax(1))
        mixed = torch.zeros_like(h)
        for choice, (width, gate) in enumerate(zip(self.widths, gates.split(1, 1), strict=True)):
            every = torch.full_like(state.rows, choice)
            given = walk.inputs[:, steps - 1], h, every, *self._weights()
            mixed = mixed + gate * (gated_cell_ref(*given, widths=self._parts) if width else h)
        on = State(walk, 0, state.rows, mixed)
        return self._end(on) if steps == self.max_steps else on

    def _tick(self, state: State, action: Tensor) -> None:
        """Advance the time since the last update of each band."""
        since, copies = state.walk.own["since"], action.unsqueeze(1) <= self._bands
        if state.together:
            since += 1 / self.max_steps
            since *= copies
        else:
            since[state.rows] = (since[state.rows] + 1 / self.max_steps) * copies

    def _end(self, state: State) -> State:
        state.walk.put_output(state.rows, self.fc(state.features[:, : self.hidden]))
        return State(state.walk, END, state.rows)

    def observe(self, state: State) -> Tensor:
        """Return the state, the time, the share of the sequence since the last update, and maybe the step's input.

        With more shares than two, the time since the last update is told of each choice's units anew: of those that it
        updates and the choice below does not. An LSTM shows both states. The input is shown with "state+input". The
        time is told by hat functions on evenly spaced knots, at most one a step. A linear policy can then tell any part
        of the sequence from all other parts, and telling the time costs one look into a table.
        """
        steps = state.visit
        time = self._time[steps].expand(state.count, -1) if isinstance(steps, int) else self._time[steps]
        return torch.cat([state.features.float(), time, *self._aside(state)], 1)

    def _aside(self, state: State) -> list[Tensor]:
        """Return what `observe` shows in addition to the hidden state and the time."""
        since = state.get(state.walk.own["since"])
        return [since, state.along(state.walk.inputs).float()] if self.sees_input else [since]

    def projector(self, weight: Tensor) -> Callable[[State, Tensor], Tensor]:
        """Return a `Backbone.projector` without a copy of the hidden state; one product gives all times' parts."""
        size, knots = self.state_width, self._time.shape[1]
        of_state, of_rest = weight[:size], weight[size + knots :]
        of_time = self._time @ weight[size : size + knots]

        def project(state: State, start: Tensor) -> Tensor:
            scores = torch.addmm(start + of_time[state.visit], state.features.float(), of_state)
            aside = self._aside(state)
            return scores.addmm_(aside[0] if len(aside) == 1 else torch.cat(aside, 1), of_rest)

        return project

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield `Backbone.training_outputs`; without a rate, they come from torch's own layer, which is faster."""
        if rate is None:
            yield [Answer(self.whole(inputs), torch.arange(len(inputs), device=inputs.device))]
        else:
            yield from super().training_outputs(inputs, rate, generator)

    def whole(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the full route, by torch's own layer."""
        return self.fc(self.rnn(inputs)[0][:, -1])

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: the cell runs on neighbouring rows, as many as update each share at each step."""
        parts = []
        for column in route.unbind(1):
            ends = [0, *accumulate((column == choice).sum().item() for choice in range(self.num_choices))]
            parts.append([(*ends_of, width) for ends_of, width in zip(pairwise(ends), self.widths, strict=True)])

        def run() -> Tensor:
            h = inputs.new_zeros(inputs.shape[0], self.state_width)
            for step, part in enumerate(parts):
                for start, end, width in part:
                    if width and start < end:
                        leading_units(inputs[start:end, step], h[start:end], *self._weights(), width)
            return self.fc(h[:, : self.hidden])

        return run


class SkipGRU(SkipRNN):
    """A `SkipRNN` of GRU cells. The full route is `nn.GRU`: `gru` takes its state_dict of one layer and direction."""

    family, layer, name = "skip_gru", nn.GRU, "gru"


class SkipLSTM(SkipRNN):
    """A `SkipRNN` of LSTM cells: both states are updated or copied together, and both are shown to a policy.

    The full route is `nn.LSTM`: `lstm` takes its state_dict of one layer and direction.
    """

    family, layer, name = "skip_lstm", nn.LSTM, "lstm"
