"""These functions time several sides in turn, the dense network, and each choice of a walk."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dynrl.backbones import END, Backbone, State
from dynrl.ops.backend import device_counts


def medians_in_turn(
    sides: dict[Any, Callable[[], Any]],
    rounds: int,
    tick: Callable[[], Any] = lambda: None,
    wait: Callable[[], Any] = lambda: None,
    calls: int = 1,
) -> dict[Any, float]:
    """Time all sides in each round, in a new order each time, and return each side's median in milliseconds.

    A machine's speed drifts, so sides that are timed one after the other would not be comparable. Before a side is
    timed, it is called once untimed, so that no side pays for what another left in caches and memory.

    Args:
        sides: the functions to time, by any key.
        rounds: how often each side is timed.
        tick: called after each round.
        wait: called before each reading of the clock; a device that works asynchronously is waited for here.
        calls: how many calls of a side are timed in a row; several tell what a call costs that is repeated.
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
    """Capture `repeats` calls of `side` as one CUDA graph, whose replay is timed without launches from Python.

    The ops inside read counts from device memory (`device_counts`).
    """
    with device_counts():
        for _ in range(2):  # the first calls choose tiles and make plans, which a capture cannot
            side()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                side()
    return graph.replay


def dense_sides(backbone: Backbone, inputs: Any) -> dict[str, Callable[[], Any]]:
    """Return the ways to compute the dense network on `inputs`; reports count the fastest.

    Images are computed in both memory formats. A family may add other ways that compute the same
    (`Backbone.dense_twins`).
    """
    route = backbone.dense_actions(len(inputs), inputs.device)
    formats = {"contiguous": torch.contiguous_format}
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        formats = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    sides = {}
    for name, form in formats.items():
        network: Any = copy.deepcopy(backbone).to(memory_format=form)  # type: ignore[call-overload]
        given = inputs.contiguous(memory_format=form) if isinstance(inputs, Tensor) else inputs
        sides[f"dense {name}"] = network.ideal(given, route)
    return sides | {f"dense {name}": side for name, side in backbone.dense_twins(inputs).items()}


@torch.inference_mode()
def step_times(
    backbone: Backbone,
    inputs: Tensor,
    rounds: int = 11,
    tick: Callable[[], Any] = lambda: None,
    wait: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Time each choice on this machine; a reward may charge these times instead of MACs.

    A batch walks along the full route. At each point on this route, each choice is timed, and all rows take it. A point
    that the full route never meets is reached by the shortest way and timed there.

    Args:
        backbone: the network; its `for_inference` copy is timed.
        inputs: a batch, as large as the model will meet.
        rounds: how often each choice is timed, at a loop's point in each visit; medians count.
        tick: called after each round, and after the extra round that warms up.
        wait: called before each reading of the clock; a device that works asynchronously is waited for here.

    Returns:
        {"start": ms, "choices": [[ms of each choice] of each point]}, milliseconds for the whole batch.
    """
    frozen, shuffle = backbone.for_inference(), random.Random(0)
    times: dict[tuple[int, int], list[float]] = {}
    closed: dict[tuple[int, int], list[float]] = {}  # the times of what ran in place of a closed choice

    def timed(run: Callable[[], Any]) -> float:
        wait()
        start = time.perf_counter()
        run()
        wait()
        return 1e3 * (time.perf_counter() - start)

    ways = detours(frozen, inputs)
    for _ in range(rounds + 1):
        times.setdefault((END, 0), []).append(timed(lambda: frozen.begin(inputs)))
        for state in _stations(frozen, inputs, ways):
            choices = list(range(frozen.points[state.point].n))
            shuffle.shuffle(choices)
            for choice in choices:
                branch, action = frozen.ready(state.copy()), torch.full_like(state.rows, choice)
                mask = frozen.open_choices(state)
                kept = times if mask is None or bool(mask[:, choice].all()) else closed
                key = (state.point, choice)
                kept.setdefault(key, []).append(timed(lambda: frozen.advance(branch, action)))  # noqa: B023 (runs now)
        tick()

    def median(point: int, choice: int) -> float:
        taken = times.get((point, choice)) or closed[point, choice]
        return statistics.median(taken[len(taken) // (rounds + 1) :])  # the first round only warms up

    return {
        "start": median(END, 0),
        "choices": [[median(point, choice) for choice in range(p.n)] for point, p in enumerate(frozen.points)],
    }


Way = list[tuple[int, int]]  # from the first point on: the choice that all rows take, and the point it leads to


def detours(backbone: Backbone, inputs: Tensor) -> dict[int, Way]:
    """Find a shortest way to each point that the full route never meets, by a breadth-first search of choices."""
    missing = set(range(len(backbone.points))) - {state.point for state in _full_walk(backbone, inputs)}
    found: dict[int, Way] = {}
    start = backbone.begin(inputs)
    waiting: deque[tuple[State, Way]] = deque([(start, [])])
    tried = {(start.point, 0)}  # (point, number of decisions): ways that meet again continue alike
    while waiting and missing - set(found):
        state, way = waiting.popleft()
        for choice in range(backbone.points[state.point].n):
            for reached in backbone.advance(state.copy(), torch.full_like(state.rows, choice)):
                place = (reached.point, len(way) + 1)
                if reached.count == 0 or reached.point == END or place in tried:
                    continue
                tried.add(place)
                waiting.append((reached, [*way, (choice, reached.point)]))
                if reached.point in missing:
                    found.setdefault(reached.point, waiting[-1][1])
    if left := missing - set(found):
        raise ValueError(
            f"no way leads to {[backbone.points[point].name for point in sorted(left)]}, so these points cannot be "
            "timed; train with --cost macs"
        )
    return found


def _stations(backbone: Backbone, inputs: Tensor, ways: dict[int, Way]) -> Iterator[State]:
    """Yield the batch's state at each visit along the full route, then at the end of each of `ways`."""
    yield from _full_walk(backbone, inputs)
    for way in ways.values():
        state = backbone.begin(inputs)
        for choice, point in way:
            reached = backbone.advance(state, torch.full_like(state.rows, choice))
            state = next(part for part in reached if part.point == point)
        yield state


def _full_walk(backbone: Backbone, inputs: Tensor) -> Iterator[State]:
    """Yield the state at each visit along the full route; where rows part, the larger group is followed."""
    route, state = backbone.dense_actions(len(inputs), inputs.device), backbone.begin(inputs)
    while state.point != END:
        yield state
        state = max(backbone.advance(state, state.along(route)), key=lambda part: part.count)
