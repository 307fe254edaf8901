"""Policies that look at nothing: what learned routes must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.policies.base import RoutePolicy
from dynrl.routes import draw_routes


class RandomPolicy(RoutePolicy):
    """Choices drawn independently in each column, from the cheapest (rate 0) to the dearest (rate 1): `draw_routes`.

    Args:
        thrift: [columns, choices], how dear each choice is (`Backbone.thrift`).
        rate: in [0, 1]; of two choices the dearer one's probability.
        seed: of the sequence of routes; the first call after construction starts it.

    Raises:
        ValueError: a rate that is no probability.
    """

    def __init__(self, thrift: Tensor, rate: float, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= rate <= 1:
            raise ValueError(f"expected a rate between 0 and 1, got {rate}")
        self.thrift, self.rate = thrift, rate
        self.generator = torch.Generator().manual_seed(seed)

    def route(self, inputs: Tensor) -> Tensor:
        """A random route for each input."""
        rate = torch.full((len(inputs),), self.rate, dtype=torch.float64)  # float32 has nothing between 1 - 6e-8 and 1
        return draw_routes(self.thrift, rate, self.generator).to(inputs.device)


class StaticPolicy(RoutePolicy):
    """The same route for every input: a smaller network. A column where it never goes may hold -1."""

    fixed: Tensor

    def __init__(self, route: Tensor | tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.as_tensor(route, dtype=torch.int64).clamp_min(0))

    def route(self, inputs: Tensor) -> Tensor:
        """That route, once for each input."""
        return self.fixed.expand(len(inputs), -1)
