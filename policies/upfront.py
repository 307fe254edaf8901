"""The learned policy that decides all at once: a small network from the input, seen small, to a whole route."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynrl.policies.base import LearnedPolicy


class UpfrontRouter(LearnedPolicy):
    """Two convolutions and two linear layers, from an image of some 16 x 16 pixels to independent choices.

    Each decision is a categorical draw of its own; of two choices that is BlockDrop's Bernoulli policy (Wu et al. 2018,
    CVPR, section 3.1).

    Args:
        view: (channels, height, width) of what is seen (`dynrl.observation.View`).
        counts: choices of each decision.
        price_range: lowest and highest price.
        hidden: units of the layer behind the convolutions; 0 for none.
        start: [decisions], the route that an untrained policy favours (e^2 to 1): the full network's.

    Raises:
        ValueError: a price range that is not positive or falls, or a start that is no route.
    """

    kind = "upfront"
    closed: Tensor

    def __init__(
        self,
        view: Sequence[int],
        counts: Sequence[int],
        price_range: tuple[float, float],
        hidden: int = 64,
        start: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self._set_price_range(price_range)
        start = [0] * len(counts) if start is None else list(start)
        if len(start) != len(counts) or not all(0 <= first < count for first, count in zip(start, counts, strict=True)):
            raise ValueError(f"expected a start within the choices of each decision, {list(counts)}, got {start}")
        self.view, self.counts, self.decisions, self.choices = tuple(view), tuple(counts), len(counts), max(counts)
        self.config = {
            "view": list(view), "counts": list(counts), "price_range": list(self.price_range), "hidden": hidden,
            "start": start,
        }  # fmt: skip
        channels, height, width = view
        self.price = channels * height * width
        self.width = self.price + 1
        self.eye = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Flatten(),
        )  # fmt: skip
        seen = 32 * -(-height // 4) * -(-width // 4) + 1
        self.hidden = nn.Linear(seen, hidden) if hidden else None
        # The price once more: it moves all rates at once, and among hundreds of features that would be learned late.
        self.head = nn.Linear(hidden + 1 if hidden else seen, self.decisions * self.choices)
        nn.init.normal_(self.head.weight, std=0.01)
        closed = torch.arange(self.choices) >= torch.tensor(counts).unsqueeze(1)
        self.register_buffer("closed", -1e9 * closed.float().flatten(), persistent=False)
        with torch.no_grad():
            bias = self.head.bias.zero_().view(self.decisions, self.choices)
            bias.scatter_(1, torch.tensor(start).unsqueeze(1), 2.0)

    def _scores(self, observation: Tensor) -> Tensor:
        seen = self.trunk(observation)
        image, price = seen[:, : self.price].unflatten(1, self.view), seen[:, self.price :]
        features = torch.cat([self.eye(image), price], 1)
        if self.hidden is not None:
            features = torch.cat([torch.relu_(self.hidden(features)), price], 1)
        scores: Tensor = self.head(features)
        return scores

    def _closed(self, observation: Tensor) -> Tensor:
        return self.closed

    def act(self, observation: Tensor) -> Tensor:
        """[n, decisions], the likeliest route of each row (without the cap, which changes no order)."""
        return self.scores(observation).view(-1, self.decisions, self.choices).argmax(2)
