"""Sights: what a policy sees of a walk, and what its answer means there.

The environment, the runners, gates and the plugged model ask the policy's sight. None of them asks which it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

VIEW = 16  # pixels that a route sight shows of an image, at most, in each direction


@dataclass(frozen=True)
class Sight:
    """What both sights have in common. A backbone, a walk and its states are duck-typed: see `dynrl.backbones`.

    Attributes:
        name: of the sight, in `SIGHTS`.
        width: length of an observation.
        price: column of the price in it. What a policy reads ends there; what stands behind it is the mask.
        counts: for each decision of one answer, how many choices it has.
        span: how many decisions of a walk one answer covers, at most.
    """

    name: ClassVar[str]

    @classmethod
    def of(cls, backbone: Any) -> Self:
        """The sight of `backbone`.

        Raises:
            ValueError: the sight does not show inputs of this kind.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Its numbers, JSON-able, for a policy's configuration: `SIGHTS[name](**config)` is the sight again."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def width(self) -> int:
        """See `Sight`."""
        raise NotImplementedError

    @property
    def price(self) -> int:
        """See `Sight`."""
        raise NotImplementedError

    @property
    def counts(self) -> tuple[int, ...]:
        """See `Sight`."""
        raise NotImplementedError

    @property
    def span(self) -> int:
        """See `Sight`."""
        raise NotImplementedError

    @property
    def decisions(self) -> int:
        """How many decisions one answer holds."""
        return len(self.counts)

    @property
    def choices(self) -> int:
        """How many choices the decision has that has most."""
        return max(self.counts)

    def looks(self, max_steps: int) -> int:
        """How often a policy looks on a walk of `max_steps` decisions."""
        return -(-max_steps // self.span)

    def start(self, full_route: tuple[int, ...]) -> list[int]:
        """[decisions], the choices of the dense network, which untrained policies favour."""
        raise NotImplementedError

    def see(self, backbone: Any, state: Any, price: Tensor | float) -> Tensor:
        """[n, width] float32, a tensor of its own: what a policy sees of the rows of `state`.

        Args:
            backbone: that is walked.
            state: rows of a walk.
            price: of the dense network's compute, in units of the accuracy term: one number, or [B], one a slot.
        """
        raise NotImplementedError

    def mask(self, observation: Tensor) -> Tensor:
        """[n, decisions, choices] float32: 1 for each choice that is open by `observation` [n, width], else 0."""
        raise NotImplementedError

    def pick(self, answer: Tensor, state: Any) -> Tensor:
        """[n, ...], what `answer` [B, decisions, ...], one a slot, says of the next decision of the rows of `state`."""
        raise NotImplementedError

    def follow(
        self, backbone: Any, think: Callable[[Tensor], Tensor], price: Tensor | float
    ) -> Callable[[Any], Tensor]:
        """From each state of a walk to what `think` says of its rows' next decision, [n, ...].

        Args:
            backbone: that is walked.
            think: from observations [n, width] to answers [n, decisions, ...].
            price: see `see`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StepSight(Sight):
    """A look at every decision point, for one choice there.

    | columns | what |
    |---|---|
    | `features` | the backbone's summary of where the row stands, zeros beyond the point's width |
    | `points` | one-hot: the point at which the row stands, all zero at the end |
    | 1 + `choices` | one-hot: no choice yet, or the last choice |
    | 1 | MACs spent so far over the dense network's |
    | 1 | the price of compute |
    | `choices` | the mask: 1 for each open choice |
    """

    name = "step"
    features: int
    points: int
    most_choices: int

    @classmethod
    def of(cls, backbone: Any) -> Self:
        """The sight of `backbone`."""
        return cls(backbone.feature_width, len(backbone.points), backbone.num_choices)

    @property
    def last(self) -> int:
        """First column of the last choice."""
        return self.features + self.points

    @property
    def spent(self) -> int:
        """Column of the share of MACs spent."""
        return self.last + 1 + self.most_choices

    @property
    def price(self) -> int:
        """Column of the price."""
        return self.spent + 1

    @property
    def width(self) -> int:
        """Length of the vector."""
        return self.price + 1 + self.most_choices

    @property
    def counts(self) -> tuple[int, ...]:
        """The choices of the one decision that an answer holds."""
        return (self.most_choices,)

    @property
    def span(self) -> int:
        """One decision."""
        return 1

    def start(self, full_route: tuple[int, ...]) -> list[int]:
        """The dense network's choice; where points differ in it, the commonest."""
        return [statistics.mode(choice for choice in full_route if choice >= 0)]

    def see(self, backbone: Any, state: Any, price: Tensor | float) -> Tensor:
        """`Sight.see`, laid out as the table of this class says."""
        walk, view = state.walk, torch.zeros(state.count, self.width, device=state.rows.device)
        if not state.ended:
            view[:, self.features + state.point] = 1.0
            mask, first = backbone.open_choices(state), self.price + 1
            open_choices = view[:, first : first + backbone.points[state.point].n]
            open_choices.copy_(mask) if mask is not None else open_choices.fill_(1.0)
        view[:, self.price] = state.get(price) if isinstance(price, Tensor) else price
        view[:, self.last : self.spent].scatter_(1, state.get(walk.last).unsqueeze(1), 1.0)
        torch.div(state.get(walk.macs), backbone.dense_macs, out=view[:, self.spent])
        if not state.ended:  # last: `out=` refuses a tensor with a graph, which features of a gated walk bring
            features = backbone.observe(state)
            view[:, : features.shape[1]] = features
        return view

    def mask(self, observation: Tensor) -> Tensor:
        """The last columns."""
        return observation[:, None, self.price + 1 :]

    def pick(self, answer: Tensor, state: Any) -> Tensor:
        """The one decision that there is."""
        return state.get(answer[:, 0])

    def follow(
        self, backbone: Any, think: Callable[[Tensor], Tensor], price: Tensor | float
    ) -> Callable[[Any], Tensor]:
        """`Sight.follow`: a look at every state."""
        return lambda state: think(self.see(backbone, state, price))[:, 0]


@dataclass(frozen=True)
class RouteSight(Sight):
    """One look at the input, before the network runs, for a choice in every column of the route.

    | columns | what |
    |---|---|
    | channels x height x width | the input, average-pooled to at most 16 x 16 pixels |
    | 1 | the price of compute |
    """

    name = "route"
    view: tuple[int, ...]
    column_choices: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("view", "column_choices"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def of(cls, backbone: Any) -> Self:
        """The sight of `backbone`.

        Raises:
            ValueError: its inputs are no images.
        """
        if len(backbone.input_shape) != 3:
            raise ValueError(
                f"deciding upfront needs images [channels, height, width], not inputs of shape {backbone.input_shape}; "
                "decide step by step"
            )
        channels, height, width = backbone.input_shape
        counts = [backbone.points[point].n for point in backbone.column_point.tolist()]
        return cls((channels, min(height, VIEW), min(width, VIEW)), tuple(counts))

    @property
    def price(self) -> int:
        """Column of the price, the last."""
        channels, height, width = self.view
        return channels * height * width

    @property
    def width(self) -> int:
        """Length of the vector."""
        return self.price + 1

    @property
    def counts(self) -> tuple[int, ...]:
        """The choices in each column of the route."""
        return self.column_choices

    @property
    def span(self) -> int:
        """A whole walk."""
        return len(self.column_choices)

    def start(self, full_route: tuple[int, ...]) -> list[int]:
        """The full route; the first choice where that never goes."""
        return [max(0, choice) for choice in full_route]

    def see(self, backbone: Any, state: Any, price: Tensor | float) -> Tensor:
        """`Sight.see`, laid out as the table of this class says, wherever the rows stand."""
        images, (_, height, width) = state.get(state.walk.inputs), self.view
        seen = F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)
        told = state.get(price).unsqueeze(1) if isinstance(price, Tensor) else torch.full_like(seen[:, :1], price)
        return torch.cat([seen, told], 1)

    def mask(self, observation: Tensor) -> Tensor:
        """The same for all inputs: the choices that each column's point has."""
        counts = torch.tensor(self.column_choices, device=observation.device).unsqueeze(1)
        has = (torch.arange(self.choices, device=observation.device) < counts).float()
        return has.expand(observation.shape[0], -1, -1)  # len() would make a traced size a constant

    def pick(self, answer: Tensor, state: Any) -> Tensor:
        """What stands in the rows' next column."""
        return state.along(answer)

    def follow(
        self, backbone: Any, think: Callable[[Tensor], Tensor], price: Tensor | float
    ) -> Callable[[Any], Tensor]:
        """`Sight.follow`: a look at the first state, whose answer the walk keeps."""

        def at(state: Any) -> Tensor:
            walk = state.walk
            if walk.answer is None:
                assert state.together, "the first look is at all rows"
                walk.answer = think(self.see(backbone, state, price))
            return state.along(walk.answer)

        return at


SIGHTS: Mapping[str, type[Sight]] = {sight.name: sight for sight in (StepSight, RouteSight)}
