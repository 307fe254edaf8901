"""Random routes are what backbones are trained on and what learned routes must beat. Prices are drawn here, too."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_routes(costs: Tensor, rate: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw routes of independent choices: the cheapest at rate 0, any choice alike at 1/2, the dearest at rate 1.

    A choice is drawn with probability in proportion to rate^s (1 - rate)^(1 - s). Here s in [0, 1] says where the cost
    of the choice lies between the column's least and greatest cost. If there are two choices, the dearer one has the
    probability `rate`. Among all draws that spend as much on average, these have the most entropy. Choices that cost
    the same are equally likely.

    Args:
        costs: [columns, choices], the cost of each choice in each column; negative where there is no such choice.
        rate: [B] in [0, 1], the rate of each route.
        generator: the source of the draws.

    Returns:
        [B, columns] int64, a choice for each column of each route.
    """
    missing, costs, rate = costs < 0, costs.double(), rate.double().view(-1, 1, 1)
    high = costs.amax(1, keepdim=True)
    low = costs.where(~missing, high).amin(1, keepdim=True)
    span = (high - low).where(high > low, 1)  # where all choices cost the same, both exponents are 0
    odds = (rate ** ((costs - low) / span) * (1 - rate) ** ((high - costs) / span)).masked_fill(missing, 0)
    return torch.multinomial(odds.flatten(0, 1), 1, generator=generator).view(len(rate), -1)


def draw_prices(price_range: tuple[float, float], count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw [count] prices of compute, uniform in their logarithm."""
    low, high = map(math.log, price_range)
    return torch.exp(low + (high - low) * torch.rand(count, generator=generator))
