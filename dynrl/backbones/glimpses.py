"""These networks see an image by glimpses: after each look, each row decides where it looks next, if anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Answer, Backbone, Parts
from dynrl.backbones.early import SCORES
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.cost import count_macs
from dynrl.ops.crops import crops
from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.gated_cell import gated_cell_macs, recurrent_cell
from dynrl.ops.move import keep_rows
from dynrl.schema import MOST_ROWS, check_count, check_counts

STOP = 0
DULL = 0.2  # what is left of a place's attention once it was looked at
CELLS = 4  # the pixels of the small image in a window of scale 1, each way
MOST_SHARES = 2_000_000  # shares of places in windows
LEAST, FAINT = 1e-6, 1e-2  # the least weight of a window that is drawn, and the least attention that a policy is told

Features = tuple[Tensor, Tensor, Tensor]


class Glimpses(Backbone):
    """A network that looks at an image through small windows: choice 0 stops, choice i looks through window i.

    At first, each row sees its whole image, as small as a window of scale 1 would be in 4 x 4 pixels. Two convolutions
    say what may be there, and how much attention each place deserves. The attention's mean is the first state, off
    which a first answer is read.

    A look takes a window, at full resolution or at a coarser scale, all of `side` x `side` pixels. Two convolutions
    and a linear layer encode it, and a GRU takes the code and the window's place into the state. An answer stands
    after every look. Windows of one scale overlap by half. A window that was looked through is closed.

    The full route looks at everything: first through the coarsest windows side by side, then through those between
    them, and so on with finer ones, up to `looks` windows.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs of the head, from 2 on.
        side: the width and height of what a look sees, in pixels; a multiple of 4.
        scales: how many pixels of the image are one pixel of a look, each way, rising; each window fits in the image.
        looks: the most looks of a walk.
        width: the channels of the first convolution of a look; the second one has twice as many.
        hidden: the number of hidden units.

    Sources: Recurrent Models of Visual Attention (Mnih et al. 2014, NeurIPS): windows at scales, a recurrent state,
    where to look by REINFORCE. Glance and Focus (Wang et al. 2020, NeurIPS): a small image first, and the gain of each
    look as the reward.
    """

    family, decision = "glimpses", "look"
    rule = "looks"
    speaks = True
    gates = False  # the mean of two windows is none
    scores: ClassVar = {"top-1": (0, True), "margin": (1, True), "entropy": (2, False)}
    budgets = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
    corners: Tensor  # [windows, 2], the pixel at each window's upper left corner
    scale: Tensor  # [windows], each window's scale
    shares: Tensor  # [places, windows], how much of each place of the peripheral view lies in each window

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        side: int = 12,
        scales: tuple[int, ...] = (1, 2),
        looks: int = 6,
        width: int = 16,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        check_counts("scales", scales)
        for count, value in (("looks", looks), ("width", width), ("hidden", hidden)):
            check_count(count, value, 1, MOST_ROWS)
        check_count("classes", classes, 2, MOST_ROWS)
        if list(scales) != sorted(set(scales)):
            raise ValueError(f"expected scales that rise, got {tuple(scales)}")
        if len(input_shape) != 3 or side < CELLS or side % CELLS or side * scales[-1] > min(input_shape[1:]):
            raise ValueError(
                f"expected images [channels, height, width] that a window of side x scale pixels fits in, and a side "
                f"that is a multiple of {CELLS}, got {tuple(input_shape)}, {side} and scales {tuple(scales)}"
            )
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "side": side, "scales": list(scales),
            "looks": looks, "width": width, "hidden": hidden,
        }  # fmt: skip
        self.side, self.hidden, channels = side, hidden, input_shape[0]
        self.periphery = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.attention, self.lead = nn.Conv2d(width, 1, 1), nn.Linear(width, hidden)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(2 * width * (side // 4) ** 2, hidden),
        )  # fmt: skip
        self._set_windows(scales)
        windows = len(self.scale)
        self.place = nn.Embedding(windows, hidden)
        self.core = nn.GRUCell(hidden, hidden)
        self.fc = nn.Linear(hidden, classes)
        check_count("looks", looks, 1, windows)
        lead, shape = count_macs(self.periphery, (channels, *(edge // self._cell for edge in input_shape[1:])))
        places = shape[1] * shape[2]
        lead += count_macs(self.attention, shape)[0] + places * (width + windows) + width * hidden
        answer = hidden * classes
        look = count_macs(self.encoder, (channels, side, side))[0] + gated_cell_macs(1, hidden, hidden, 3) + answer
        look += places * windows  # what is left of the attention
        self._pose(
            [Point("look", 1 + windows, visits=looks)],
            costs=[[0, *[look] * windows]], start_macs=lead + answer, feature_width=SCORES + hidden + windows,
            full_route=[1 + window for window in self._sweep()[:looks]],
        )  # fmt: skip

    def _set_windows(self, scales: tuple[int, ...]) -> None:
        """Lay out the windows, from the coarsest to the finest, row by row."""
        height, width = self.input_shape[1:]
        self._cell, found = self.side // CELLS, []
        spans = [scale * self.side for scale in scales]
        count = sum(math.prod(1 - (span - edge) // (span // 2) for edge in (height, width)) for span in spans)
        places = math.prod(-(-(edge // self._cell) // 2) for edge in (height, width))
        if count * places > MOST_SHARES:  # before any of them is laid out: a file may say anything
            raise ValueError(
                f"expected at most {MOST_SHARES} windows times places of the peripheral view, got {count} x {places}; "
                "give a larger side"
            )
        for scale in reversed(scales):
            span = scale * self.side
            tops, lefts = (sorted({*range(0, edge - span, span // 2), edge - span}) for edge in (height, width))
            found += [(top, left, scale) for top in tops for left in lefts]
        windows = torch.tensor(found)
        self.register_buffer("corners", windows[:, :2], persistent=False)
        self.register_buffer("scale", windows[:, 2], persistent=False)
        rows, columns = (-(-(edge // self._cell) // 2) for edge in (height, width))  # as the second convolution has
        inside = [
            (torch.minimum(corner + span, start + 2 * self._cell) - torch.maximum(corner, start)).clamp_min(0)
            for corner, span, start in (
                (windows[:, i], windows[:, 2] * self.side, 2 * self._cell * torch.arange(count).unsqueeze(1))
                for i, count in enumerate((rows, columns))
            )
        ]
        shares = inside[0].unsqueeze(1) * inside[1].unsqueeze(0) / (2 * self._cell) ** 2
        self.register_buffer("shares", shares.flatten(0, 1), persistent=False)

    def _sweep(self) -> list[int]:
        """Return the windows in the order of the full route."""
        spans = (self.scale * self.side).unsqueeze(1)
        between = (self.corners % spans != 0).any(1).tolist()
        return sorted(range(len(between)), key=lambda window: (-int(self.scale[window]), between[window], window))

    def leads_to(self, column: int, choice: int) -> int:
        """Return `Backbone.leads_to`: stopping ends the walk."""
        return END if choice == STOP else super().leads_to(column, choice)

    def open_choices(self, state: State) -> Tensor:
        """Return `Backbone.open_choices`: a window that was looked through shows nothing new."""
        route = state.get(state.walk.route)
        taken = torch.zeros(state.count, self.num_choices, dtype=torch.bool, device=route.device)
        taken.scatter_(1, route.clamp_min(STOP), True)
        taken[:, STOP] = False
        return ~taken

    def _attended(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the peripheral view holds, [n, width, places], and the attention that each place gets."""
        seen = self.periphery(F.avg_pool2d(inputs, self._cell))
        return seen.flatten(2), self.attention(seen).flatten(1).softmax(1)

    def _periphery(self, inputs: Tensor) -> Features:
        """Return the first state [n, hidden], the attention that each place gets [n, places], and each window's."""
        seen, attention = self._attended(inputs)
        told = torch.bmm(seen, attention.unsqueeze(2)).squeeze(2)
        attention = attention.detach()
        return self.lead(told).tanh(), attention, attention @ self.shares.to(attention.dtype)

    def likelihood(self, inputs: Tensor) -> Tensor:
        """Return the attention that each place of the peripheral view gets, [n, places]; it adds up to 1."""
        return self._attended(inputs)[1]

    def brightness(self, inputs: Tensor) -> Tensor:
        """Return how much brighter each place is than the darkest pixel of its image, [n, places]."""
        light = (inputs - inputs.amin((1, 2, 3), keepdim=True)).mean(1, keepdim=True)
        return F.avg_pool2d(light, 2 * self._cell, ceil_mode=True).flatten(1)

    def _codes(self, inputs: Tensor, rows: Tensor, window: Tensor) -> Tensor:
        """Return the code [n, hidden] of what is seen of the images at `rows` [n] through `window` [n]."""
        top, left = self.corners[window].unbind(1)
        seen = self.encoder(crops(inputs, rows, top, left, self.scale[window], self.side))
        return F.relu(seen + self.place(window))

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        core = self.core
        return core.weight_ih, core.weight_hh, core.bias_ih, core.bias_hh

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        walk.put_output(rows, self.fc((features := self._periphery(inputs))[0]))
        return State(walk, 0, rows, features)

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, rows = state.walk, state.rows
        ended, going = keep_rows(action == STOP, rows), keep_rows(action != STOP, rows, action - 1, state.features)
        reached = [] if ended is None else [State(walk, END, ended[0])]
        if going is None:
            return reached
        rows, window, (h, left, _) = going
        h = recurrent_cell(self._codes(walk.inputs, rows, window), h, *self._weights())
        walk.put_output(rows, self.fc(h))
        shares = self.shares.to(left.dtype)
        left = left * (1 - (1 - DULL) * shares.t()[window])
        on = State(walk, 0, rows, (h, left, left @ shares))
        if isinstance(on.visit, int):
            return [*reached, State(walk, END, rows) if on.visit == self.max_steps else on]
        last = on.visit == self.max_steps
        over = on.where(last, END)
        over.features = None
        return reached + [part for part in (over, on.where(~last, 0)) if part.count]

    def observe(self, state: State) -> Tensor:
        """Return how sure the present answer is (`exit_scores`), the state, and the attention left in each window.

        The attention is a logarithm. Of places that were looked at, a fifth is left.
        """
        h, _, mass = state.features
        return torch.cat([exit_scores(self.output(state)), h.float(), mass.float().clamp_min(FAINT).log()], 1)

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the answers after all looks in one pass, weighted equally; without a rate, the last of the full route.

        Rows of rate 1 take the full route. Others look through windows that are drawn without any twice, in proportion
        to the attention in them to the power of rate / (1 - rate): all windows alike at rate 0.
        """
        h, _, mass = self._periphery(inputs)
        count, rows = self.max_steps, torch.arange(len(inputs), device=inputs.device)
        windows = (torch.tensor(self.full_route, device=inputs.device) - 1).expand(len(inputs), -1)
        if rate is not None:
            whole = (rate == 1).unsqueeze(1).to(inputs.device)
            windows = torch.where(whole, windows, self._drawn(mass, rate, count, generator))
        codes = self._codes(inputs, rows.repeat_interleave(count), windows.flatten()).view(len(inputs), count, -1)
        answers = [Answer(self.fc(h), rows)]
        for step in range(count):
            h = recurrent_cell(codes[:, step], h, *self._weights())
            answers.append(Answer(self.fc(h), rows))
        yield answers[-1:] if rate is None else answers

    @staticmethod
    def _drawn(mass: Tensor, rate: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """Draw `count` different windows for each row: [n, count], by exponential waiting times."""
        waits = torch.empty(mass.shape).exponential_(generator=generator).clamp_min(LEAST).to(mass.device)
        power = (rate / (1 - rate).clamp_min(LEAST)).unsqueeze(1).to(mass.device)
        return (power * mass.float().clamp_min(LEAST).log() - waits.log()).topk(count, 1).indices

    def run_training(self, inputs: Tensor, choose: Callable[[State], Tensor]) -> tuple[Walk, list[Answer]]:
        """Do `Backbone.run_training`, in float32, since the number of rows changes at every look (see `JumpRNN`)."""
        with torch.autocast(inputs.device.type, enabled=False):
            return super().run_training(inputs, choose)

    def constant_routes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return `Backbone.constant_routes`: no look at all, and the full route."""
        return [("no look", (STOP,) * self.columns), ("full route", self.full_route)]

    def regions(self, inputs: Tensor, route: Tensor) -> list[list[Parts]]:
        """Return `Backbone.regions`: the windows of the looks."""
        spans = (self.scale * self.side).unsqueeze(1).expand(-1, 2)
        windows = torch.cat([self.corners, spans], 1).tolist()
        return [[[windows[action - 1]] for action in row if action > STOP] for row in route.tolist()]

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each look is of the first rows of the batch, as many as take it."""
        counts = (route > STOP).sum(0).tolist()
        looks = [(count, taken[taken > STOP] - 1) for count, taken in zip(counts, route.t(), strict=True)]
        rows = torch.arange(len(inputs), device=inputs.device)

        def run() -> Tensor:
            h, left, _ = self._periphery(inputs)
            for count, windows in looks:
                if count:
                    h = recurrent_cell(self._codes(inputs, rows[:count], windows), h[:count], *self._weights())
                    self.fc(h)
                    left[:count] @ self.shares.to(left.dtype)
            return h

        return run
