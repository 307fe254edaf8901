"""Backbones small enough to check by hand: one ends early, one loops and closes a choice, one branches and joins, and
one does all of it and charges for what no table knows.

And networks as users have them, which know nothing of dynrl.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones import END, Backbone, Point, State, Walk
from dynrl.backbones.gated import GatedWalk
from dynrl.ops.gated_residual import gated_residual


def dropping(backbone: Any) -> Any:
    """Let a residual network drop features before its last layer in training, as a user's network may."""
    backbone.fc.register_forward_pre_hook(lambda layer, given: F.dropout(given[0], 0.3, layer.training))
    return backbone


class Exiting(Backbone):
    """Three linear stages with an exit after each: choice 0 goes on, 1 stops with that exit's output."""

    family, decision = "toy_exiting", "toy"
    speaks = True

    def __init__(self) -> None:
        super().__init__()
        self.config, self.input_shape = {}, (4,)
        self.stages = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
        self._pose(
            [Point("exit1", 2), Point("exit2", 2)],
            costs=[[24, 0], [24, 0]], start_macs=24, full_route=(0, 0), feature_width=4,
        )  # fmt: skip

    def leads_to(self, column: int, choice: int) -> int:
        return END if choice == 1 else super().leads_to(column, choice)

    def _arrive(self, walk: Walk, k: int, rows: Tensor, x: Tensor) -> State:
        x = torch.tanh(self.stages[k](x))
        walk.put_output(rows, self.heads[k](x))
        return State(walk, k if k < 2 else END, rows, x if k < 2 else None)

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return self._arrive(walk, 0, rows, inputs)

    def observe(self, state: State) -> Tensor:
        return state.features.clone()

    def _run(self, state: State, action: Tensor) -> list[State]:
        stopped, going = state.where(action == 1, END), state.where(action == 0, state.point)
        stopped.features = None
        reached = [stopped] if stopped.count else []
        if going.count:
            reached.append(self._arrive(state.walk, state.point + 1, going.rows, going.features))
        return reached

    def _gated_run(self, state: State, gates: Tensor) -> State:
        assert isinstance(state.walk, GatedWalk)
        state.walk.leave(gates, 1)
        return self._arrive(state.walk, state.point + 1, state.rows, state.features)


class Looping(Backbone):
    """One cell applied again (choice 1) or left (0): one point visited many times. The last visit may only leave."""

    family, decision = "toy_looping", "toy"

    def __init__(self, visits: int = 3) -> None:
        super().__init__()
        self.config, self.input_shape = {"visits": visits}, (4,)
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self._pose(
            [Point("again", 2, visits)],
            costs=[[8, 16]], start_macs=0, full_route=(1,) * (visits - 1) + (0,), feature_width=4,
        )  # fmt: skip

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, inputs.clone())

    def leads_to(self, column: int, choice: int) -> int:
        return END if choice == 0 else super().leads_to(column, choice)

    def open_choices(self, state: State) -> Tensor:
        last = torch.as_tensor(state.visit).expand(state.count) >= self.max_steps - 1
        return torch.stack([torch.ones_like(last), ~last], 1)

    def observe(self, state: State) -> Tensor:
        return state.features.clone()

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, reached = state.walk, []
        leaving, again = state.where(action == 0, END), state.where(action == 1, 0)
        if leaving.count:
            walk.put_output(leaving.rows, self.head(leaving.features))
            leaving.features = None
            reached.append(leaving)
        if again.count:
            again.features = torch.tanh(self.cell(again.features))
            reached.append(again)
        return reached

    def _gated_run(self, state: State, gates: Tensor) -> State:
        walk, x = state.walk, state.features
        assert isinstance(walk, GatedWalk)
        walk.put_output(state.rows, self.head(x))
        if state.visit == self.max_steps:
            return State(walk, END, state.rows)
        walk.leave(gates, 0)
        return State(walk, 0, state.rows, torch.tanh(self.cell(x)))


class Branching(Backbone):
    """Choice 0 takes a short cut to the last point, 1 and 2 detours through another: rows part and meet again.

    The first point has three choices, the others two.
    """

    family, decision = "toy_branching", "toy"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.input_shape = {}, (4,)
        self.ways = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.detour, self.last, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self._pose(
            [Point("way", 3), Point("detour", 2), Point("last", 2)],
            costs=[[16, 16, 16], [0, 16], [8, 24]], start_macs=0, full_route=(1, 1, 1), feature_width=4,
            thrift=[[0, 1, 1], [0, 1], [0, 1]],  # a detour costs later
        )  # fmt: skip

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, inputs.clone())

    def leads_to(self, column: int, choice: int) -> int:
        return 2 if column == choice == 0 else super().leads_to(column, choice)

    def observe(self, state: State) -> Tensor:
        return state.features[:, :4].clone()  # behind it, in a gated walk, what waits for the detour's end

    def _run(self, state: State, action: Tensor) -> list[State]:
        if state.point == 0:
            reached = []
            for choice, layer in enumerate(self.ways):
                part = state.where(action == choice, 1 if choice else 2)
                if part.count:
                    part.features = torch.tanh(layer(part.features))
                    reached.append(part)
            return reached
        layer = self.detour if state.point == 1 else self.last
        return [self._go_on(state, gated_residual(state.features, action, lambda rows: torch.tanh(layer(rows))))]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        walk, x = state.walk, state.features
        assert isinstance(walk, GatedWalk)
        if state.point == 0:
            short, *detours = (torch.tanh(way(x)) for way in self.ways)
            walk.weight, walk.present = 1 - gates[:, 0], gates.argmax(1) > 0
            # The share of each detour among those who take one; none may.
            share = (gates / walk.weight.clamp_min(1e-9).unsqueeze(1)).unsqueeze(2)
            x = share[:, 1] * detours[0] + share[:, 2] * detours[1]
            return State(walk, 1, state.rows, torch.cat([x, short], 1))
        layer = self.detour if state.point == 1 else self.last
        x, waiting = x[:, :4], x[:, 4:]
        x = gates[:, 1:2] * torch.tanh(layer(x)) + gates[:, 0:1] * x
        if state.point == 1:
            x = walk.weight.unsqueeze(1) * x + (1 - walk.weight).unsqueeze(1) * waiting
            walk.weight, walk.present = torch.ones_like(walk.weight), torch.ones_like(walk.present)
        return self._go_on(state, x)

    def _go_on(self, state: State, x: Tensor) -> State:
        if state.point == 1:
            return State(state.walk, 2, state.rows, x)
        state.walk.put_output(state.rows, self.head(x))
        return State(state.walk, END, state.rows)


class Roundabout(Backbone):
    """Choice 0 goes straight to the last point, 1 enters a loop that rows leave when they like: part, loop and join.

    The k-th round of the loop applies its cell k times. The table knows of one; what is beyond is charged on the way.
    Features are a tuple: where a row stands, and its input, which is added at the last point.
    """

    family, decision = "toy_roundabout", "toy"

    def __init__(self, rounds: int = 3) -> None:
        super().__init__()
        self.config, self.input_shape, self.rounds = {"rounds": rounds}, (4,), rounds
        self.straight, self.enter, self.cell = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self._pose(
            [Point("way", 2), Point("round", 2, rounds), Point("last", 2)],
            costs=[[16, 16], [0, 16], [8, 24]], start_macs=0, full_route=(1,) * (rounds + 2), feature_width=4,
            thrift=[[0, 1], [0, 1], [0, 1]], charged_macs=16 * sum(range(rounds)),
        )  # fmt: skip

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, (inputs.clone(), inputs.clone()))

    def leads_to(self, column: int, choice: int) -> int:
        last = self.columns - 1
        return last if choice == 0 and column < last else super().leads_to(column, choice)

    def surcharge(self, column: int, choice: int) -> int:
        return 16 * (column - 1) if choice == 1 and 1 <= column <= self.rounds else 0

    def observe(self, state: State) -> Tensor:
        return state.features[0].clone()

    def _run(self, state: State, action: Tensor) -> list[State]:
        if state.point == 2:
            return [self._finish(state, action.bool().unsqueeze(1))]
        stay, on = state.where(action == 1, 1), state.where(action == 0, 2)
        x, inputs = stay.features
        if state.point == 0:
            stay.features = (torch.tanh(self.enter(x)), inputs)
            on.features = (torch.tanh(self.straight(on.features[0])), on.features[1])
            return [part for part in (stay, on) if part.count]
        k = state.walk.visits(1)[stay.rows]
        state.walk.charge(stay.rows, 16 * (k - 1))
        for round in range(1, self.rounds + 1):
            running = (k >= round).nonzero().flatten()
            if len(running):
                x = x.index_copy(0, running, torch.tanh(self.cell(x[running])))
        stay.features = (x, inputs)
        parts = (on, stay.where(k < self.rounds, 1), stay.where(k == self.rounds, 2))
        return [part for part in parts if part.count]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        walk, k = state.walk, state.visit
        assert isinstance(walk, GatedWalk)
        if state.point == 2:
            return self._finish(state, gates[:, 1:])
        x, inputs, *waiting = state.features
        if state.point == 0:
            waiting = gates[:, :1] * torch.tanh(self.straight(x))
            walk.weight, walk.present = gates[:, 1], gates.argmax(1) == 1
            return State(walk, 1, state.rows, (torch.tanh(self.enter(x)), inputs, waiting))
        walk.charge_gates(gates, torch.tensor([0, 16 * (k - 1)]))
        waiting = waiting[0] + (walk.weight * gates[:, 0]).unsqueeze(1) * x
        walk.weight, walk.present = walk.weight * gates[:, 1], walk.present & (gates.argmax(1) == 1)
        for _ in range(k):
            x = torch.tanh(self.cell(x))
        if k < self.rounds:
            return State(walk, 1, state.rows, (x, inputs, waiting))
        x = waiting + walk.weight.unsqueeze(1) * x
        walk.weight, walk.present = torch.ones_like(walk.weight), torch.ones_like(walk.present)
        return State(walk, 2, state.rows, (x, inputs))

    def _finish(self, state: State, share: Tensor) -> State:
        """Through the last layer by `share` [n, 1]: of those that run it only, if that is bool."""
        x, inputs = state.features
        x = x + inputs
        if share.dtype is torch.bool:
            running = share.squeeze(1).nonzero().flatten()
            if len(running):
                x = x.index_copy(0, running, torch.tanh(self.last(x[running])))
        else:
            x = share * torch.tanh(self.last(x)) + (1 - share) * x
        state.walk.put_output(state.rows, self.head(x))
        return State(state.walk, END, state.rows)


class Encoder(nn.Module):
    """A transformer's block, its shortcuts inside."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, width // self.heads)
        seen = F.scaled_dot_product_attention(*split.permute(2, 0, 3, 1, 4))
        x = x + self.out(seen.transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A little ViT on images of 1x8x8."""

    def __init__(self, width: int = 8, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.register_buffer("place", torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(Encoder(width) for _ in range(depth)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = torch.cat([self.token.expand(n, -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1) + self.place
        return self.head(self.blocks(F.dropout(x, self.dropout, self.training))[:, 0])


class Masked(Encoder):
    """A block as language models have them: features by keyword, a mask with a row each, and a tuple returned."""

    def forward(self, *, features: Tensor, mask: Tensor, place: Tensor) -> tuple[Tensor, None, Tensor]:
        n, tokens, width = features.shape
        split = self.qkv(self.norm1(features + place)).view(n, tokens, 3, self.heads, width // self.heads)
        seen = F.scaled_dot_product_attention(*split.permute(2, 0, 3, 1, 4), attn_mask=mask)
        x = features + self.out(seen.transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x)), None, mask


class Reader(nn.Module):
    """A network that torch.fx cannot trace, of named inputs or of one tensor [n, 5, width] whose last token is the mask.

    The mask is None where it hides nothing. With `ids`, the inputs are token ids instead of their embeddings.
    """

    def __init__(self, width: int = 8, depth: int = 3, ids: bool = False, tokens: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width) if ids else nn.Linear(width, width)
        self.place = nn.Parameter(torch.randn(tokens, width))
        self.blocks = nn.ModuleList(Masked(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        shown = x[:, -1].abs() > 0.3 if mask is None else mask.bool()
        x, seen = self.embed(x), shown[:, None, None, : len(self.place)]
        if bool(shown.all()):
            seen = None
        for block in self.blocks:
            x, _, seen = block(features=x, mask=seen, place=self.place[None])
        return {"logits": self.head(self.norm(x).mean(1))}


class Bottle(nn.Module):
    """A block of a convolutional network, with batch norm and a ReLU in place."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.same = width_in == width

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return F.relu(y + x if self.same else y, inplace=True)


class Convolutional(nn.Module):
    """Blocks in stages, the first of each changing the width; images of 1x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(Bottle(1, 4), Bottle(4, 4), Bottle(4, 4))
        self.stage2 = nn.Sequential(nn.MaxPool2d(2), Bottle(4, 6), Bottle(6, 6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


class Mixture(nn.Module):
    """A mixture of experts as users write them: each token takes those `top_k` that the router gives most."""

    def __init__(self, width: int, experts: int = 4, top_k: int = 3, shared: bool = False, normed: bool = True) -> None:
        super().__init__()
        self.top_k, self.normed = top_k, normed
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width + 2), nn.ReLU(), nn.Linear(width + 2, width)) for _ in range(experts)
        )
        self.shared = nn.Linear(width, width) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens).softmax(1).topk(self.top_k)
        if self.normed:
            weights = weights / weights.sum(1, keepdim=True)
        out = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        for i, expert in enumerate(self.experts):
            at, rank = (chosen == i).nonzero(as_tuple=True)
            if len(at):
                out = out.index_add(0, at, (weights[at, rank, None] * expert(tokens[at])).to(out.dtype))
        return out.view(x.shape)


def sparse(module: nn.Module, width: int = 8, **settings: Any) -> nn.Module:
    """Return the module with a mixture of experts in place of the MLP of each of its blocks."""
    for block in module.blocks:  # type: ignore[union-attr]
        block.mlp = Mixture(width, **settings)
    return module
