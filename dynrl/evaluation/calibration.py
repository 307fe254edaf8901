"""Calibration measures what a policy spends at each price; budgets are looked up in those curves."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from dynrl.data import Split
from dynrl.deploy import RoutedModel
from dynrl.evaluation import timing
from dynrl.evaluation.scores import score


def calibrate(
    model: RoutedModel, split: Split, points: int = 17, gap: float = 0.03, tick: Callable[[], Any] = lambda: None
) -> list[tuple[float, float]]:
    """Measure the MACs fraction over the price range: the curve in which `set_budget` finds a price.

    Args:
        model: a routed model whose policy knows a price.
        split: validation data.
        points: how many prices are tried at first, evenly spaced in their logarithm.
        gap: then a price is tried halfway between neighbours that are further apart than this share of the dense MACs,
            until there are none or their prices differ by less than half a thousandth.
        tick: is called after each price.

    Returns:
        [(price, MACs fraction)], prices rising. The model has it as its curve, too.
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
    """Tell what a calibrated policy has failed to learn, with advice; None if nothing is amiss.

    A policy may end up deaf to the price (one point instead of a front) or to the inputs (one route for all: a static
    network, which needs no router). Reinforcement learning stays there, since nothing else is tried any more.
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
    """Time a batch at each price of `model.curve`: the curve in which `set_milliseconds` finds a price.

    Args:
        model: a calibrated model.
        inputs: validation data, at least one batch. Each call takes other rows of it: a plugged model meets new
            batches, too, whose routes set sizes that no layer has seen, and one batch may be easier than most.
        batch_size: rows of a batch.
        rounds: how often each price is timed, see `medians_in_turn`.
        tick: is called after each round.

    Returns:
        [(price, milliseconds)], prices rising and times falling. A dearer price takes no longer, so medians that say
        otherwise are noise, and all are put in order (rearrangement: Chernozhukov et al. 2009, Biometrika).
    """
    draw = random.Random(0)

    def at(price: float) -> None:
        if model.price != price:  # in the call before the timed ones
            model.set_price(price)
        start = draw.randint(0, len(inputs) - batch_size)
        model(inputs[start : start + batch_size])

    before, prices = model.price, [price for price, _ in model.curve]
    times = timing.medians_in_turn({price: partial(at, price) for price in prices}, rounds, tick, calls=5)
    model.set_price(before)
    return list(zip(prices, sorted(times.values(), reverse=True), strict=True))
