"""The kinds of policies: those that decide step by step, those that give whole routes, and those that are learned."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

CAP = 5.0  # logits stay within +-CAP, so that no choice's probability reaches 0 and its logarithm stays finite


class StepPolicy(nn.Module):
    """A policy that takes one decision from one observation.

    Args:
        features, points, choices: the observation's layout (`dynrl.observation.Layout`).
    """

    def __init__(self, features: int, points: int, choices: int) -> None:
        super().__init__()
        self.features, self.points, self.choices = features, points, choices
        self.price = features + points + 1 + choices + 1  # its column

    @property
    def width(self) -> int:
        """Length of an observation."""
        return self.price + 1 + self.choices

    def act(self, observation: Tensor) -> Tensor:
        """[n] int64, the choice of each row of `observation` [n, width]."""
        raise NotImplementedError


class RoutePolicy(nn.Module):
    """A policy that gives whole routes at once, before the walk begins."""

    def route(self, inputs: Tensor) -> Tensor:
        """[B, max_steps] int64, the actions for `inputs` [B, ...]."""
        raise NotImplementedError


class LearnedPolicy(nn.Module):
    """What agents train: a policy that is told the price of compute, which is the last column that it reads.

    Attributes:
        kind: its name in files.
        config: JSON-able keyword arguments that rebuild it.
        price_range: lowest and highest price, the same if there is but one; the policy sees its logarithm, scaled to
            [-1, 1].
        width: length of an observation.
        price: column of the price in it.
        decisions: how many one observation is for.
        choices: of the decision that has most.
    """

    kind: ClassVar[str]
    config: dict[str, Any]
    width: int
    price: int
    decisions: int
    choices: int

    def _set_price_range(self, price_range: tuple[float, float]) -> None:
        low, high = price_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"expected a price range with 0 < low <= high, got {tuple(price_range)}")
        self.price_range = (float(low), float(high))
        self._log_middle = (math.log(high) + math.log(low)) / 2
        self._log_reach = (math.log(high) - math.log(low)) / 2 or 1.0  # of one price the policy is told nothing

    def trunk(self, observation: Tensor) -> Tensor:
        """[n, price + 1]: the observation without its mask, its price as a centred logarithm."""
        seen = observation[:, : self.price + 1].clone()
        seen[:, self.price] = (observation[:, self.price].log() - self._log_middle) / self._log_reach
        return seen

    def scores(self, observation: Tensor) -> Tensor:
        """[n, width] float32 to [n, decisions * choices], without the cap; closed choices get -1e9."""
        return self._scores(observation) + self._closed(observation)

    def forward(self, observation: Tensor) -> Tensor:
        """[n, width] float32 to logits [n, decisions * choices] within +-CAP; closed choices get -1e9."""
        return CAP * torch.tanh(self._scores(observation) / CAP) + self._closed(observation)

    def act(self, observation: Tensor) -> Tensor:
        """The likeliest choice of each row [n], or choices [n, decisions]; without the cap, which changes no order."""
        raise NotImplementedError

    def _scores(self, observation: Tensor) -> Tensor:
        """[n, decisions * choices], without cap and mask."""
        raise NotImplementedError

    def _closed(self, observation: Tensor) -> Tensor:
        """0 for open choices, -1e9 for closed ones; to be added to scores."""
        raise NotImplementedError
