"""These networks look at parts of an input one by one: after each look, each row decides where to look next, if at all.

What the parts are, and how one is seen, is up to the families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Answer, Backbone
from dynrl.backbones.early import EXIT_SCORES, SCORES
from dynrl.backbones.walk import END, STOP, Point, State, Walk
from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.gated_cell import gated_cell_macs, recurrent_cell
from dynrl.ops.move import keep_rows
from dynrl.schema import MOST_ROWS, check_count

LEAST = 1e-6  # the least weight of a part that is drawn


class Looks(Backbone):
    """This is the base class of networks that look at parts: choice 0 stops, and choice i looks at part i.

    A family says what is known before the first look. That gives the first state, off which a first answer is read. A
    look's code goes into the state by a GRU, and an answer stands after every look. A part that was looked at is
    closed.

    The features of a state are a tuple: the hidden state, and what a family keeps besides.

    Attributes:
        orders: rules of thumb for where to look, by name: functions of the backbone and inputs [n, ...] to a number for
            each place, [n, places]. Reports show them.
        shares: [places, parts], how much of each place lies in each part.
        scale: [parts], the scale of each part, of which an order keeps to one.
    """

    decision, stops = "look", STOP
    rule = "looks"
    speaks = True
    gates = False  # the mean of two parts is none
    scores: ClassVar = EXIT_SCORES
    budgets = (0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.7)
    orders: ClassVar[Mapping[str, Callable[[Any, Tensor], Tensor]]]
    shares: Tensor
    scale: Tensor

    def _glance(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the features before the first look: the first state [n, hidden], and what the family keeps."""
        raise NotImplementedError

    def _codes(self, inputs: Tensor, rows: Tensor, part: Tensor) -> Tensor:
        """Return the code [n, hidden] of what is seen of the inputs at `rows` [n] in `part` [n]."""
        raise NotImplementedError

    def _looked(self, kept: tuple[Tensor, ...], part: Tensor) -> tuple[Tensor, ...]:
        """Return what the family keeps after a look at `part` [n]."""
        return kept

    def _told(self, state: State) -> Tensor:
        """Return what policies are told beside the scores and the state: [n, k] float32."""
        raise NotImplementedError

    def _weigh(self, features: tuple[Tensor, ...]) -> Tensor:
        """Return how likely each part is looked at in training: [n, parts], from 0 on.

        If it has a gradient, it is learned in training.
        """
        h = features[0]
        return h.new_ones(len(h), len(self.scale))

    def _pose_looks(
        self, looks: int, classes: int, hidden: int, order: list[int], *, start: int, look: int, told: int
    ) -> None:
        """Make the GRU, the head and the parts' places, and pose the point.

        Args:
            looks: the most looks of a walk.
            classes: the number of outputs.
            hidden: the number of hidden units.
            order: the parts in the order of the full route.
            start: the MACs before the first answer.
            look: the MACs of a look before the GRU, and of `_looked`.
            told: how many numbers `_told` has.
        """
        parts = len(order)
        check_count("classes", classes, 2, MOST_ROWS)
        check_count("looks", looks, 1, parts + 1)
        self.hidden = hidden
        self.place = nn.Embedding(parts, hidden)
        nn.init.normal_(self.place.weight, std=0.1)  # at 1, what is seen would drown in where it is
        self.core = nn.GRUCell(hidden, hidden)
        self.fc = nn.Linear(hidden, classes)
        answer = hidden * classes
        look += gated_cell_macs(1, hidden, hidden, 3) + answer
        self._pose(
            [Point("look", 1 + parts, visits=looks)],
            costs=[[0, *[look] * parts]], start_macs=start + answer, feature_width=SCORES + hidden + told,
            full_route=[1 + part for part in order[:looks]],
        )  # fmt: skip

    def open_choices(self, state: State) -> Tensor:
        """Return `Backbone.open_choices`: a part that was looked at shows nothing new."""
        route = state.get(state.walk.route)
        taken = torch.zeros(state.count, self.num_choices, dtype=torch.bool, device=route.device)
        taken.scatter_(1, route.clamp_min(STOP), True)
        taken[:, STOP] = False
        return ~taken

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        core = self.core
        return core.weight_ih, core.weight_hh, core.bias_ih, core.bias_hh

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        walk.put_output(rows, self.fc((features := self._glance(inputs))[0]))
        return State(walk, 0, rows, features)

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, rows = state.walk, state.rows
        ended, going = keep_rows(action == STOP, rows), keep_rows(action != STOP, rows, action - 1, state.features)
        reached = [] if ended is None else [State(walk, END, ended[0])]
        if going is None:
            return reached
        rows, part, (h, *kept) = going
        h = recurrent_cell(self._codes(walk.inputs, rows, part), h, *self._weights())
        walk.put_output(rows, self.fc(h))
        on = State(walk, 0, rows, (h, *self._looked(tuple(kept), part)))
        if isinstance(on.visit, int):
            return [*reached, State(walk, END, rows) if on.visit == self.max_steps else on]
        last = on.visit == self.max_steps
        over = on.where(last, END)
        over.features = None
        return reached + [part for part in (over, on.where(~last, 0)) if part.count]

    def observe(self, state: State) -> Tensor:
        """Return how sure the present answer is (`exit_scores`), the state, and what the family tells besides."""
        h = state.features[0]
        return torch.cat([exit_scores(self.output(state)), h.float(), self._told(state)], 1)

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the answers after all looks in one pass, weighted equally; without a rate, the last of the full route.

        Rows of rate 1 take the full route. Others look at parts that are drawn without any twice, in proportion to
        their weights to the power of rate / (1 - rate): all parts alike at rate 0. One more answer follows a look at
        the mean of these parts by their weights, if a family learns those.
        """
        features = self._glance(inputs)
        h, count, rows = features[0], self.max_steps, torch.arange(len(inputs), device=inputs.device)
        parts, weights = (torch.tensor(self.full_route, device=inputs.device) - 1).expand(len(inputs), -1), None
        if rate is not None:
            whole, weights = (rate == 1).unsqueeze(1).to(inputs.device), self._weigh(features)
            parts = torch.where(whole, parts, self._drawn(weights.detach(), rate, count, generator))
        codes = self._codes(inputs, rows.repeat_interleave(count), parts.flatten()).view(len(inputs), count, -1)
        answers = [Answer(self.fc(h), rows)]
        if weights is not None and weights.requires_grad:
            shares = F.normalize(weights.gather(1, parts), p=1, dim=1)
            mean = torch.bmm(shares.unsqueeze(1), codes).squeeze(1)
            answers.append(Answer(self.fc(recurrent_cell(mean, h, *self._weights())), rows))
        for step in range(count):
            h = recurrent_cell(codes[:, step], h, *self._weights())
            answers.append(Answer(self.fc(h), rows))
        yield answers[-1:] if rate is None else answers

    @staticmethod
    def _drawn(mass: Tensor, rate: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """Draw `count` different parts for each row: [n, count], by exponential waiting times."""
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

    def dense_twins(self, inputs: Tensor) -> dict[str, Callable[[], Any]]:
        """Return `Backbone.dense_twins`: the codes of all looks of the full route in one pass."""
        return {"all looks at once": lambda: next(self.training_outputs(inputs, None))[0].output}

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each look is of the first rows of the batch, as many as take it."""
        counts = (route > STOP).sum(0).tolist()
        looks = [(count, taken[taken > STOP] - 1) for count, taken in zip(counts, route.t(), strict=True)]
        rows = torch.arange(len(inputs), device=inputs.device)

        def run() -> Tensor:
            h, *kept = self._glance(inputs)
            self.fc(h)
            for count, parts in looks:
                if count:
                    h = recurrent_cell(self._codes(inputs, rows[:count], parts), h[:count], *self._weights())
                    self.fc(h)
                    kept = list(self._looked(tuple(each[:count] for each in kept), parts))
            return h

        return run
