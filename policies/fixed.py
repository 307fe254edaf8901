"""These policies look at nothing; learned routes must beat them."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.policies.base import RoutePolicy
from dynrl.routes import draw_routes


class RandomPolicy(RoutePolicy):
    """This policy draws each column's choice independently, the dearer the higher the rate (see `draw_routes`).

    Args:
        thrift: [columns, choices], how dear each choice is (`Backbone.thrift`).
        rate: a number in [0, 1]; where there are two choices, it is the probability of the dearer one.
        seed: the seed of the sequence of routes, which the first call starts.

    Raises:
        ValueError: the rate is no probability.
    """

    def __init__(self, thrift: Tensor, rate: float, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= rate <= 1:
            raise ValueError(f"expected a rate between 0 and 1, got {rate}")
        self.thrift, self.rate = thrift, rate
        self.generator = torch.Generator().manual_seed(seed)

    def route(self, inputs: Tensor) -> Tensor:
        """Return a random route for each input: [B, columns]."""
        rate = torch.full((len(inputs),), self.rate, dtype=torch.float64)  # float32 has nothing between 1 - 6e-8 and 1
        return draw_routes(self.thrift, rate, self.generator).to(inputs.device)


class StaticPolicy(RoutePolicy):
    """This policy gives every input the same route, which is a smaller network; unvisited columns may hold -1.

    Args:
        route: [columns], whole numbers: the choice in each column.

    Raises:
        ValueError: the route is something else, such as probabilities.
    """

    fixed: Tensor

    def __init__(self, route: Tensor | tuple[int, ...]) -> None:
        super().__init__()
        given = torch.as_tensor(route)
        if given.dim() != 1 or given.is_floating_point() or given.is_complex() or (given < -1).any():
            raise ValueError(
                f"expected a route [columns] of choices as whole numbers, got {given.dtype} {list(given.shape)}"
                f"{' with choices below -1' if given.dtype == torch.int64 and (given < -1).any() else ''}"
            )
        self.register_buffer("fixed", given.long().clamp_min(0))

    def route(self, inputs: Tensor) -> Tensor:
        """Return the route once for each input: [B, columns]."""
        return self.fixed.expand(len(inputs), -1)
