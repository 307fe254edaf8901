"""Policies that look at nothing: what learned routes must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.policies.base import RoutePolicy
from dynrl.routes import draw_routes


class RandomPolicy(RoutePolicy):
    """The full network's choice with probability `rate`, else one of the others at random.

    Args:
        full_route: the dense network's choice at each step.
        choices: of a point.
        rate: in [0, 1].
        seed: of the sequence of routes; the first call after construction starts it.
    """

    def __init__(self, full_route: tuple[int, ...], choices: int, rate: float, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= rate <= 1:
            raise ValueError(f"expected a rate between 0 and 1, got {rate}")
        self.full_route, self.choices, self.rate = full_route, choices, rate
        self.generator = torch.Generator().manual_seed(seed)

    def route(self, inputs: Tensor) -> Tensor:
        """A random route for each input."""
        rate = torch.full((len(inputs),), self.rate)
        return draw_routes(self.full_route, self.choices, rate, self.generator).to(inputs.device)


class StaticPolicy(RoutePolicy):
    """The same route for every input: a smaller network."""

    fixed: Tensor

    def __init__(self, route: Tensor | tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.as_tensor(route, dtype=torch.int64))

    def route(self, inputs: Tensor) -> Tensor:
        """That route, once for each input."""
        return self.fixed.expand(len(inputs), -1)
