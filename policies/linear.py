"""A linear rule scores the choices at each point by what it sees there; supervision fits it, not reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynrl.policies.base import Policy
from dynrl.policies.sight import StepSight


class LinearPolicy(Policy):
    """This policy takes the choice with the highest score, which is linear in the features of the point.

    Args:
        sight: what the policy sees.
        weight: [points, choices, features].
        bias: [points, choices].
    """

    sight: StepSight

    def __init__(self, sight: StepSight, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.sight = sight
        self.layer = nn.Linear(sight.features, sight.points * sight.choices)
        with torch.no_grad():
            self.layer.weight.copy_(weight.flatten(0, 1))
            self.layer.bias.copy_(bias.flatten())

    def forward(self, observation: Tensor) -> Tensor:
        """Map [n, width] to scores [n, 1, choices]; closed choices get -1e9."""
        features = self.sight.features
        scores: Tensor = self.layer(observation[:, :features])
        scores = scores.unflatten(1, (self.sight.points, self.sight.choices))
        here = observation[:, features : features + self.sight.points].unsqueeze(2)
        return (scores * here).sum(1, keepdim=True) + (self.sight.mask(observation) - 1) * 1e9

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """Return a `Policy.chooser` that looks at every state."""
        return self.sight.follow(backbone, lambda seen: self(seen).argmax(2), 1.0)
