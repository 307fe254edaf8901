"""How good a routed model is: the task's metric, MACs and measured time, beside what it must beat."""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynrl.backbones import END, Backbone, choice_rates
from dynrl.data import Split
from dynrl.deploy import Route, RoutedModel
from dynrl.ops.backend import device_counts
from dynrl.policies import RandomPolicy, StaticPolicy
from dynrl.routes import draw_routes
from dynrl.tasks import CLASSIFICATION, Task

LONG = 16  # steps of a walk; see `static_routes`
ORACLE_DRAWS = 24
ORACLE_PRICE = 1e-3  # of the dense MACs, in the task's error: below what policies are told


@dataclass(frozen=True)
class Score:
    """What one pass over a split gave: the mean of the task's metric, and shares of the dense network's MACs.

    `macs_fraction` has the router in; `choice_rates` as the function of that name.
    """

    metric: float
    macs_fraction: float
    router_fraction: float
    distinct_routes: int
    choice_rates: dict[str, float]

    @classmethod
    def of(cls, backbone: Backbone, metric: float, macs: float, router: float, routes: Tensor) -> Score:
        """With what `routes` [n, max_steps] of the split's rows tell."""
        distinct, rates = len(routes.unique(dim=0)), choice_rates(backbone.points, routes)
        return cls(metric, macs, router, distinct, rates)


def score(model: RoutedModel, split: Split, batch_size: int = 256) -> Score:
    """One pass over `split` through the plugged model, each row once."""
    metric, route = score_rows(model, split, batch_size)
    macs, router = float(route.macs_fraction.mean()), float(route.router_fraction.mean())
    return Score.of(model.backbone, float(metric.mean()), macs, router, route.actions)


def score_rows(model: RoutedModel, split: Split, batch_size: int = 256) -> tuple[Tensor, Route]:
    """The same row by row, on the CPU: the task's metric [n], and the route of the whole split."""
    metric, routes = [], []
    for inputs, targets in _batches(split, batch_size):
        metric.append(split.task.score(model(inputs).float(), targets))
        assert model.last_route is not None
        routes.append(model.last_route)
    actions, macs, router = (
        torch.cat([getattr(r, name) for r in routes]).cpu() for name in ("actions", "macs", "router_macs")
    )
    return torch.cat(metric).cpu(), Route(actions, macs, router, routes[0].dense_macs)


def _batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(split.inputs.split(size), split.targets.split(size), strict=True)


@dataclass(frozen=True)
class Usage:
    """Where a routed model spends its compute on a split, and on which inputs.

    Attributes:
        groups: [{"class", "inputs", the metric, "macs_fraction", "choice_rates"}], one a class; of a regression one
            for all inputs, whose class is None.
        by_step: [groups, max_steps], what is spent at each step, as a share of what its dearest choice takes; 0 behind
            an input's end.
        cheapest, dearest: rows of the split by what was spent on them, the extreme first.
        distinct_routes: how many.
        commonest: share of the inputs that take the commonest route.
    """

    groups: list[dict[str, Any]]
    by_step: list[list[float]]
    cheapest: list[int]
    dearest: list[int]
    distinct_routes: int
    commonest: float

    @classmethod
    def of(cls, model: RoutedModel, split: Split, shown: int = 8) -> Usage:
        """Of a model at its present price; `shown` rows are named at either end."""
        metric, route = score_rows(model, split)
        macs, actions, classes = route.macs_fraction, route.actions, split.targets.cpu()
        dearest = model.backbone.column_costs.max(1).values
        costs = model.backbone.column_costs.gather(1, actions.t().clamp_min(0)).t()
        spent = torch.where(actions >= 0, costs / dearest, 0.0)
        groups: list[dict[str, Any]] = []
        by_step = []
        for name in classes.unique().tolist() if split.task == CLASSIFICATION else [None]:
            mine = torch.ones(len(macs), dtype=torch.bool) if name is None else classes == name
            groups.append(
                {
                    "class": name, "inputs": int(mine.sum()), split.task.metric: float(metric[mine].mean()),
                    "macs_fraction": float(macs[mine].mean()),
                    "choice_rates": choice_rates(model.backbone.points, actions[mine]),
                }
            )  # fmt: skip
            by_step.append(spent[mine].mean(0).tolist())
        order = macs.argsort(stable=True).tolist()
        _, counts = actions.unique(dim=0, return_counts=True)
        return cls(
            groups, by_step, order[:shown], order[-shown:][::-1], len(counts), float(counts.max() / len(actions))
        )


class Scored(NamedTuple):
    """Row by row, what walking a split gave: the task's metric [n], log-likelihood of the target [n], share of the
    dense network's MACs [n], and what ran [n, max_steps], -1 from a row's end on.
    """

    metric: Tensor
    likely: Tensor
    macs: Tensor
    route: Tensor


@torch.inference_mode()
def score_routes(backbone: Backbone, routes: Tensor, split: Split, batch_size: int = 256) -> Scored:
    """Walk each input of `split` along its row of `routes` [n, max_steps]; what is returned is on the CPU."""
    task, parts = split.task, []
    for inputs, targets, route in zip(
        *(t.split(batch_size) for t in (split.inputs, split.targets, routes)), strict=True
    ):
        walk = backbone.run_route(inputs, route)
        assert walk.outputs is not None
        outputs = walk.outputs.float()
        scored = (task.score(outputs, targets), task.log_likelihood(outputs, targets))
        parts.append((*scored, walk.macs / backbone.dense_macs, walk.route))
    return Scored(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def calibrate(
    model: RoutedModel, split: Split, points: int = 17, gap: float = 0.03, tick: Callable[[], Any] = lambda: None
) -> list[tuple[float, float]]:
    """Measure the MACs fraction over the price range; what `set_budget` looks a price up in.

    Args:
        split: validation data.
        points: prices tried at first, evenly spaced in their logarithm.
        gap: then, between neighbours further apart than this share of the dense MACs, a price is tried halfway,
            until none is or their prices differ by less than half a thousandth.
        tick: called after each price.

    Returns:
        [(price, MACs fraction)], prices rising. Sets it as the model's curve, too.
    """
    assert model.price_range is not None, "only a policy that knows a price can be calibrated"
    low, high = model.price_range
    before = model.price

    def measure(price: float) -> tuple[float, float]:
        model.set_price(min(max(price, low), high))
        fraction = score(model, split).macs_fraction
        tick()
        return model.price, fraction

    count = points if low < high else 1
    curve = [measure(low * (high / low) ** (i / (points - 1))) for i in range(count)]
    position = 0
    while position + 1 < len(curve):
        (cheap, above), (dear, below) = curve[position], curve[position + 1]
        if abs(above - below) > gap and dear / cheap > 1.0005 and len(curve) < 6 * points:
            curve.insert(position + 1, measure((cheap * dear) ** 0.5))
        else:
            position += 1
    model.set_price(before)
    model.curve = curve
    return curve


def collapse(model: RoutedModel, split: Split, prices: int = 5) -> str | None:
    """What a calibrated policy has failed to learn, with advice, or None.

    A policy may end up deaf to the price (one point instead of a front) or to the inputs (one route for all: a static
    network, which needs no router); reinforcement learning stays there, since nothing else is tried any more.
    """
    macs = [spent for _, spent in model.curve]
    reach = f"{min(macs):.2f} to {max(macs):.2f} of the dense MACs"
    if len(macs) > 1 and max(macs) - min(macs) < 0.02:
        return (
            f"collapsed: the price changes nothing (it spends {reach}). Widen the price range (--price-range; at "
            "its ends all and almost nothing should be spent), or train for more steps"
        )
    before, routes = model.price, 0
    for i in range(prices):
        model.set_price(model.curve[i * (len(macs) - 1) // (prices - 1)][0])
        routes = max(routes, score(model, split).distinct_routes)
    model.set_price(before)
    if routes > 1:
        return None
    return (
        f"collapsed: every input takes the same route at each price (it spends {reach}). Train for more steps, or with "
        "another seed; see in TensorBoard when routes/distinct fell. If it recurs, inputs may not differ in what they "
        "need: then the static routes of the report are as good"
    )


def calibrate_latency(
    model: RoutedModel, inputs: Tensor, batch_size: int, rounds: int = 5, tick: Callable[[], Any] = lambda: None
) -> list[tuple[float, float]]:
    """Time a batch at each price of `model.curve`; what `set_milliseconds` looks a price up in.

    Args:
        inputs: validation data, at least one batch. Each call takes other neighbours of it: what is plugged in meets
            new batches, too, whose routes set sizes that no layer has seen, and one batch may be easier than most.
        rounds: as in `medians_in_turn`; `tick` is called after each.

    Returns:
        [(price, milliseconds)], prices rising and times falling: a dearer price takes no longer, so medians that say
        otherwise are noise, and all are put in order (rearrangement: Chernozhukov et al. 2009, Biometrika).
    """
    draw = random.Random(0)

    def at(price: float) -> None:
        if model.price != price:  # in the call before the timed ones
            model.set_price(price)
        start = draw.randint(0, len(inputs) - batch_size)
        model(inputs[start : start + batch_size])

    before, prices = model.price, [price for price, _ in model.curve]
    times = medians_in_turn({price: partial(at, price) for price in prices}, rounds, tick, calls=5)
    model.set_price(before)
    return list(zip(prices, sorted(times.values(), reverse=True), strict=True))


# What a learned policy must beat ----------------------------------------------------------------------------


@torch.inference_mode()
def random_rate(backbone: Backbone, inputs: Tensor, macs_fraction: float) -> float | None:
    """The rate at which random routes (`RandomPolicy`) cost `macs_fraction` on average; None where they never do."""

    def cost(rate: float) -> float:
        routes = RandomPolicy(backbone.column_costs, rate).route(inputs)
        return float(backbone.run_route(inputs, routes).macs.double().mean()) / backbone.dense_macs

    if not cost(0.0) <= macs_fraction <= cost(1.0):
        return None
    # By bisection in log-odds: of many choices all but the cheapest grow rare only as a power of a small rate.
    low, high = -30.0, 30.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(_rate(middle)) < macs_fraction else (low, middle)
    return _rate((low + high) / 2)


def _rate(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


def static_tries(backbone: Backbone) -> tuple[int, int]:
    """How many routes `static_routes` tries at most, and how many it returns at most."""
    if backbone.max_steps > LONG:
        count = len(spaced_routes(backbone))
        return count, count
    steps = backbone.max_steps * (backbone.num_choices - 1)
    return 1 + steps * (steps + 1) // 2, 1 + steps


def spaced_routes(backbone: Backbone) -> list[tuple[int, ...]]:
    """Static routes for long walks: the full network's choice at the first, the last or evenly spaced steps, from all
    of them to none, and the cheapest choice at the others.
    """
    steps, last = backbone.max_steps, len(backbone.points) - 1
    cheapest = [int(backbone.costs[min(t, last), : backbone.points[min(t, last)].n].argmin()) for t in range(steps)]
    routes: dict[tuple[int, ...], None] = {}  # in order, each once
    for part in range(LONG + 1):
        count = round(steps * part / LONG)
        for kept in (
            range(count),
            range(steps - count, steps),
            [t for t in range(steps) if (t + 1) * count // steps > t * count // steps],
        ):
            routes[tuple(backbone.full_route[t] if t in kept else cheapest[t] for t in range(steps))] = None
    return list(routes)


def static_routes(
    backbone: Backbone, split: Split, tick: Callable[[], Any] = lambda: None
) -> list[tuple[tuple[int, ...], float, float]]:
    """Smaller networks, found on validation data.

    Greedily: from the full route, again and again the one change of one choice that lowers the cost and keeps the
    log-likelihood highest, until no choice can be made cheaper. Of walks of more than `LONG` steps, whose single
    choices are too many, those of `spaced_routes`.

    Returns:
        [(route, MACs fraction, metric on `split`)], from dear to cheap. `tick` is called after each try.
    """

    def cost(route: tuple[int, ...]) -> float:
        return int(backbone.run_route(split.inputs[:1], torch.tensor([route])).macs) / backbone.dense_macs

    def judge(route: tuple[int, ...]) -> tuple[float, float]:
        """Mean log-likelihood and metric."""
        tick()
        scored = score_routes(backbone, StaticPolicy(route).route(split.inputs), split)
        return float(scored.likely.mean()), float(scored.metric.mean())

    if backbone.max_steps > LONG:
        found = [(route, cost(route), judge(route)[1]) for route in spaced_routes(backbone)]
        return sorted(found, key=lambda of: -of[1])
    route = backbone.full_route
    found = [(route, cost(route), judge(route)[1])]
    while True:
        changed = [
            (*route[:step], choice, *route[step + 1 :])
            for step in range(len(route)) for choice in range(backbone.num_choices) if choice != route[step]
        ]  # fmt: skip
        tried = [(*judge(other), other) for other in changed if cost(other) < cost(route)]
        if not tried:
            return found
        _, metric, route = max(tried)
        found.append((route, cost(route), metric))


def uniform_routes(
    backbone: Backbone, split: Split, tick: Callable[[], Any] = lambda: None
) -> list[tuple[tuple[int, ...], float, float]]:
    """The static routes that make the same choice at every step, such as the best single expert; closed ones as what
    runs in their place.

    Returns:
        [(route, MACs fraction, metric on `split`)], from dear to cheap, of equally dear ones the best first. `tick` is
        called after each.
    """
    found = []
    for choice in range(backbone.num_choices):
        route = (choice,) * backbone.max_steps
        scored = score_routes(backbone, StaticPolicy(route).route(split.inputs), split)
        found.append((route, float(scored.macs.mean()), float(scored.metric.mean())))
        tick()
    return sorted(found, key=lambda of: (-of[1], split.task.error(of[2])))


def affordable(found: Sequence[tuple[Any, float, float]], budget: float, task: Task) -> Any:
    """Of `found` (what, MACs fraction, metric) what has the least error within `budget`, of equals the cheapest; or
    None.
    """
    within = [(task.error(metric), macs, i) for i, (_, macs, metric) in enumerate(found) if macs <= budget]
    return found[min(within)[2]][0] if within else None


def oracle_candidates(
    backbone: Backbone, static: list[tuple[tuple[int, ...], float, float]], drawn: int = ORACLE_DRAWS
) -> list[tuple[int, ...]]:
    """What the oracle chooses from: the routes of `static_routes`, and `drawn` at random, from cheap to dear."""
    routes = draw_routes(backbone.column_costs, torch.linspace(0, 1, drawn), torch.Generator().manual_seed(0))
    return [route for route, _, _ in static] + [tuple(route) for route in routes.tolist()]


def oracle_routes(
    backbone: Backbone, split: Split, candidates: list[tuple[int, ...]], tick: Callable[[], Any] = lambda: None
) -> Tensor:
    """For each input the candidate route with the least `Task.error`, at `ORACLE_PRICE` for its MACs. Sees the targets.

    In classification that is the cheapest route that is right, else the cheapest of all. In regression errors are of
    any size, and without a price the oracle would pay the dense network's compute for the last digit.

    Returns:
        [n, max_steps].
    """
    best = torch.full((len(split),), float("inf"))
    chosen = torch.zeros(len(split), backbone.max_steps, dtype=torch.int64)
    for candidate in candidates:
        routes = StaticPolicy(candidate).route(split.inputs)
        scored = score_routes(backbone, routes, split)
        cost = split.task.error(scored.metric) + ORACLE_PRICE * scored.macs
        better = cost < best
        best = torch.where(better, cost, best)
        chosen[better] = torch.tensor(candidate)
        tick()
    return chosen


# Time -------------------------------------------------------------------------------------------------------


def medians_in_turn(
    sides: dict[Any, Callable[[], Any]],
    rounds: int,
    tick: Callable[[], Any] = lambda: None,
    wait: Callable[[], Any] = lambda: None,
    calls: int = 1,
) -> dict[Any, float]:
    """Median milliseconds of each side, all sides timed each round, in a new order.

    In turn, since a machine's speed drifts: sides timed one after the other meet different machines. Each timed call
    follows one of the same side that is not, so that no side pays for what another left in caches and memory.

    Args:
        sides: what to time.
        rounds: how often.
        tick: called after each round.
        wait: called before each reading of the clock: for a device that works on its own.
        calls: of a side that are timed in a row: more of them tell what one costs that is called again and again.
    """
    times: dict[Any, list[float]] = {name: [] for name in sides}
    order, names = random.Random(0), list(sides)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            side = sides[name]
            side()
            wait()
            for _ in range(calls):
                start = time.perf_counter()
                side()
                wait()
                times[name].append((time.perf_counter() - start) * 1e3)
        tick()
    return {name: statistics.median(values) for name, values in times.items()}


def captured(side: Callable[[], Any], repeats: int) -> Callable[[], Any]:
    """`repeats` calls of `side` as one CUDA graph: its time on the device, without that of launching it from Python.

    Ops inside read counts from device memory (`device_counts`).
    """
    with device_counts():
        for _ in range(2):  # tiles are chosen, plans are made
            side()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                side()
    return graph.replay


@torch.inference_mode()
def step_times(
    backbone: Backbone,
    inputs: Tensor,
    rounds: int = 11,
    tick: Callable[[], Any] = lambda: None,
    wait: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """What each choice takes on this machine: the latency table that a reward may charge instead of MACs.

    At each point every row of a batch that has come along the full route takes the same choice.

    Args:
        backbone: its `for_inference` copy is timed.
        inputs: a batch, as large as the model will meet.
        rounds: each choice is timed once in each, in a new order; `tick` is called after it. Medians count.
        wait: called before each reading of the clock: for a device that works on its own.

    Returns:
        {"start": ms, "choices": [[ms of each choice] of each point]}, of the whole batch.
    """
    frozen, walks = backbone.for_inference(), 0
    times: dict[tuple[int, int], list[float]] = {}
    full = torch.tensor(frozen.full_route, device=inputs.device)

    def clock() -> float:
        wait()
        return time.perf_counter()

    for _ in range(rounds + 1):
        start = clock()
        state = frozen.begin(inputs)
        times.setdefault((END, 0), []).append(clock() - start)
        while state.point != END:
            choices = list(range(frozen.points[state.point].n))
            random.Random(walks).shuffle(choices)
            walks += 1
            for choice in choices:
                branch, action = state.copy(), torch.full_like(state.rows, choice)
                start = clock()
                frozen.advance(branch, action)
                times.setdefault((state.point, choice), []).append(clock() - start)
            (state,) = frozen.advance(state, full[state.walk.steps])
        tick()
    # The first round warms up. A loop's point is met many times in each.
    ms = {key: 1e3 * statistics.median(taken[len(taken) // (rounds + 1) :]) for key, taken in times.items()}
    return {
        "start": ms[END, 0],
        "choices": [[ms[point, choice] for choice in range(p.n)] for point, p in enumerate(frozen.points)],
    }


def dense_sides(backbone: Backbone, inputs: Tensor) -> dict[str, Callable[[], Any]]:
    """What to time as the dense network on `inputs`, of which the fastest counts: images in both memory formats, and
    whatever else computes the same (`Backbone.dense_twins`).
    """
    route = backbone.dense_actions(len(inputs), inputs.device)
    formats = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last} if inputs.dim() == 4 else {}
    sides = {}
    for name, form in (formats or {"contiguous": torch.contiguous_format}).items():
        network: Any = copy.deepcopy(backbone).to(memory_format=form)  # type: ignore[call-overload]
        sides[f"dense {name}"] = network.ideal(inputs.contiguous(memory_format=form), route)
    return sides | {f"dense {name}": side for name, side in backbone.dense_twins(inputs).items()}
