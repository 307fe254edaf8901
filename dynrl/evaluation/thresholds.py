"""Thresholds on a network's own scores are fitted on validation data: sure rows take the cheapest choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dynrl.backbones import Backbone, State
from dynrl.data import Split
from dynrl.deploy import RoutedModel
from dynrl.evaluation.routes import FITTED, Fit, PolicyFor, cheapest_choices
from dynrl.evaluation.scores import Score, score, score_routes
from dynrl.inputs import Inputs, repeat_first
from dynrl.policies import ThresholdPolicy

HALVINGS = 12
CLOSE = 0.005  # walks that cost the budget less this share of it are not made dearer
LEVELS = 512  # how many values are tried for all exits at once
SWEEPS = 3  # how often the threshold of each exit is set anew at one price
PRICES = (1e-4, 1e2)  # of the dense network's compute, in errors


def thresholds(backbone: Backbone) -> dict[str, Fit]:
    """Return a threshold rule for each score that the family computes anyway (`Backbone.scores`)."""
    hear = Hear()
    return {f"threshold {name}": partial(fit_score, name=name, hear=hear) for name in backbone.scores}


def shares_of(backbone: Backbone) -> dict[str, Fit]:
    """Return MSDNet's thresholds for each score of a network with exits in a row."""
    hear = Hear()
    return {f"shares {name}": partial(fit_score, name=name, hear=hear, shares=True) for name in backbone.scores}


class Hear:
    """This function asks each exit of a network about a split, once for the rules on all of its scores."""

    def __init__(self) -> None:
        self._known: list[tuple[Backbone, Split, Tensor]] = []

    @torch.inference_mode()
    def __call__(self, backbone: Backbone, split: Split, exits: Leaving) -> Tensor:
        """Return the task's error of what each exit says of each row: [K, n]."""
        for network, rows, error in self._known:
            if network is backbone and rows is split:
                return error
        ways = (score_routes(backbone, way.expand(len(split), -1), split).metric for way in exits.routes)
        error = torch.stack([split.task.error(metric).cpu() for metric in ways])
        self._known.append((backbone, split, error))
        return error


@torch.inference_mode()
def fit_score(
    backbone: Backbone,
    split: Split,
    name: str,
    unsure: tuple[int, ...] | None = None,
    hear: Hear | None = None,
    shares: bool = False,
) -> PolicyFor:
    """Fit thresholds on one of the family's scores: sure rows take the cheapest choice, others that of `unsure`.

    This is a route, by default the full one. If the cheapest choice ends the walk wherever it is another (an exit's
    stop), a budget gets the thresholds with the least error within it (`ExitThresholds`), or those of `by_shares`.
    In other families (a loop, for example), thresholds are found by walking (`_by_walks`).
    """
    column, rising = backbone.scores[name]
    route = torch.tensor(unsure or backbone.full_route).clamp_min(0)
    seen = _scores_along(route, backbone, split, column)
    exits = leaving(backbone, split.inputs, route)

    def policy(values: Tensor) -> ThresholdPolicy:  # one value a point
        return ThresholdPolicy(backbone, name, values[backbone.column_point], route)

    if exits is None:
        return _by_walks(backbone, split.head(FITTED), seen, rising, policy)
    sign, costs = 1 if rising else -1, exits.macs.double() / backbone.dense_macs
    sure = sign * torch.stack([seen[column] for column in exits.columns])
    fitted = ExitThresholds(sure, (hear or Hear())(backbone, split, exits), costs)

    def within(budget: float) -> ThresholdPolicy | None:
        found = fitted.by_shares(budget) if shares else fitted.within(budget)
        if found is None:
            return None
        values = torch.zeros(len(seen))  # where sure rows and others take the same choice, any will do
        values[exits.columns] = sign * found
        return policy(values)

    return within


class ExitThresholds:
    """These are thresholds for the exits of a network, fitted on what each of K exits says of n inputs.

    An input leaves at the first exit where it is at least as sure as the threshold, or at the last exit.

    Args:
        sure: [K - 1, n], how sure each exit but the last is.
        error: [K, n], the task's error of each exit's answer.
        costs: [K] float64, the share of the dense MACs that is spent by leaving at each exit, rising.
    """

    def __init__(self, sure: Tensor, error: Tensor, costs: Tensor) -> None:
        self.sure, self.error, self.costs = sure.float(), error.double(), costs
        self._order = self.sure.sort(stable=True, dim=1, descending=True).indices
        levels = self.sure.flatten().sort().values
        picked = levels[torch.linspace(0, len(levels) - 1, min(LEVELS, len(levels))).long()].unique()
        never = levels.new_full((1,), torch.inf)
        # BranchyNet's evaluation (Teerapittayanon et al. 2016) sets such values by hand.
        self._alike = [self._tried(level.expand(len(sure))) for level in (*picked, never)]

    def within(self, budget: float) -> Tensor | None:
        """Return the thresholds [K - 1] with the least error within a mean cost of `budget`; None if none cost less.

        Tried are one value for all exits, the shares of `by_shares`, and at each of several prices a value for each
        exit that loses least, given the others. Of equally good ones, those that spend most of the budget are safest.
        """
        shares = self.by_shares(budget)
        if shares is None:
            return None
        tried = [*self._alike, self._tried(shares)]
        low, high = PRICES
        for _ in range(HALVINGS):
            price = (low * high) ** 0.5
            start = min(self._alike, key=lambda of, price=price: of.error + price * of.cost)  # type: ignore[misc]
            tried.append(self._tried(self._settled(start.thresholds, price)))
            low, high = (price, high) if tried[-1].cost > budget else (low, price)
        affordable = [found for found in tried if found.cost <= budget * (1 + 1e-9)]
        return min(affordable, key=lambda of: (of.error, -of.cost)).thresholds if affordable else shares

    def by_shares(self, budget: float) -> Tensor | None:
        """Return the thresholds [K - 1] that send MSDNet's shares of inputs to the exits; None if all cost more.

        This is the budgeted batch classification of MSDNet (Huang et al. 2018, section 5). Exit k of K is taken by the
        share q_k = z (1 - q)^(k-1) q of the inputs, where q is the number for which the mean cost is the budget. At
        each exit, the surest of the remaining inputs leave. If the budget is above that of equal shares, q is below 0,
        but q_k stays positive. How good an exit's answers are plays no part.
        """
        if budget < self.costs[0]:
            return None
        low, high = -50.0, 50.0  # the bounds of log(1 - q)
        for _ in range(60):
            middle = (low + high) / 2
            share = torch.softmax(middle * torch.arange(len(self.costs), dtype=torch.float64), 0)
            low, high = (middle, high) if float(share @ self.costs) < budget else (low, middle)
        left = torch.ones(self.sure.shape[1], dtype=torch.bool)
        thresholds, gone = [], 0
        # The sums are rounded, not the shares, so that errors do not add up.
        for sure, wanted in zip(self.sure, (share.cumsum(0)[:-1] * len(left)).round().int().tolist(), strict=True):
            here, count = sure[left].sort(descending=True).values, wanted - gone
            thresholds.append(here[count - 1] if count > 0 else here.new_tensor(torch.inf))
            left &= sure < thresholds[-1]
            gone = len(left) - int(left.sum())
        return torch.stack(thresholds)

    def _tried(self, thresholds: Tensor) -> Tried:
        """Return the thresholds with their mean cost and error."""
        leaves = torch.cat([self.sure >= thresholds.unsqueeze(1), torch.ones_like(self.sure[:1], dtype=torch.bool)])
        at = leaves.int().argmax(0)
        error = self.error.gather(0, at.unsqueeze(0))
        return Tried(thresholds, float(self.costs[at].mean()), float(error.mean()))

    def _settled(self, thresholds: Tensor, price: float) -> Tensor:
        """Return thresholds of which none alone could lose less, where a row loses its error and `price` x its cost."""
        loses = self.error + price * self.costs.unsqueeze(1)
        found = thresholds.clone()
        for _ in range(SWEEPS):
            before = found.clone()
            for k in reversed(range(len(found))):
                here = (self.sure[:k] < found[:k].unsqueeze(1)).all(0)
                behind = loses[-1]
                for later in reversed(range(k + 1, len(found))):
                    behind = torch.where(self.sure[later] >= found[later], loses[later], behind)
                rows = self._order[k][here[self._order[k]]]  # the surest first
                found[k] = _cut(self.sure[k, rows], (behind - loses[k])[rows])
            if torch.equal(before, found):
                break
        return found


def _cut(sure: Tensor, gains: Tensor) -> Tensor:
    """Return the threshold at which the rows that leave gain most, given rows [n] from surest to least sure."""
    if not len(sure):
        return sure.new_tensor(torch.inf)
    total = gains.cumsum(0)
    ends = torch.ones(len(sure), dtype=torch.bool)
    ends[:-1] = sure[:-1] > sure[1:]  # rows that are equally sure leave together
    total = total.masked_fill(~ends, -torch.inf)
    best = int(total.argmax())
    return sure[best] if float(total[best]) > 0 else sure.new_tensor(torch.inf)


class Tried(NamedTuple):
    """A try is a threshold for each exit but the last, with the mean cost and error on the data of the fit."""

    thresholds: Tensor
    cost: float
    error: float


def _scores_along(route: Tensor, backbone: Backbone, split: Split, column: int) -> list[Tensor]:
    """Return for each point the scores [visits] of all rows, in order, that stand there on `route` [columns]."""
    seen: list[list[Tensor]] = [[] for _ in backbone.points]
    for inputs in split.inputs.split(256):
        routes = route.to(inputs.device).expand(len(inputs), -1)

        def go_on(state: State, routes: Tensor = routes) -> Tensor:
            seen[state.point].append(backbone.observe(state)[state.rows.argsort(), column].float().cpu())
            return state.along(routes)

        backbone.run(inputs, go_on)
    return [torch.cat(parts) if parts else torch.zeros(1) for parts in seen]


class Leaving(NamedTuple):
    """The ways to leave a network with exits in a row: at each of K - 1 exits in turn, and last the whole route.

    Attributes:
        columns: the columns of the exits, which are their points, too: K - 1.
        routes: [K, columns] int64.
        macs: [K] int64, what each way costs, rising.
    """

    columns: list[int]
    routes: Tensor
    macs: Tensor


@torch.inference_mode()
def leaving(backbone: Backbone, inputs: Inputs, whole: Tensor) -> Leaving | None:
    """Return the ways to leave the route `whole` [columns] by the cheapest choice where this is another one.

    If a point is met more than once, or such a choice does not end the walk, or is not met, there is None. `inputs`
    [n, ...] may be any of the network's.
    """
    cheapest = cheapest_choices(backbone)
    exits = (whole != cheapest).nonzero().squeeze(1)
    routes = whole.repeat(len(exits) + 1, 1)
    routes[torch.arange(len(exits)), exits] = cheapest[exits]
    walk = backbone.run_route(repeat_first(inputs, len(routes)), routes)
    ran = walk.route.cpu() >= 0
    ended = ran[:-1] == ran[-1] & (torch.arange(backbone.columns) <= exits.unsqueeze(1))
    once = backbone.columns == len(backbone.points)
    return Leaving(exits.tolist(), routes, walk.macs.cpu()) if once and ended.all() and ran[-1, exits].all() else None


def _by_walks(
    backbone: Backbone, split: Split, seen: list[Tensor], rising: bool, policy: Callable[[Tensor], ThresholdPolicy]
) -> PolicyFor:
    """Fit thresholds by walks: one quantile of each point's scores, or one value for all points, if that is better.

    Each is bisected to the budget. A budget above the dearest walk gets this walk. A point where all rows score the
    same tells nothing: no row is sure there. If all points are such, there is no rule.

    Args:
        backbone, split: the network, and what is walked.
        seen: for each point, the scores of the rows that stand there on the route of the unsure.
        rising: whether a higher score means surer.
        policy: makes the policy of a threshold for each point.
    """
    never = torch.inf if rising else -torch.inf
    told = torch.tensor([bool((scores != scores[0]).any()) for scores in seen])
    if not told.any():
        return lambda budget: None
    every = torch.cat([scores for scores, tells in zip(seen, told.tolist(), strict=True) if tells])

    def at(share: float, alike: bool) -> ThresholdPolicy:
        """Return the policy by which about this share of the rows is sure at each point."""
        if share in (0.0, 1.0):
            values = torch.full((len(seen),), never if share == 0.0 else -never)
        else:
            rank = 1 - share if rising else share
            values = torch.stack([(every if alike else scores).quantile(rank) for scores in seen])
        return policy(torch.where(told | (share == 1.0), values, never))

    @torch.inference_mode()
    def reached(policy: ThresholdPolicy) -> Score:
        return score(RoutedModel(backbone, policy), split)

    def fitted(budget: float, alike: bool) -> ThresholdPolicy:
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            spent = reached(at(middle, alike)).macs_fraction
            low, high = (middle, high) if spent > budget else (low, middle)
            if budget * (1 - CLOSE) <= spent <= budget:
                break
        return at(high, alike)  # within the budget

    def within(budget: float) -> ThresholdPolicy | None:
        if budget < reached(at(1.0, True)).macs_fraction:
            return None
        if budget >= reached(at(0.0, True)).macs_fraction:
            return at(0.0, True)
        kinds = (False, True) if int(told.sum()) > 1 else (False,)
        return min((fitted(budget, alike) for alike in kinds), key=lambda of: split.task.error(reached(of).metric))

    return within
