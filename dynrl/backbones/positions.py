"""In these networks, each input chooses which share of its positions, tokens or cells, runs a block."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Backbone, Parts
from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.ops.gated_positions import Block, gated_positions
from dynrl.ops.move import beside
from dynrl.ops.pooled import summary

SHARES = (0.0, 0.25, 0.5, 1.0)


class Scorer(nn.Module):
    """A scorer gives each token a score: a linear layer on the normalised token, plus how far it is from the others.

    The distance is that from the mean of the row's tokens, in units of the mean distance. Before anything is learned,
    it ranks tokens by how much they stand out, as an object does from its background.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.score = nn.LayerNorm(width), nn.Linear(width, 1)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Map tokens [n, T, d] to scores [n, T]; tokens where `real` [n, T] is False are not counted in means."""
        away = (x - _mean(x, real)).square().mean(2).add(1e-6).sqrt()
        far = away.mean(1, keepdim=True) if real is None else _mean(away.unsqueeze(2), real).squeeze(2).clamp_min(1e-3)
        return self.score(self.norm(x)).squeeze(2) + self.gain * (away / far - 1)


def _mean(x: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean [n, 1, d] of the real tokens of `x` [n, T, d]; of all tokens if `real` is None."""
    if real is None:
        return x.mean(1, keepdim=True)
    return torch.where(real.unsqueeze(2), x, 0).sum(1, keepdim=True) / real.sum(1).clamp_min(1).view(-1, 1, 1)


class Positions(Backbone):
    """This is the base class of networks whose blocks run on some tokens of an input: action c runs shares[c] of them.

    Which tokens run is no decision: in front of each block, a scorer gives each token a score, and those with the
    highest scores run. Attention is among them only; the others pass the block by. What the block adds to a token is
    weighted by twice the logistic function of its score, and so scorers learn with the network. If all tokens run,
    nothing is weighted.

    An input may be padded. Padding is never chosen, and the shares are of the input's other tokens, the real ones. The
    table holds the costs of an input without padding; others are charged as much less as they run fewer tokens.

    A family writes what runs before the first block, which blocks these are, and what runs behind each.

    Attributes:
        leading: the number of tokens in front, such as a class token, that run whenever any token does.

    Source: mixture of depths (Raposo et al. 2024, section 3), where all inputs take the same share.
    """

    decision = "positions"
    leading = 0
    _counts: tuple[int, ...]
    _by_chance = False
    _padded = False  # whether inputs may have padding
    _block_macs: Tensor  # [points, T + 1], the MACs of each block on so many tokens, if they may

    def _lead(self, inputs: Any) -> tuple[Tensor, Any]:
        """Run what comes before the first block; return tokens [n, T, d], and what a state then keeps as `held`."""
        raise NotImplementedError

    def _block(self, state: State) -> Block:
        """Return the block at the state's point, as `gated_positions` takes it, for any number of tokens."""
        raise NotImplementedError

    def _follow(self, state: State, x: Tensor) -> tuple[Tensor, Any]:
        """Run what comes behind the block that made `x`, up to the next block or to the output.

        Returns:
            tokens and what the next state keeps, or outputs and None.
        """
        raise NotImplementedError

    def _real(self, inputs: Any) -> Tensor | None:
        """Return which tokens of `inputs` are no padding, [n, T] bool, at least one in each row; None if all are."""
        return None

    def _set_points(
        self,
        names: Sequence[str],
        shares: tuple[float, ...],
        tokens: int,
        widths: Sequence[int],
        block_macs: Callable[[int, int], int],
        fixed_macs: Sequence[int],
        padded: bool = False,
    ) -> None:
        """Make the scorers and pose a point for each block.

        Args:
            names: the names of the points.
            shares: the shares of the tokens, one for each choice.
            tokens: the number of tokens.
            widths: the number of their channels at each point.
            block_macs: a function from a point and a number of tokens to the MACs of its block.
            fixed_macs: the MACs before the first block and behind each block.
            padded: whether inputs may have padding.
        """
        if not 0 <= self.leading < tokens:
            raise ValueError(f"expected fewer leading tokens than the {tokens} tokens of a row, got {self.leading}")
        rest = tokens - self.leading
        self._counts = counts = tuple(self.leading + math.ceil(share * rest) if share else 0 for share in shares)
        rising = all(less < more for less, more in pairwise((-1, *counts)))
        if len(shares) < 2 or not rising or counts[-1] != tokens:
            raise ValueError(
                f"expected two shares or more that rise to 1, each of more of the {rest} tokens, the last of all; got "
                f"{shares}, which are {counts} tokens"
            )
        self._padded = padded
        if padded:
            every = [_at_each_count(partial(block_macs, point), tokens, name) for point, name in enumerate(names)]
            self.register_buffer("_block_macs", torch.tensor(every), persistent=False)
        self.scorers = nn.ModuleList(map(Scorer, widths))
        scoring = [rest * width for width in (*widths, 0)]  # in front of each point; nothing is scored behind the last
        self._pose(
            [Point(name, len(shares)) for name in names],
            costs=[
                [fixed + scoring[point + 1] + block_macs(point, k) for k in self._counts]
                for point, fixed in enumerate(fixed_macs[1:])
            ],
            start_macs=fixed_macs[0] + scoring[0],
            full_route=(len(shares) - 1,) * len(names),
            feature_width=max(widths) + len(shares) - 1,
        )

    def _start(self, walk: Walk, rows: Tensor, inputs: Any) -> State:
        return self._arrive(State(walk, 0, rows), *self._lead(inputs))

    def _arrive(self, state: State, x: Tensor, held: Any) -> State:
        """Score the tokens `x` in front of the state's block, or keep `x` as the output behind the last one."""
        walk, point, rows = state.walk, state.point, state.rows
        if point == len(self.points):
            walk.put_output(rows, x)
            return State(walk, END, rows)
        real = self._real(state.get(walk.inputs))
        scores = self._scores(point, x, real)
        ranks = torch.rand_like(scores) if self._by_chance else scores.detach().clone()
        ranks[:, : self.leading] = torch.inf
        if real is None:
            return State(walk, point, rows, (x, scores, _falling(ranks)), held)
        order = _falling(ranks.masked_fill(~real, -torch.inf))
        return State(walk, point, rows, (x, scores, order, self._counts_of(real)), held)

    def _scores(self, point: int, x: Tensor, real: Tensor | None) -> Tensor:
        """Return the scores of the positions of `x` in front of the block at `point`, [n, T]."""
        scores = self.scorers[point](x[:, self.leading :], None if real is None else real[:, self.leading :])
        return F.pad(scores, (self.leading, 0))  # the leading tokens' weights are 1

    def _counts_of(self, real: Tensor) -> Tensor:
        """Return how many tokens each choice runs of rows whose tokens are `real` [n, T]: [n, choices] int64."""
        total = real.sum(1, keepdim=True)
        shares = torch.tensor(self.config["shares"], dtype=torch.float64, device=real.device)
        counts = (shares * (total - self.leading).clamp_min(0)).ceil().long() + total.clamp_max(self.leading)
        return counts * (shares > 0)

    def _at(self, state: State, action: Tensor) -> Tensor:
        x, scores, order, *counts = state.features
        given = counts[0] if counts else self._counts
        return gated_positions(x, action, order, 2 * scores.sigmoid(), given, self._block(state))

    def _spared(self, state: State) -> Tensor:
        """Return by how much less than the table padded rows are charged for each choice, [n, choices] int64, <= 0."""
        macs = self._block_macs[state.point]
        return macs[state.features[3]] - macs[list(self._counts)]

    def _go_on(self, state: State, x: Tensor) -> State:
        return self._arrive(State(state.walk, state.point + 1, state.rows), *self._follow(state, x))

    def _run(self, state: State, action: Tensor) -> list[State]:
        if self._padded:
            state.walk.charge(state.rows, self._spared(state).gather(1, action.unsqueeze(1)).squeeze(1))
        return [self._go_on(state, self._at(state, action))]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        if self._padded:
            assert isinstance(state.walk, GatedWalk)
            state.walk.charge_gates(gates, self._spared(state))
        x, *how = state.features
        weighted = []
        for choice, gate in enumerate(gates.unbind(1)):
            alike = replace(state, features=(x.clone(), *how))  # the op may overwrite it
            action = torch.full_like(state.rows, choice)
            weighted.append(beside(gate, x) * self._at(alike, action))
        return self._go_on(state, torch.stack(weighted).sum(0))

    def observe(self, state: State) -> Tensor:
        """Return each channel's mean over all tokens, and the mean weight of the tokens that each choice adds."""
        if not self._padded:
            return torch.cat([summary(state.features[0], channels_last=True), *self._added(state)], 1)
        x, scores, order, ends = state.features
        sums = F.pad(scores.float().sigmoid().gather(1, order).cumsum(1), (1, 0)).gather(1, ends).diff(dim=1)
        real = self._real(state.get(state.walk.inputs))
        return torch.cat([_mean(x, real).squeeze(1).float(), sums / ends.diff(dim=1).clamp_min(1)], 1)

    def _added(self, state: State) -> list[Tensor]:
        """Return the mean weight of the positions that each choice but 0 adds, [n, 1] each; without padding."""
        _, scores, order = state.features
        weights = scores.float().sigmoid().gather(1, order)
        return [weights[:, less:more].mean(1, keepdim=True) for less, more in pairwise(self._counts)]

    def by_chance(self) -> Self:
        """Return a copy in which chance takes the place of the scores: it chooses as many tokens, but any."""
        twin = copy.deepcopy(self)
        twin._by_chance = True
        return twin

    def regions(self, inputs: Tensor, route: Tensor) -> list[list[Parts]]:
        """Return `Backbone.regions`: the tokens that run each block, if they lie on their image as on a grid."""
        tokens, found = self._counts[-1] - self.leading, [list[Parts]() for _ in range(len(inputs))]
        height, width = inputs.shape[-2:] if isinstance(inputs, Tensor) and inputs.dim() == 4 else (0, 1)
        down = self._down(tokens, height, width)
        if not down or tokens % down or height % down or width % (tokens // down):
            return found
        across = tokens // down
        high, wide = height // down, width // across

        def watch(state: State) -> Tensor:
            action = state.along(route)
            for mine, order, choice in zip(found, state.features[2].tolist(), action.tolist(), strict=True):
                ran = sorted(place - self.leading for place in order[: self._counts[choice]])
                corners = (divmod(token, across) for token in ran if token >= 0)
                mine.append([[high * row, wide * column, high, wide] for row, column in corners])
            return action

        self.run(inputs, watch)
        return found

    def _down(self, tokens: int, height: int, width: int) -> int:
        """Return how many tokens there are from above to below, if they lie on their image as on a grid of squares."""
        return math.isqrt(tokens * height // width)

    def ideal(self, inputs: Any, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each block runs on the first tokens of neighbouring rows, as many as chose so."""
        walk, parts, real = Walk(inputs, self.points, self.mac_table), [], self._real(inputs)
        counts = torch.tensor(self._counts, device=route.device).expand(len(route), -1)
        counts = counts if real is None else self._counts_of(real)
        for column in route.unbind(1):
            part, start = [], 0
            for choice in range(self.num_choices):
                mine = counts[column == choice, choice]
                rows, most = walk.all_rows[start : start + len(mine)], int(mine.max()) if len(mine) else 0
                if most:
                    part.append((rows, torch.arange(most, device=mine.device).expand(len(mine), -1)))
                start += len(mine)
            parts.append(part)

        def run() -> Any:
            x, held = self._lead(inputs)
            for point, part in enumerate(parts):
                state = State(walk, point, walk.all_rows, (x,), held)
                for rows, places in part:
                    self._block(state)(x[rows[0] : rows[-1] + 1, : places.shape[1]], rows, places)
                x, held = self._follow(state, x)
            return x

        return run


def _at_each_count(macs: Callable[[int], int], tokens: int, name: str) -> list[int]:
    """Return the MACs of a block on 0 ... `tokens` tokens, which are counted for the first three numbers and the last.

    Attention is quadratic in the number of tokens, and everything else in a block is linear or constant.
    """
    found = [macs(k) for k in range(min(4, tokens + 1))]
    while len(found) <= tokens:
        found.append(3 * found[-1] - 3 * found[-2] + found[-3])
    if found[-1] != macs(tokens):
        raise ValueError(f"expected blocks whose MACs are quadratic in the number of tokens; those of {name!r} are not")
    return found


def _falling(ranks: Tensor) -> Tensor:
    """Return the tokens of each row of `ranks` [n, T] from the highest to the lowest, equal ones by their places."""
    return ranks.argsort(dim=1, descending=True, stable=True)
