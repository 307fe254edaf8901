"""The learned policy that decides step by step: a small network from one observation to one choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dynrl.policies.base import LearnedPolicy, StepPolicy


class Router(LearnedPolicy, StepPolicy):
    """Two linear layers, or one. The module that RLlib trains is the module that is deployed.

    Args:
        features, points, choices: the observation's layout (`dynrl.observation.Layout`).
        price_range: lowest and highest price.
        hidden: units of the hidden layer; 0 for one layer from observation to logits.
        start: the choice that an untrained router favours (e^2 to 1): the full network's. From a start without
            favour, early routes are too poor to learn from.

    Raises:
        ValueError: a price range that is not positive, or falls.
    """

    kind = "sequential"
    decisions = 1

    def __init__(
        self,
        features: int,
        points: int,
        choices: int,
        price_range: tuple[float, float],
        hidden: int = 64,
        start: int = 0,
    ) -> None:
        StepPolicy.__init__(self, features, points, choices)
        self._set_price_range(price_range)
        self.config = {
            "features": features, "points": points, "choices": choices, "price_range": list(self.price_range),
            "hidden": hidden, "start": start,
        }  # fmt: skip
        self.hidden = nn.Linear(self.price + 1, hidden) if hidden else None
        self.head = nn.Linear(hidden or self.price + 1, choices)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        with torch.no_grad():
            self.head.bias[start] = 2.0

    def _scores(self, observation: Tensor) -> Tensor:
        seen = self.trunk(observation)
        return self.head(seen if self.hidden is None else torch.relu_(self.hidden(seen)))

    def _closed(self, observation: Tensor) -> Tensor:
        """[n, choices]: 0 for open choices, -1e9 for closed ones."""
        return (observation[:, self.price + 1 :] - 1) * 1e9

    def act(self, observation: Tensor) -> Tensor:
        """The likeliest choice of each row (without the cap, which changes no order)."""
        return self.scores(observation).argmax(1)

    @torch.no_grad()
    def folded(self, price: float) -> tuple[Tensor, Tensor]:
        """The first layer's weight [units, columns before the price] and its bias [units] with this price in it."""
        first = self.head if self.hidden is None else self.hidden
        told = (math.log(price) - self._log_middle) / self._log_reach
        return first.weight[:, : self.price], first.bias + told * first.weight[:, self.price]
