"""Random routes: what backbones are trained on, and what learned routes must beat. Random prices of their compute."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_routes(
    full_route: tuple[int, ...], choices: int, rate: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """[B, max_steps] actions: the full network's choice with probability `rate` [B], else another at random."""
    full = torch.tensor(full_route).expand(len(rate), -1)
    other = torch.randint(1, choices, full.shape, generator=generator)
    leave = torch.rand(full.shape, generator=generator) >= rate.unsqueeze(1)
    return torch.where(leave, (full + other) % choices, full)


def draw_prices(price_range: tuple[float, float], count: int, generator: torch.Generator | None = None) -> Tensor:
    """[count] prices of compute, uniform in their logarithm."""
    low, high = map(math.log, price_range)
    return torch.exp(low + (high - low) * torch.rand(count, generator=generator))
