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
from dynrl.progress import progress
from dynrl.schema import MOST_ROWS, check_count

ASKED = 5  # at how many prices of its curve a policy is asked whether its routes differ
COLLAPSED = 0.02  # a policy whose spending at all prices differs by less than this share of its most is deaf to them
ROUNDS = 5  # how often each price is timed


def calibrate(
    model: RoutedModel, split: Split, points: int = 17, gap: float = 0.03, tick: Callable[[], Any] = lambda: None
) -> list[tuple[float, float]]:
    """Measure what share of the dense MACs the policy spends at each price; `set_budget` looks prices up in this curve.

    Args:
        model: a routed model whose policy knows a price.
        split: validation data.
        points: how many prices are tried at first, evenly spaced in their logarithm.
        gap: neighbours on the curve that differ by more than this share of the dense MACs get another price between
            them, until no such gap is left or the prices differ by less than half a thousandth.
        tick: called after each price.

    Returns:
        [(price, MACs fraction)], by rising price. The model's `curve` is set to the same list.
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


def is_deaf(model: RoutedModel) -> bool:
    """Tell whether the price changes nothing: a calibrated policy spends the same at all prices."""
    macs = [spent for _, spent in model.curve]
    return len(macs) > 1 and max(macs) - min(macs) < COLLAPSED * max(macs)


def collapse(model: RoutedModel, split: Split) -> str | None:
    """Say what a calibrated policy has failed to learn, with advice; return None if nothing is wrong.

    A policy may end up ignoring the price: it then has one point instead of a front. It may also end up ignoring the
    inputs: all of them take one route, which is a static network and needs no router. Reinforcement learning does not
    recover from either state, because such a policy tries nothing else any more.
    """
    macs = [spent for _, spent in model.curve]
    reach = f"{min(macs):.2g} to {max(macs):.2g} of the dense MACs"
    if is_deaf(model):
        return (
            f"collapsed: the price changes nothing (the policy spends {reach}). Widen the price range "
            "(--price-range): the lowest price should make the policy spend everything, the highest almost nothing. "
            "Or train for more steps"
        )
    before, routes = model.price, 0
    for i in range(ASKED):
        model.set_price(model.curve[i * (len(macs) - 1) // (ASKED - 1)][0])
        routes = max(routes, score(model, split).distinct_routes)
    model.set_price(before)
    if routes > 1:
        return None
    return (
        f"collapsed: every input takes the same route at each price (the policy spends {reach}). Train for more steps "
        "or with another seed; TensorBoard shows when routes/distinct fell. If this happens again, the inputs may not "
        "differ in what they need: then the static routes of the report are as good"
    )


def calibrate_latency(model: RoutedModel, inputs: Tensor, batch_size: int) -> list[tuple[float, float]]:
    """Time a batch at each price of `model.curve`; `set_milliseconds` looks prices up in the result.

    Args:
        model: a calibrated model.
        inputs: validation data, at least one batch. Each call takes different rows, because a plugged model meets new
            batches too, whose routes give layers batch sizes that they have not seen, and because one batch may be
            easier than most.
        batch_size: rows of a batch.

    Returns:
        [(price, milliseconds)], by rising price and falling time. A higher price cannot take longer, so medians that
        say otherwise are noise; the times are sorted (rearrangement: Chernozhukov et al. 2009, Biometrika).

    Raises:
        ValueError: a batch has no row, or there are fewer inputs.
    """
    check_count("batch_size", batch_size, 1, MOST_ROWS)
    if len(inputs) < batch_size:
        raise ValueError(f"a batch of {batch_size} is larger than the {len(inputs)} validation inputs")
    draw = random.Random(0)

    def at(price: float) -> None:
        if model.price != price:  # true only in the call that precedes the timed ones
            model.set_price(price)
        start = draw.randint(0, len(inputs) - batch_size)
        model(inputs[start : start + batch_size])

    before, prices = model.price, [price for price, _ in model.curve]
    with progress(total=ROUNDS, desc="timing", unit="round") as bar:
        times = timing.medians_in_turn({price: partial(at, price) for price in prices}, ROUNDS, bar.update, calls=5)
    model.set_price(before)
    return list(zip(prices, sorted(times.values(), reverse=True), strict=True))
