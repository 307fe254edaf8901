"""The learned policy: a small network from one observation to one choice, and its file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynrl.files import load_tensors, save_tensors
from dynrl.policies.base import StepPolicy

CAP = 5.0  # logits stay within +-CAP, so that no choice's probability reaches 0 and its logarithm stays finite


class Router(StepPolicy):
    """Two linear layers, or one. The module that RLlib trains is the module that is deployed.

    Args:
        features, points, choices: the observation's layout (`dynrl.observation.Layout`).
        price_range: lowest and highest price; the router sees its logarithm, scaled to [-1, 1].
        hidden: units of the hidden layer; 0 for one layer from observation to logits.
        start: the choice that an untrained router favours (e^2 to 1): the full network's. From a start without
            favour, early routes are too poor to learn from.

    Raises:
        ValueError: a price range that is not positive and rising.
    """

    def __init__(
        self,
        features: int,
        points: int,
        choices: int,
        price_range: tuple[float, float],
        hidden: int = 64,
        start: int = 0,
    ) -> None:
        super().__init__(features, points, choices)
        low, high = price_range
        if not 0 < low < high < math.inf:
            raise ValueError(f"expected a price range with 0 < low < high, got {tuple(price_range)}")
        self.config = {
            "features": features, "points": points, "choices": choices, "price_range": [low, high],
            "hidden": hidden, "start": start,
        }  # fmt: skip
        self.price_range = (float(low), float(high))
        self._log_middle = (math.log(high) + math.log(low)) / 2
        self._log_reach = (math.log(high) - math.log(low)) / 2
        self.hidden = nn.Linear(self.price + 1, hidden) if hidden else None
        self.head = nn.Linear(hidden or self.price + 1, choices)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        with torch.no_grad():
            self.head.bias[start] = 2.0

    def trunk(self, observation: Tensor) -> Tensor:
        """[n, price + 1]: the observation without its mask, its price as a centred logarithm."""
        seen = observation[:, : self.price + 1].clone()
        seen[:, self.price] = (observation[:, self.price].log() - self._log_middle) / self._log_reach
        return seen

    def _scores(self, observation: Tensor) -> Tensor:
        seen = self.trunk(observation)
        return self.head(seen if self.hidden is None else torch.relu_(self.hidden(seen)))

    def _closed(self, observation: Tensor) -> Tensor:
        """[n, choices]: 0 for open choices, -1e9 for closed ones."""
        return (observation[:, self.price + 1 :] - 1) * 1e9

    def forward(self, observation: Tensor) -> Tensor:
        """[n, width] float32 to logits [n, choices]; closed choices get -1e9."""
        return CAP * torch.tanh(self._scores(observation) / CAP) + self._closed(observation)

    def act(self, observation: Tensor) -> Tensor:
        """The likeliest choice of each row (without the cap, which changes no order)."""
        return (self._scores(observation) + self._closed(observation)).argmax(1)

    def at(self, price: float, masked: bool = True) -> Callable[[Tensor], Tensor]:
        """`act` for observations that all have this price, in half as many steps: it is folded into the biases.

        Args:
            price: within the range.
            masked: whether a choice may be closed.
        """
        weight, bias = self.folded(price)
        matrix = weight.t()
        with torch.no_grad():
            head, head_bias = self.head.weight.t(), self.head.bias

        def act(observation: Tensor) -> Tensor:
            scores = torch.addmm(bias, observation[:, : self.price], matrix)
            if self.hidden is not None:
                scores = torch.addmm(head_bias, scores.relu_(), head)
            return (scores + self._closed(observation) if masked else scores).argmax(1)

        return act

    @torch.no_grad()
    def folded(self, price: float) -> tuple[Tensor, Tensor]:
        """The first layer's weight [units, columns before the price] and its bias [units] with this price in it."""
        first = self.head if self.hidden is None else self.hidden
        told = (math.log(price) - self._log_middle) / self._log_reach
        return first.weight[:, : self.price], first.bias + told * first.weight[:, self.price]


def save_policy(path: str | Path, router: Router, metadata: dict[str, Any]) -> None:
    """Write a router with what it was trained for: `decision`, `backbone` (fingerprint), `curve`, all JSON-able."""
    save_tensors(path, "policy", router.state_dict(), {**metadata, "router": router.config})


def load_policy(path: str | Path) -> tuple[Router, dict[str, Any]]:
    """Read a policy file: the router in eval mode, and its metadata.

    Raises:
        ValueError: the file is missing, cut short, altered, or no policy file.
    """
    tensors, metadata = load_tensors(path, "policy")
    router = Router(**metadata["router"])
    router.load_state_dict(tensors)
    return router.eval(), metadata
