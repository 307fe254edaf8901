"""Backbones small enough to check by hand: one ends early, one loops and closes a choice, one branches and merges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynrl.backbones import END, Backbone, Point, State, Walk
from dynrl.ops.gated_residual import gated_residual


class Exiting(Backbone):
    """Three linear stages with an exit after each: choice 0 goes on, 1 stops with that exit's output."""

    family, decision = "toy_exiting", "toy"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.input_shape = {}, (4,)
        self.stages = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
        self.points = (Point("exit1", 2), Point("exit2", 2))
        self.feature_width, self.max_steps, self.full_route = 4, 2, (0, 0)
        self.dense_macs = 3 * (16 + 8)

    def _arrive(self, walk: Walk, k: int, rows: Tensor, x: Tensor) -> State:
        x = torch.tanh(self.stages[k](x))
        walk.charge(rows, 24)
        walk.put_output(rows, self.heads[k](x))
        return State(walk, k if k < 2 else END, rows, x if k < 2 else None)

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return self._arrive(walk, 0, rows, inputs)

    def observe(self, state: State) -> Tensor:
        assert state.features is not None
        return state.features.clone()

    def _run(self, state: State, action: Tensor) -> list[State]:
        stopped, going = state.where(action == 1, END), state.where(action == 0, state.point)
        stopped.features = None
        reached = [stopped] if stopped.count else []
        if going.count:
            reached.append(self._arrive(state.walk, state.point + 1, going.rows, going.features))
        return reached

    def _gated(self, inputs: Tensor, gates: Tensor) -> Tensor:
        x, total, reach = inputs, 0, torch.ones(len(inputs), 1)
        for k in range(3):
            x = torch.tanh(self.stages[k](x))
            stop = gates[:, k, 1:2] if k < 2 else 1
            total = total + reach * stop * self.heads[k](x)
            reach = reach * (gates[:, k, 0:1] if k < 2 else 0)
        return total


class Looping(Backbone):
    """One cell applied again (choice 1) or left (0): one point visited many times. The third visit may only leave."""

    family, decision = "toy_looping", "toy"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.input_shape = {}, (4,)
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.points = (Point("again", 2),)
        self.feature_width, self.max_steps, self.full_route = 4, 3, (1, 1, 0)
        self.dense_macs = 2 * 16 + 8

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, inputs.clone())

    def open_choices(self, state: State) -> Tensor:
        last = state.walk.at(state.walk.steps, state.rows) >= 2
        return torch.stack([torch.ones_like(last), ~last], 1)

    def observe(self, state: State) -> Tensor:
        assert state.features is not None
        return state.features.clone()

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, reached = state.walk, []
        leaving, again = state.where(action == 0, END), state.where(action == 1, 0)
        if leaving.count:
            walk.charge(leaving.rows, 8)
            walk.put_output(leaving.rows, self.head(leaving.features))
            leaving.features = None
            reached.append(leaving)
        if again.count:
            walk.charge(again.rows, 16)
            again.features = torch.tanh(self.cell(again.features))
            reached.append(again)
        return reached

    def _gated(self, inputs: Tensor, gates: Tensor) -> Tensor:
        x, total, reach = inputs, 0, torch.ones(len(inputs), 1)
        for step in range(3):
            leave = gates[:, step, 0:1] if step < 2 else 1
            total = total + reach * leave * self.head(x)
            reach = reach * gates[:, step, 1:2]
            x = torch.tanh(self.cell(x))
        return total


class Branching(Backbone):
    """Choice 0 takes a short cut to the last point, choice 1 a detour through another: rows part and meet again."""

    family, decision = "toy_branching", "toy"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.input_shape = {}, (4,)
        self.short, self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)
        self.points = (Point("way", 2), Point("detour", 2), Point("last", 2))
        self.feature_width, self.max_steps, self.full_route = 4, 3, (1, 1, 1)
        self.dense_macs = 16 * 3 + 8

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, inputs.clone())

    def observe(self, state: State) -> Tensor:
        assert state.features is not None
        return state.features.clone()

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, reached = state.walk, []
        if state.point == 0:
            for choice, layer, point in ((0, self.short, 2), (1, self.first, 1)):
                part = state.where(action == choice, point)
                if part.count:
                    walk.charge(part.rows, 16)
                    part.features = torch.tanh(layer(part.features))
                    reached.append(part)
            return reached
        layer = self.second if state.point == 1 else self.last
        walk.charge(state.rows, 16 * action)
        x = gated_residual(state.features, action, lambda rows: torch.tanh(layer(rows)))
        if state.point == 1:
            return [State(walk, 2, state.rows, x)]
        walk.charge(state.rows, 8)
        walk.put_output(state.rows, self.head(x))
        return [State(walk, END, state.rows, None)]

    def _gated(self, inputs: Tensor, gates: Tensor) -> Tensor:
        def optional(x: Tensor, layer: nn.Module, step: int) -> Tensor:
            return gates[:, step, 1:2] * torch.tanh(layer(x)) + gates[:, step, 0:1] * x

        shortcut = optional(torch.tanh(self.short(inputs)), self.last, 1)
        detour = optional(optional(torch.tanh(self.first(inputs)), self.second, 1), self.last, 2)
        return self.head(gates[:, 0, 0:1] * shortcut + gates[:, 0, 1:2] * detour)
