"""The upfront router is the learned policy that decides a whole route at once, from a small view of the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynrl.policies.base import LearnedPolicy
from dynrl.policies.sight import RouteSight


class UpfrontRouter(LearnedPolicy):
    """An upfront router has two convolutions and two linear layers, from at most 16 x 16 pixels to choices.

    Each decision is an independent categorical draw; with two choices, this is BlockDrop's Bernoulli policy (Wu et al.
    2018, CVPR, section 3.1).

    The arguments are those of `LearnedPolicy`.
    """

    sight_class = RouteSight
    sight: RouteSight

    def __init__(
        self, sight: RouteSight, price_range: tuple[float, float], hidden: int = 64, start: list[int] | None = None
    ) -> None:
        super().__init__(sight, price_range, hidden, start or [0] * sight.decisions)
        channels, height, width = sight.view
        self.eye = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Flatten(),
        )  # fmt: skip
        seen = 32 * -(-height // 4) * -(-width // 4) + 1
        self.hidden = nn.Linear(seen, hidden) if hidden else None
        # The price enters once more here, because it moves all rates at once; among hundreds of features, that would be
        # learned late.
        self.head = nn.Linear(hidden + 1 if hidden else seen, sight.decisions * sight.choices)
        self._favour(self.head)

    def _scores(self, observation: Tensor) -> Tensor:
        seen, price = self.trunk(observation), self.sight.price
        image, told = seen[:, :price].unflatten(1, self.sight.view), seen[:, price:]
        features = torch.cat([self.eye(image), told], 1)
        if self.hidden is not None:
            features = torch.cat([torch.relu_(self.hidden(features)), told], 1)
        scores: Tensor = self.head(features)
        return scores
