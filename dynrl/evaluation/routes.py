"""Routes that need no policy: random routes of a given cost, one route for all inputs, the best in hindsight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dynrl.backbones import Backbone
from dynrl.data import Split
from dynrl.evaluation.scores import score_routes
from dynrl.policies import Policy, RandomPolicy, StaticPolicy
from dynrl.routes import draw_routes
from dynrl.tasks import Task

# It maps a budget (a share of the dense MACs) to the policy that meets it, or else to the dearest one within it; to
# None if all cost more.
PolicyFor = Callable[[float], Policy | None]
Fit = Callable[[Backbone, Split], PolicyFor]
FITTED = 1024  # how many rows of a split a rule of thumb is fitted on, if each try is a walk
SEARCHED = 1024  # how many rows the greedy search for static routes looks at
MOST_TRIES = 400  # how many passes over these rows it may take
PARTS = 16  # `spaced_routes` keep none, one sixteenth, two sixteenths, ... all of the columns
ORACLE_DRAWS = 24
ORACLE_PRICE = 1e-3  # the price of the dense MACs in units of the task's error, lower than what policies are told
CLOSE = 0.005  # random routes cost what is asked but for this share of it
MOST_STEPS = 8  # how many walks may find the rate of one seed's routes
WIDEST_STEP = 2.0  # in log-odds
LEAST = 1e-9  # a cost whose logarithm is taken: where all rows end at once, nothing is spent
PROBED = 64  # on as many rows at most, a change of a static route must lower the cost to be tried on all rows


@torch.inference_mode()
def random_rate(backbone: Backbone, inputs: Tensor, macs_fraction: float) -> float | None:
    """Find the rate at which random routes cost `macs_fraction` on average.

    The rate is 1 if even the dearest routes cost less, and None if the cheapest ones cost more.
    """

    def cost(rate: float) -> float:
        routes = RandomPolicy(backbone.thrift, rate).route(inputs)
        return float(backbone.run_route(inputs, routes).macs.double().mean()) / backbone.dense_macs

    if macs_fraction < cost(0.0):
        return None
    if macs_fraction > cost(1.0):
        return 1.0
    # Bisect in log-odds: at points of many choices, the rates that matter are very small or very close to one.
    low, high = -30.0, 30.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(_rate(middle)) < macs_fraction else (low, middle)
    return _rate((low + high) / 2)


def _rate(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


Answer = TypeVar("Answer")


class Steering:
    """Steering finds the rates at which given draws of random routes cost what is asked.

    It steps along the logarithm of the cost, by the slope between the last two walks. The slope and the rate of one
    draw begin the next draw's search, so that this takes about two walks.

    Args:
        rate: a rate near those that are sought, above 0 and below 1.
    """

    def __init__(self, rate: float) -> None:
        self._log_odds, self._slope = math.log(rate / (1 - rate)), 0.5

    def meet(self, macs_fraction: float, walk: Callable[[float], tuple[float, Answer]]) -> Answer:
        """Return what `walk` answers at the rate at which it costs `macs_fraction`, or as near as it was brought.

        Args:
            macs_fraction: what is asked, a share of the dense MACs.
            walk: a function from a rate to what the routes of that rate cost, and an answer. It draws the same random
                numbers each time, so that its cost rises with the rate.
        """
        at, known, best = self._log_odds, list[tuple[float, float]](), list[tuple[float, float, Answer]]()
        for _ in range(MOST_STEPS):
            spent, answer = walk(_rate(at))
            missing = math.log(macs_fraction / max(spent, LEAST))
            if not best or abs(missing) < abs(best[0][0]):
                best = [(missing, at, answer)]
            if abs(missing) < CLOSE:
                break
            known.append((at, missing))
            if len(known) > 1 and (slope := _slope(*known[-2:])) > 0:
                self._slope = slope
            at += max(-WIDEST_STEP, min(WIDEST_STEP, missing / self._slope))
        self._log_odds = best[0][1]
        return best[0][2]


def _slope(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Return how fast what is missing falls between two places."""
    return (before[1] - after[1]) / (after[0] - before[0])


class Found(NamedTuple):
    """A find is a route for all inputs (or a network), with its share of the dense MACs and its metric."""

    what: Any
    macs_fraction: float
    metric: float


def affordable(found: Sequence[Found | tuple[Any, float, float]], budget: float, task: Task) -> Any:
    """Choose what has the least error within `budget`, of equals the cheapest; return None if all cost more."""
    within = [(task.error(metric), macs, i) for i, (_, macs, metric) in enumerate(found) if macs <= budget]
    return found[min(within)[2]][0] if within else None


def best_within(found: Sequence[Found], task: Task) -> PolicyFor:
    """Return a function from a budget to the policy that is `affordable` within it."""

    def within(budget: float) -> Policy | None:
        best: Policy | None = affordable(found, budget, task)
        return best

    return within


def cheapest_choices(backbone: Backbone) -> Tensor:
    """Return, for each column, the choice that is the cheapest in the long run: [columns]."""
    return backbone.thrift.double().masked_fill(backbone.thrift < 0, math.inf).argmin(1)


def static_tries(backbone: Backbone) -> int:
    """Count the passes over rows that `static_routes` takes at most: to search, and to measure what it found."""
    tries = _greedy_tries(backbone)
    return tries + 1 + _greedy_steps(backbone) if tries <= MOST_TRIES else len(spaced_routes(backbone))


def _greedy_steps(backbone: Backbone) -> int:
    return int((backbone.thrift >= 0).sum()) - backbone.columns  # each step changes the choice of one column


def _greedy_tries(backbone: Backbone) -> int:
    steps = _greedy_steps(backbone)
    return 1 + steps * (steps + 1) // 2


def static_routes(backbone: Backbone, split: Split, tick: Callable[[], Any] = lambda: None) -> list[Found]:
    """Find smaller networks on validation data; each is one route that all inputs take.

    The search is greedy, on the first `SEARCHED` rows. It begins with the full route. Each step changes one choice: of
    all changes that lower the cost, it takes the one with the highest log-likelihood. The search ends when no change
    lowers the cost. If all this may take more than `MOST_TRIES` passes, the routes are those of `spaced_routes`.

    Args:
        backbone: the network that walks.
        split: the validation data, on all of which the routes are measured.
        tick: called after each pass.

    Returns:
        the routes, from dear to cheap; each has an action for every column.
    """
    few = _greedy_tries(backbone) <= MOST_TRIES
    routes = _greedy_routes(backbone, split.head(SEARCHED), tick) if few else spaced_routes(backbone)
    return measured_routes(backbone, split, routes, tick)


@torch.inference_mode()
def _greedy_routes(backbone: Backbone, split: Split, tick: Callable[[], Any]) -> list[tuple[int, ...]]:
    probed = split.inputs[:: 1 + len(split) // PROBED]

    def probe(route: Sequence[int]) -> float:
        """Return about what the route costs: enough to tell whether a change may lower it."""
        return float(backbone.run_route(probed, torch.tensor([route]).expand(len(probed), -1)).macs.double().mean())

    def judge(route: tuple[int, ...]) -> tuple[float, float, tuple[int, ...], Tensor]:
        """Return the mean log-likelihood, the mean cost, the route, and which columns any row comes to: bool."""
        tick()
        walked = score_routes(backbone, StaticPolicy(route).route(split.inputs), split)
        return float(walked.likely.mean()), float(walked.macs.double().mean()), route, (walked.route >= 0).any(0)

    _, cost, route, reached = judge(_full_route(backbone))
    found = [route]
    while True:
        most = probe(route)
        tried = [judge(other) for other in _changes(backbone, route, reached) if probe(other) < most]
        cheaper = [each for each in tried if each[1] < cost]
        if not cheaper:
            return found
        _, cost, route, reached = max(cheaper, key=itemgetter(0))
        found.append(route)


def _full_route(backbone: Backbone) -> tuple[int, ...]:
    """Return the dense network's actions, and the dearest choice of each column that it never visits."""
    full, dearest = torch.tensor(backbone.full_route), backbone.thrift.argmax(1)
    return tuple(torch.where(full >= 0, full, dearest).tolist())


def _changes(backbone: Backbone, route: tuple[int, ...], reached: Tensor) -> list[tuple[int, ...]]:
    """List all routes that differ from `route` in one column that rows come to, by a choice that exists there."""
    exists = (backbone.thrift >= 0).tolist()
    return [
        (*route[:column], choice, *route[column + 1 :])
        for column in reached.nonzero().flatten().tolist()
        for choice in range(backbone.num_choices)
        if exists[column][choice] and choice != route[column]
    ]


def spaced_routes(backbone: Backbone) -> list[tuple[int, ...]]:
    """Return static routes for long walks: the full route's choice in some columns, the cheapest in all others.

    The columns that keep the full route's choice are the first ones, the last ones or evenly spaced ones, and their
    number goes from none to all.
    """
    columns = backbone.columns
    cheapest, full = cheapest_choices(backbone).tolist(), _full_route(backbone)
    routes: dict[tuple[int, ...], None] = {}  # in order, each once
    for part in range(PARTS + 1):
        count = round(columns * part / PARTS)
        for kept in (
            range(count),
            range(columns - count, columns),
            [t for t in range(columns) if (t + 1) * count // columns > t * count // columns],
        ):
            routes[tuple(full[t] if t in kept else cheapest[t] for t in range(columns))] = None
    return list(routes)


def measured_routes(
    backbone: Backbone,
    split: Split,
    routes: Iterable[tuple[int, ...]],
    tick: Callable[[], Any] = lambda: None,
) -> list[Found]:
    """Measure static routes, such as the best single expert.

    If a choice is closed, or a point has no choice of that number, the nearest open choice runs in its place.

    Returns:
        the routes from dear to cheap, the best first among equally dear ones. `tick` is called after each.
    """
    found = []
    for route in routes:
        walked = score_routes(backbone, StaticPolicy(route).route(split.inputs), split)
        found.append(Found(route, float(walked.macs.mean()), split.task.mean(walked.metric, split.targets)))
        tick()
    return sorted(found, key=lambda of: (-of.macs_fraction, split.task.error(of.metric)))


def oracle_candidates(backbone: Backbone, static: Sequence[Found]) -> list[tuple[int, ...]]:
    """Return what the oracle chooses from: the routes of `static_routes`, and random ones, cheap to dear."""
    routes = draw_routes(backbone.thrift, torch.linspace(0, 1, ORACLE_DRAWS), torch.Generator().manual_seed(0))
    return [route for route, _, _ in static] + [tuple(route) for route in routes.tolist()]


def oracle_routes(
    backbone: Backbone, split: Split, candidates: list[tuple[int, ...]], tick: Callable[[], Any] = lambda: None
) -> Tensor:
    """Choose for each input the candidate route with the least `Task.error`, at `ORACLE_PRICE` for its MACs.

    The oracle sees the targets. In classification, it chooses the cheapest route that is right, or else the cheapest
    of all. In regression, errors are of any size: without a price, the oracle would pay the dense network's compute
    for a difference in the last digit.

    Returns:
        [n, columns].
    """
    best = torch.full((len(split),), math.inf)
    chosen = torch.zeros(len(split), backbone.columns, dtype=torch.int64)
    for candidate in candidates:
        walked = score_routes(backbone, StaticPolicy(candidate).route(split.inputs), split)
        cost = split.task.error(walked.metric) + ORACLE_PRICE * walked.macs
        better = cost < best
        best = torch.where(better, cost, best)
        chosen[better] = torch.tensor(candidate)
        tick()
    return chosen
