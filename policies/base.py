"""The two kinds of policies: those that decide step by step, and those that give whole routes."""

from __future__ import annotations

from torch import Tensor, nn


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
