"""Random routes: what backbones are trained on, and what learned routes must beat. Random prices of their compute."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_routes(costs: Tensor, rate: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Routes of independent choices, from the cheapest (rate 0) over any choice alike (1/2) to the dearest (rate 1).

    Choice c is drawn with probability in proportion to rate^s (1 - rate)^(1 - s), where s in [0, 1] is how far its cost
    is from the step's least to its greatest: of two choices the dearer one with probability `rate`. Of all draws that
    spend as much at a step, on average, these have the most entropy. Choices that cost the same are equally likely.

    Args:
        costs: [T, n], what each choice costs at each step; negative where there is no such choice.
        rate: [B] in [0, 1].
        generator: of what is drawn.

    Returns:
        [B, T] int64.
    """
    missing, costs, rate = costs < 0, costs.double(), rate.double().view(-1, 1, 1)
    high = costs.amax(1, keepdim=True)
    low = costs.where(~missing, high).amin(1, keepdim=True)
    span = (high - low).clamp_min(1)  # where nothing differs both exponents are 0
    odds = (rate ** ((costs - low) / span) * (1 - rate) ** ((high - costs) / span)).masked_fill(missing, 0)
    return torch.multinomial(odds.flatten(0, 1), 1, generator=generator).view(len(rate), -1)


def draw_prices(price_range: tuple[float, float], count: int, generator: torch.Generator | None = None) -> Tensor:
    """[count] prices of compute, uniform in their logarithm."""
    low, high = map(math.log, price_range)
    return torch.exp(low + (high - low) * torch.rand(count, generator=generator))
