"""In a gated walk, every row takes every choice, each weighted by its gate; gates are trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.backbones.walk import CostTable, Point, State, Walk
from dynrl.inputs import Inputs
from dynrl.ops.move import beside


def straight_through(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return one-hot draws [n, choices] from the distribution of `logits`, with the gradient of a softmax.

    This is the straight-through Gumbel-softmax at temperature 1 (Jang et al. 2017, section 2.2): hard in the forward
    pass, soft in the backward pass. This one estimator stands for what the decisions' own papers do: SkipNet's
    supervised phase (Wang et al. 2018, section 3.2), DS-Net's gate over widths (Li et al. 2021, section 3.3), Skip
    RNN's binary state update (Campos et al. 2018, section 3) and, since noise comes before the choice, the noisy top-1
    gate over experts (Shazeer et al. 2017, section 2.1).
    """
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return hardened((logits + noise).softmax(1))


def hardened(soft: Tensor) -> Tensor:
    """Return the likeliest choice of each row of `soft` [n, choices], one-hot, with the gradient of `soft`.

    Source: the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432).
    """
    hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is exactly 0: gates stay exactly 0 and 1


class GatedWalk(Walk):
    """In a gated walk, all rows stand at each point in turn; the walk is differentiable in the gates.

    `route`, `steps`, `last` and `macs` follow each row along its likeliest choices.

    Attributes:
        weight: [B] float32, differentiable, the share of each row that is still walking.
        present: [B] bool, whether the row's likeliest choices have led it to the present point.
        expected_macs: [B] float32, differentiable, the MACs of all choices, weighted by their gates.
    """

    def __init__(self, inputs: Inputs, points: Sequence[Point], macs: CostTable) -> None:
        super().__init__(inputs, points, macs)
        self.weight = torch.ones(len(self), dtype=torch.float32, device=inputs.device)
        self.present = torch.ones_like(self.all_rows, dtype=torch.bool)
        self.expected_macs = torch.zeros(len(self), dtype=torch.float32, device=inputs.device)
        self._left: Tensor | None = None  # the sum of weight x output over the shares that have left the walk

    def begin(self, rows: Tensor) -> None:
        """Charge all rows the cost before the first decision."""
        super().begin(rows)
        self.expected_macs = self.expected_macs + self._mac_table.start

    def charge(self, rows: Tensor, macs: Tensor | int) -> None:
        """Add `macs` to the bill of the rows present, and add them by its weight to `expected_macs` of every row."""
        super().charge(rows, macs * self.present)
        self.expected_macs = self.expected_macs + self.weight * macs

    def charge_gates(self, gates: Tensor, macs: Tensor) -> None:
        """Charge each row for its shares `gates` [B, n] of choices that cost `macs`, [n] or [B, n]."""
        costs = macs.expand_as(gates)
        likeliest = costs.gather(1, gates.argmax(1, keepdim=True)).squeeze(1)
        super().charge(self.all_rows, likeliest.to(torch.int64) * self.present)
        self.expected_macs = self.expected_macs + self.weight * (gates.float() * costs).sum(1)

    def take(self, state: State, gates: Tensor) -> None:
        """Record the likeliest choices of the rows present, and charge every choice by `gates` [B, n]."""
        action, column = gates.argmax(1), state.column
        assert isinstance(column, int), "a gated walk's rows are together"
        self.route[:, column] = torch.where(self.present, action, -1)
        self.last = torch.where(self.present, action + 1, self.last)
        self.steps += self.present
        self.charge_gates(gates, self._mac_table.choices[state.point, : gates.shape[1]])
        self.visits_together[state.point] += 1

    def leave(self, gates: Tensor, choice: int) -> None:
        """Let the share of each row that takes `choice` by `gates` [B, n] end with its present output."""
        share = gates[:, choice]
        part = self._weighted_output(self.weight * share)
        self._left = part if self._left is None else self._left + part
        self.weight = self.weight * (1 - share)
        self.present = self.present & (gates.argmax(1) != choice)

    def finish(self) -> None:
        """End the walk: the shares that have not left get the last output."""
        if self._left is not None:
            self.outputs = self._left + self._weighted_output(self.weight)

    def _weighted_output(self, weight: Tensor) -> Any:
        assert self.outputs is not None, "a row leaves with the output it has: put it first"
        return beside(weight.to(self.outputs.dtype), self.outputs) * self.outputs
