"""Prices are found on a backbone before a policy learns: a range from spending all to spending as little as can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynrl.backbones import Backbone
from dynrl.data import Split
from dynrl.evaluation.routes import cheapest_choices
from dynrl.policies import RandomPolicy
from dynrl.tasks import Task

# From task, output [n, ...], target [n, ...] and what gives the dense network's output, to the accuracy term [n].
Accuracy = Callable[[Task, Tensor, Tensor, Callable[[], Tensor]], Tensor]
# What is measured are means over inputs: some gain more from compute than the mean, and many lose less without it.
ABOVE, BELOW = 4.0, 10.0
WIDEST = 1e4  # the highest price over the lowest, at most: a policy has to tell prices apart
NOTHING = 0.01  # the highest price where compute gains nothing
RATES = (0.1, 0.25, 0.5, 0.75, 0.9)
COLUMNS = 16  # in so many at most a choice is changed alone
ROWS = 512


@torch.inference_mode()
def find_price_range(backbone: Backbone, split: Split, accuracy: Accuracy) -> tuple[float, float]:
    """Find the prices of compute between which a policy goes from spending all to spending its least.

    A policy pays for more compute as long as what it gains in the reward's accuracy term is worth the price. So the
    steepest gain per compute over the cheapest route bounds the highest price, and the flattest loss below the full
    route the lowest; a choice that loses nothing is made at any price. Both are measured as means over inputs, on
    random routes of several rates and on the full route with one choice made cheap.

    Args:
        backbone: as pretrained.
        split: validation data; the first `ROWS` are walked.
        accuracy: the reward's term, see `Reward.accuracy`.

    Returns:
        lowest and highest price, each of one significant digit, so that a machine's rounding changes nothing.
    """
    network, split = backbone.for_inference(), split.head(ROWS)
    inputs = split.inputs[:]
    full, cheapest = backbone.dense_actions(1)[0].cpu(), cheapest_choices(backbone)
    said = network.run_route(inputs, full.expand(len(split), -1)).outputs
    assert said is not None

    def measure(routes: Tensor) -> tuple[float, float]:
        """Return the mean accuracy term, and the share of the dense MACs."""
        walk = network.run_route(inputs, routes.expand(len(split), -1))
        assert walk.outputs is not None
        term = accuracy(split.task, walk.outputs.float(), split.targets, said.float)
        return float(term.double().mean()), float(walk.macs.double().mean()) / backbone.dense_macs

    most, least = measure(full), measure(cheapest)
    between = [measure(RandomPolicy(backbone.thrift, rate).route(split.inputs)) for rate in RATES]
    lone = torch.linspace(0, backbone.columns - 1, min(COLUMNS, backbone.columns)).long()
    changed = torch.eye(backbone.columns, dtype=torch.bool)[lone]
    below = [measure(route) for route in torch.where(changed, cheapest, full)]
    gains = _slopes((least, other) for other in (*between, most))
    losses = [loss for loss in _slopes((other, most) for other in (*between, *below, least)) if loss > 0]
    high = max([NOTHING, *(ABOVE * gain for gain in gains)])
    low = min([high, *losses]) / BELOW
    return _one_digit(max(low, high / WIDEST), math.floor), _one_digit(high, math.ceil)


def _slopes(pairs: Iterable[tuple[tuple[float, float], tuple[float, float]]]) -> list[float]:
    """Give what the dearer route of each pair (accuracy, share) gains per share; none where it is not dearer."""
    return [(dear[0] - cheap[0]) / (dear[1] - cheap[1]) for cheap, dear in pairs if dear[1] > cheap[1]]


def _one_digit(price: float, rounded: Callable[[float], int]) -> float:
    """Round to one significant digit."""
    exponent = math.floor(math.log10(price))
    return float(f"{rounded(round(price / 10.0**exponent, 6))}e{exponent}")
