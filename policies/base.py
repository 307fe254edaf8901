"""Some policies give whole routes without a look; others are learned. All share the base class here."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynrl.policies.sight import Sight
from dynrl.schema import check_price_range

CAP = 5.0  # logits stay within +-CAP, so that no probability becomes 0 and every logarithm stays finite
CLOSED = -1e9  # is added to the scores of choices that are closed
EDITS = attrgetter("_version")  # of a tensor: how often it was written to


class Policy(nn.Module):
    """A policy decides on a walk. Backbones, walks and states are those of `dynrl.backbones`, but are not imported.

    Attributes:
        sight: what the policy sees; None if it looks at nothing, or at the backbone itself.
        price_range: the lowest and highest price; None if the policy knows no price.
        edition: how often the weights have been loaded or moved (see `Weights`).
    """

    sight: Sight | None = None
    price_range: tuple[float, float] | None = None
    edition: int = 0

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """Return a function from a state to the choices [n] int64 of its rows, which `Backbone.run` calls.

        Args:
            backbone: the backbone that will be walked, once or many times.
            price: the price of the dense network's compute.
        """
        raise NotImplementedError

    def check(self, backbone: Any) -> None:
        """Refuse, with a ValueError, a backbone that the policy was not made for."""
        if self.sight is not None and (wanted := type(self.sight).of(backbone)) != self.sight:
            raise ValueError(
                f"the policy is for {self.sight}, the backbone poses {wanted}; plug it into its own backbone"
            )

    def looks(self, walk: Any) -> Tensor:
        """Return how often the policy looked at each row of a finished walk: [B] int64."""
        span = self.sight.span if self.sight is not None else 1
        steps: Tensor = walk.steps
        return steps if span == 1 else torch.div(steps + (span - 1), span, rounding_mode="floor")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.edition += 1
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.edition += 1
        super()._load_from_state_dict(*args, **kwargs)


class Weights:
    """These are a policy's weights and buffers at one moment; what is derived from them is outdated once they change.

    Args:
        policy: the policy.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy, self._edition = policy, policy.edition
        # To look into these dictionaries takes a tenth of the time of `modules()`, and every call of a model does it.
        held: list[dict[str, Any]] = [
            part for each in policy.modules() for part in (each._modules, each._parameters, each._buffers)
        ]
        slots = [(part, name) for part in held for name, value in part.items() if value is not None]
        self._parts, self._names = [part for part, _ in slots], [name for _, name in slots]
        self._values = [part[name] for part, name in slots]
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        # New weights cannot lie where the old ones do, whose memory is held here.
        self._memory = [tensor.untyped_storage() for tensor in self._tensors]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]  # torch counts their edits
        self._edits = list(map(EDITS, self._counted))

    def hold(self, policy: Policy) -> bool:
        """Tell whether `policy` is that policy, and nothing has been loaded, replaced, moved or edited in place."""
        return (
            policy is self._policy
            and policy.edition == self._edition
            and all(map(is_, map(dict.get, self._parts, self._names), self._values))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(EDITS, self._counted)) == self._edits
        )


class RoutePolicy(Policy):
    """A route policy gives whole routes at once, before the walk begins."""

    def route(self, inputs: Tensor) -> Tensor:
        """Return the actions [B, columns] int64 for `inputs` [B, ...]."""
        raise NotImplementedError

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """Return a `Policy.chooser` that gives each row of a walk a route when the walk begins.

        Raises:
            ValueError: the function raises it when a walk begins and the routes do not fit the backbone.
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
                # On a CUDA device a look would wait for it, in each call, and rivals are timed.
                if not walk.answer.is_cuda and ((walk.answer < 0) | (walk.answer >= backbone.num_choices)).any():
                    raise ValueError(
                        f"expected of {type(self).__name__} choices from 0 to {backbone.num_choices - 1}, got "
                        f"{int(walk.answer.min())} to {int(walk.answer.max())}"
                    )
            return state.along(walk.answer)

        return at


class LearnedPolicy(Policy):
    """A learned policy is a network from observations to logits that is told the price of compute.

    Each kind of policy is one class in one file, with a row in `POLICIES`. The class sets `sight_class`, calls this
    `__init__` and writes `_scores`.

    Args:
        sight: what the policy sees.
        price_range: the lowest and highest price, which are equal if there is only one. The policy sees the logarithm
            of the price, scaled to [-1, 1].
        hidden: the number of units in the hidden layer; 0 for none.
        start: [decisions], the full network's choices, which the untrained policy favours (e^2 to 1). If it favoured no
            choice, early routes would be too poor to learn from.

    Attributes:
        config: the keyword arguments that rebuild the policy, as JSON can hold them.

    Raises:
        ValueError: the price range is not positive or falls, or the start is no valid answer.
    """

    sight_class: ClassVar[type[Sight]]
    sight: Sight
    price_range: tuple[float, float]

    def __init__(self, sight: Sight, price_range: tuple[float, float], hidden: int, start: list[int]) -> None:
        super().__init__()
        low, high = check_price_range(price_range)
        if len(start) != sight.decisions or not all(0 <= at < n for at, n in zip(start, sight.counts, strict=True)):
            raise ValueError(f"expected a start within the choices of each decision, {list(sight.counts)}, got {start}")
        self.sight, self.price_range = sight, (low, high)
        self.config = {
            "sight": sight.config(), "price_range": list(self.price_range), "hidden": hidden, "start": list(start)
        }  # fmt: skip
        self._log_middle = (math.log(high) + math.log(low)) / 2
        self._log_reach = (
            math.log(high) - math.log(low)
        ) / 2 or 1.0  # if there is one price, the policy is always told 0

    def _favour(self, head: nn.Linear) -> None:
        """Initialise the layer that gives the scores so that the choices of `start` are favoured."""
        nn.init.zeros_(head.bias)
        nn.init.normal_(head.weight, std=0.01)
        start = torch.tensor(self.config["start"]).unsqueeze(1)
        with torch.no_grad():
            head.bias.view(self.sight.decisions, self.sight.choices).scatter_(1, start, 2.0)

    def told(self, price: float) -> float:
        """Return the number that stands for `price` in the policy: its logarithm, scaled to [-1, 1] over the range."""
        return (math.log(price) - self._log_middle) / self._log_reach

    def trunk(self, observation: Tensor) -> Tensor:
        """Return the observation without its mask, its price as a scaled logarithm: [n, price + 1]."""
        column = self.sight.price
        seen = observation[:, : column + 1].clone()
        seen[:, column] = (observation[:, column].log() - self._log_middle) / self._log_reach
        return seen

    def scores(self, observation: Tensor) -> Tensor:
        """Map [n, width] float32 to scores [n, decisions * choices] without the cap; closed choices get -1e9."""
        scores, closed = self._scores(observation), self._closed(observation)
        if scores.shape[1:] != closed.shape[1:]:  # one score would stand for all choices, and the first would be taken
            raise ValueError(
                f"expected of {type(self).__name__}._scores a score for each choice of each decision, "
                f"[n, {closed.shape[1]}], got {list(scores.shape)}"
            )
        return scores + closed

    def forward(self, observation: Tensor) -> Tensor:
        """Map [n, width] float32 to logits [n, decisions * choices] within +-CAP; closed choices get -1e9."""
        return self.capped(self.scores(observation))

    @staticmethod
    def capped(scores: Tensor) -> Tensor:
        """Return `scores` as logits within +-CAP, closed choices as they are.

        The likeliest choice is to be read off the scores: far beyond the cap, logits are equal by rounding.
        """
        return torch.where(scores > CLOSED / 2, CAP * torch.tanh(scores / CAP), scores)

    def act(self, observation: Tensor) -> Tensor:
        """Return the likeliest choices of each row: [n, decisions], by scores without the cap (see `capped`)."""
        return self.scores(observation).unflatten(1, (self.sight.decisions, self.sight.choices)).argmax(2)

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """Return a `Policy.chooser` that takes the likeliest choices."""
        return self.sight.follow(backbone, self.act, price)

    def logits_on(self, backbone: Any, price: Tensor | float) -> Callable[[Any], Tensor]:
        """Return a differentiable function from a state of a walk to logits [n, choices], at one price or at [B]."""
        shape = (self.sight.decisions, self.sight.choices)
        return self.sight.follow(backbone, lambda seen: self(seen).unflatten(1, shape), price)

    def _scores(self, observation: Tensor) -> Tensor:
        """Return the scores [n, decisions * choices] without cap and mask."""
        raise NotImplementedError

    def _closed(self, observation: Tensor) -> Tensor:
        """Return what is added to scores, [n, decisions * choices]: 0 for open choices, -1e9 for closed ones."""
        return ((1 - self.sight.mask(observation)) * CLOSED).flatten(1)
