"""In these networks, an upper recurrent layer is updated only at the boundaries that each row sets in its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dynrl.backbones.base import Answer
from dynrl.backbones.reader import Texts
from dynrl.backbones.recurrent import weights_of
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.ops.gated_cell import gated_cell, gated_cell_macs, recurrent_cell
from dynrl.routes import draw_routes
from dynrl.schema import MOST_ROWS, check_count


class MultiScaleRNN(Texts):
    """Two GRUs that read a text, one above the other: choice 1 sets a boundary, and the upper one is updated there.

    The lower layer reads every token. At a boundary, the upper layer reads the lower one's state; elsewhere, choice 0
    copies its state (copy and update of the paper). A linear layer reads the output off the upper state behind the last
    token. The full route sets a boundary at each token: then these are torch's two layers.

    The lower layer goes on at a boundary. In the paper it begins anew there (flush), from the upper state. Here, it
    depends on no boundary, so that in training both layers run as torch's own, the upper one on boundaries only.

    Args:
        input_shape: (length,), the number of tokens of the longest text. Inputs are token ids, int64; texts are
            followed by zeros.
        classes: the number of outputs of the head.
        tokens: the number of token ids, the padding's included.
        width: the number of numbers of an embedding.
        lower: the number of hidden units of the lower layer.
        hidden: the number of hidden units of the upper layer.

    Source: hierarchical multiscale recurrent networks (Chung et al. 2017, ICLR, section 3), where a unit of its own
    sets the boundaries, by a straight-through gradient.
    """

    family, decision, layer, name = "multi_scale_rnn", "hidden-update", nn.GRU, "upper"
    budgets = (0.15, 0.2, 0.3, 0.4, 0.5, 0.7)

    def __init__(
        self,
        input_shape: tuple[int],
        classes: int = 10,
        tokens: int = 256,
        width: int = 32,
        lower: int = 32,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        self._set_sizes(input_shape, classes, tokens, width, hidden)
        check_count("lower", lower, 1, MOST_ROWS)
        (length,) = input_shape
        self.config = {
            "input_shape": [length], "classes": classes, "tokens": tokens, "width": width, "lower": lower,
            "hidden": hidden,
        }  # fmt: skip
        self.lower, self.upper = nn.GRU(width, lower, batch_first=True), nn.GRU(lower, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, classes)
        # A decision pays for reading the token that it is taken at, so that short texts pay for their own tokens only.
        read = gated_cell_macs(1, width, lower, 3)
        self._pose(
            [Point("boundary", 2, visits=length)],
            costs=[[read, read + gated_cell_macs(1, lower, hidden, 3)]],
            start_macs=hidden * classes,
            full_route=(1,) * length,
            feature_width=lower + hidden + 2,
        )

    def _read(self, ids: Tensor, low: Tensor) -> Tensor:
        return recurrent_cell(self.embedding(ids), low, *weights_of(self.lower))

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        lengths = self.lengths(inputs)
        if rows is walk.all_rows:
            walk.own["length"] = lengths
        else:
            walk.own["length"][rows] = lengths
        zeros = self.fc.weight.new_zeros(inputs.shape[0], self.lower.hidden_size + self.hidden)
        low, up = zeros.split([self.lower.hidden_size, self.hidden], 1)
        return State(walk, 0, rows, (self._read(inputs[:, 0], low), up.clone()))

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, rows, (low, up), at = state.walk, state.rows, state.features, state.visit
        on = State(walk, 0, rows, (low, gated_cell(low, up, action, *self._weights())))
        going = at < state.get(walk.own["length"])
        over, on = on.where(~going, END), on if going.all() else on.where(going, 0)
        if over.count:
            walk.put_output(over.rows, self.fc(over.features[1]))
            over.features = None
        if on.count:
            low, up = on.features
            ids = walk.inputs[on.rows, at if isinstance(at, int) else at[going]]
            on.features = self._read(ids, low), up
        return [part for part in (over, on) if part.count]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        walk, (low, up), at = state.walk, state.features, state.visit
        assert isinstance(at, int), "a gated walk's rows are together"
        up = gates[:, 1:] * recurrent_cell(low, up, *self._weights()) + gates[:, :1] * up
        walk.put_output(state.rows, self.fc(up))
        over = torch.eq(walk.own["length"], at)
        walk.leave(torch.stack([~over, over], 1).to(gates.dtype), 1)  # type: ignore[attr-defined]
        if at == self.max_steps:
            return State(walk, END, state.rows)
        return State(walk, 0, state.rows, (self._read(walk.inputs[:, at], low), up))

    def observe(self, state: State) -> Tensor:
        """Return both states, how much of the longest text has been read, and whether the last token has been."""
        at, length = state.visit, state.get(state.walk.own["length"])
        read = torch.as_tensor(at, device=length.device).expand_as(length) + 1
        place = torch.stack([read / self.input_shape[0], (read == length).float()], 1)
        return torch.cat([*(part.float() for part in state.features), place], 1)

    def _along(self, inputs: Tensor, route: Tensor) -> Tensor:
        """Return the outputs along a route [n, length], by torch's own layers; tokens behind a text do not count."""
        place, rows = (
            torch.arange(inputs.shape[1], device=inputs.device),
            torch.arange(len(inputs), device=inputs.device),
        )
        boundaries = (route == 1) & (place < self.lengths(inputs).unsqueeze(1))
        counts = boundaries.sum(1)
        order = boundaries.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(counts.max()))]
        low = self.lower(self.embedding(inputs))[0]
        states = self.upper(low[rows.unsqueeze(1), order])[0]
        last = states[rows, (counts - 1).clamp_min(0)]
        return self.fc(torch.where((counts > 0).unsqueeze(1), last, 0))

    def whole(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the full route, by torch's own layers."""
        return self._along(inputs, self.dense_actions(len(inputs), inputs.device))

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield `Backbone.training_outputs`; a random route has a boundary at the last token, too."""
        rows = torch.arange(len(inputs), device=inputs.device)
        if rate is None:
            yield [Answer(self.whole(inputs), rows)]
            return
        route = draw_routes(self.thrift, rate, generator).to(inputs.device)
        route[rows, self.lengths(inputs) - 1] = 1
        yield [Answer(self._along(inputs, route), rows)]

    def run_training(self, inputs: Tensor, choose: Callable[[State], Tensor]) -> tuple[Walk, list[Answer]]:
        """Do `Backbone.run_training`: first the walk, in float32, and then its outputs, by torch's own layers."""
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            walk = self.run(inputs, choose)
        walk.outputs = self._along(inputs, walk.route)
        return walk, [Answer(walk.outputs, walk.all_rows)]

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each cell runs on the first rows of the batch, as many as read or update there."""
        reads, updates = (route >= 0).sum(0).tolist(), (route == 1).sum(0).tolist()

        def run() -> Tensor:
            low = self.fc.weight.new_zeros(len(inputs), self.lower.hidden_size)
            up = self.fc.weight.new_zeros(len(inputs), self.hidden)
            for step, (read, update) in enumerate(zip(reads, updates, strict=True)):
                x = self.embedding.weight[inputs[:read, step]]
                recurrent_cell(x, low[:read], *weights_of(self.lower), out=low[:read])
                recurrent_cell(low[:update], up[:update], *self._weights(), out=up[:update])
            return self.fc(up)

        return run
