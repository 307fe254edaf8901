"""The kinds of policies: those that give whole routes without a look, and those that are learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynrl.policies.sight import Sight

CAP = 5.0  # logits stay within +-CAP, so that no choice's probability reaches 0 and its logarithm stays finite


class Policy(nn.Module):
    """What decides on a walk. Backbones, walks and states are duck-typed: see `dynrl.backbones`.

    Attributes:
        sight: what it sees; None if it looks at nothing, or at the backbone itself.
        price_range: lowest and highest price; None if it knows no price.
        edition: how often its weights have been replaced or moved: what was derived from them before is outdated.
    """

    sight: Sight | None = None
    price_range: tuple[float, float] | None = None
    edition: int = 0

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """The policy as `Backbone.run` asks for it: from a state to the choices [n] int64 of its rows.

        Args:
            backbone: that will be walked, once or many times.
            price: of the dense network's compute.
        """
        raise NotImplementedError

    def check(self, backbone: Any) -> None:
        """Refuse, with a ValueError, a backbone that the policy was not made for."""
        if self.sight is not None and (wanted := type(self.sight).of(backbone)) != self.sight:
            raise ValueError(f"the policy is for {self.sight}, the backbone poses {wanted}")

    def looks(self, walk: Any) -> Tensor:
        """[B] int64, how often it looked at each row of a walk that is over."""
        span = self.sight.span if self.sight is not None else 1
        return torch.div(walk.steps + (span - 1), span, rounding_mode="floor")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.edition += 1
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.edition += 1
        super()._load_from_state_dict(*args, **kwargs)


class RoutePolicy(Policy):
    """A policy that gives whole routes at once, before the walk begins."""

    def route(self, inputs: Tensor) -> Tensor:
        """[B, columns] int64, the actions for `inputs` [B, ...]."""
        raise NotImplementedError

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """`Policy.chooser`: a route for each row of a walk, drawn at its begin.

        Raises:
            ValueError: when a walk begins, routes of another shape than the backbone's.
        """

        def at(state: Any) -> Tensor:
            walk = state.walk
            if walk.answer is None:
                walk.answer = self.route(walk.inputs)
                if walk.answer.shape != walk.route.shape or walk.answer.is_floating_point():
                    raise ValueError(
                        f"expected integer actions of shape {tuple(walk.route.shape)}, got {walk.answer.dtype} "
                        f"{tuple(walk.answer.shape)}"
                    )
            return state.along(walk.answer)

        return at


class LearnedPolicy(Policy):
    """What agents train: a network from observations to logits, told the price of compute.

    A kind of policy is one class in one file, with a row in `POLICIES`. It sets `sight_class`, calls this `__init__`,
    and writes `_scores`.

    Args:
        sight: what it sees.
        price_range: lowest and highest price, the same if there is but one; the policy sees the price's logarithm,
            scaled to [-1, 1].
        hidden: units of its hidden layer, 0 for none.
        start: [decisions], the choices that it favours before it has learned anything (e^2 to 1): the full network's.
            From a start without favour, early routes are too poor to learn from.

    Attributes:
        config: JSON-able keyword arguments that rebuild it.

    Raises:
        ValueError: a price range that is not positive or falls, or a start that is no answer.
    """

    sight_class: ClassVar[type[Sight]]
    sight: Sight
    price_range: tuple[float, float]

    def __init__(self, sight: Sight, price_range: tuple[float, float], hidden: int, start: list[int]) -> None:
        super().__init__()
        low, high = price_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"expected a price range with 0 < low <= high, got {tuple(price_range)}")
        if len(start) != sight.decisions or not all(0 <= at < n for at, n in zip(start, sight.counts, strict=True)):
            raise ValueError(f"expected a start within the choices of each decision, {list(sight.counts)}, got {start}")
        self.sight, self.price_range = sight, (float(low), float(high))
        self.config = {
            "sight": sight.config(), "price_range": list(self.price_range), "hidden": hidden, "start": list(start)
        }  # fmt: skip
        self._log_middle = (math.log(high) + math.log(low)) / 2
        self._log_reach = (math.log(high) - math.log(low)) / 2 or 1.0  # of one price the policy is told nothing

    def _favour(self, head: nn.Linear) -> None:
        """Initialise the layer that gives the scores so that the choices of `start` are favoured."""
        nn.init.zeros_(head.bias)
        nn.init.normal_(head.weight, std=0.01)
        start = torch.tensor(self.config["start"]).unsqueeze(1)
        with torch.no_grad():
            head.bias.view(self.sight.decisions, self.sight.choices).scatter_(1, start, 2.0)

    def told(self, price: float) -> float:
        """What the policy is told of `price`: its logarithm, scaled to [-1, 1] over the price range."""
        return (math.log(price) - self._log_middle) / self._log_reach

    def trunk(self, observation: Tensor) -> Tensor:
        """[n, price + 1]: the observation without its mask, its price as a centred logarithm."""
        column = self.sight.price
        seen = observation[:, : column + 1].clone()
        seen[:, column] = (observation[:, column].log() - self._log_middle) / self._log_reach
        return seen

    def scores(self, observation: Tensor) -> Tensor:
        """[n, width] float32 to [n, decisions * choices], without the cap; closed choices get -1e9."""
        return self._scores(observation) + self._closed(observation)

    def forward(self, observation: Tensor) -> Tensor:
        """[n, width] float32 to logits [n, decisions * choices] within +-CAP; closed choices get -1e9."""
        return CAP * torch.tanh(self._scores(observation) / CAP) + self._closed(observation)

    def act(self, observation: Tensor) -> Tensor:
        """[n, decisions], the likeliest choices of each row (without the cap, which changes no order)."""
        return self.scores(observation).unflatten(1, (self.sight.decisions, self.sight.choices)).argmax(2)

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """`Policy.chooser`: the likeliest choices."""
        return self.sight.follow(backbone, self.act, price)

    def logits_on(self, backbone: Any, price: Tensor | float) -> Callable[[Any], Tensor]:
        """From a state of a walk of `backbone`, at one price or [B], to logits [n, choices]; differentiable."""
        shape = (self.sight.decisions, self.sight.choices)
        return self.sight.follow(backbone, lambda seen: self(seen).unflatten(1, shape), price)

    def _scores(self, observation: Tensor) -> Tensor:
        """[n, decisions * choices], without cap and mask."""
        raise NotImplementedError

    def _closed(self, observation: Tensor) -> Tensor:
        """[n, decisions * choices]: 0 for open choices, -1e9 for closed ones; to be added to scores."""
        return ((self.sight.mask(observation) - 1) * 1e9).flatten(1)
