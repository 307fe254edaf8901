"""A sight says what a policy sees of a walk, and what the policy's answer means there.

The environment, the runners, gates and the plugged model ask the policy's sight. None of them asks which sight it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

VIEW = 16  # a route sight shows an image at most this many pixels wide and high


@dataclass(frozen=True)
class Sight:
    """This is the base class of sights. Backbones, walks and states are those of `dynrl.backbones`, not imported.

    Attributes:
        name: the sight's name in `SIGHTS`.
        width: the length of an observation.
        price: the column of the price in an observation. It is the last column that a policy reads; the mask follows.
        counts: the number of choices of each decision of one answer.
        span: how many decisions of a walk one answer covers at most.
    """

    name: ClassVar[str]

    @classmethod
    def of(cls, backbone: Any) -> Self:
        """Return the sight of `backbone`.

        Raises:
            ValueError: the sight does not show inputs of this kind.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Return the sight's numbers, as JSON can hold them; `SIGHTS[name](**config)` is the sight again."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def width(self) -> int:
        """The length of an observation."""
        raise NotImplementedError

    @property
    def price(self) -> int:
        """The column of the price in an observation."""
        raise NotImplementedError

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of choices of each decision of one answer."""
        raise NotImplementedError

    @property
    def span(self) -> int:
        """How many decisions of a walk one answer covers at most."""
        raise NotImplementedError

    @property
    def decisions(self) -> int:
        """The number of decisions in one answer."""
        return len(self.counts)

    @property
    def choices(self) -> int:
        """The largest number of choices that a decision has."""
        return max(self.counts)

    def looks(self, max_steps: int) -> int:
        """Return how often a policy looks on a walk of `max_steps` decisions."""
        return -(-max_steps // self.span)

    def start(self, full_route: tuple[int, ...]) -> list[int]:
        """Return the dense network's choices, which untrained policies favour: [decisions]."""
        raise NotImplementedError

    def see(self, backbone: Any, state: Any, price: Tensor | float) -> Tensor:
        """Return what a policy sees of the rows of `state`, a new tensor [n, width] float32.

        Args:
            backbone: the backbone that is walked.
            state: rows of a walk.
            price: the price of the dense network's compute, in units of the accuracy term: one number, or [B], one for
                each row of the walk.
        """
        raise NotImplementedError

    def mask(self, observation: Tensor) -> Tensor:
        """Return 1 for each choice open in `observation` [n, width], else 0: [n, decisions, choices] float32."""
        raise NotImplementedError

    def pick(self, answer: Tensor, state: Any) -> Tensor:
        """Return the part of `answer` [B, decisions, ...] for the next decision of the rows of `state`: [n, ...]."""
        raise NotImplementedError

    def follow(
        self, backbone: Any, think: Callable[[Tensor], Tensor], price: Tensor | float
    ) -> Callable[[Any], Tensor]:
        """Return a function from a state to what `think` answers for the next decision of its rows: [n, ...].

        Args:
            backbone: the backbone that is walked.
            think: a function from observations [n, width] to answers [n, decisions, ...].
            price: the same as in `see`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StepSight(Sight):
    """The policy looks at every decision point and makes one choice there.

    | columns | what |
    |---|---|
    | `features` | the backbone's summary of the row at this point; zeros beyond the point's width |
    | `points` | one-hot: the point at which the row stands; all zero at the end |
    | 1 + `choices` | one-hot: no choice yet, or the last choice |
    | 1 | the MACs spent so far, as a share of the dense network's |
    | 1 | the price of compute |
    | `choices` | the mask: 1 for each open choice |

    The last `suggested` features are a backbone's own scores of as many choices, the last ones (see
    `Backbone.suggested`).
    """

    name = "step"
    features: int
    points: int
    most_choices: int
    suggested: int = 0

    @classmethod
    def of(cls, backbone: Any) -> Self:
        """Return the sight of `backbone`."""
        return cls(backbone.feature_width, len(backbone.points), backbone.num_choices, backbone.suggested)

    @property
    def last(self) -> int:
        """The first column of the last choice."""
        return self.features + self.points

    @property
    def spent(self) -> int:
        """The column of the share of MACs spent."""
        return self.last + 1 + self.most_choices

    @property
    def price(self) -> int:
        """The column of the price."""
        return self.spent + 1

    @property
    def width(self) -> int:
        """The length of the vector."""
        return self.price + 1 + self.most_choices

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of choices of the one decision that an answer holds."""
        return (self.most_choices,)

    @property
    def span(self) -> int:
        """One answer covers one decision."""
        return 1

    def start(self, full_route: tuple[int, ...]) -> list[int]:
        """Return the dense network's choice; if points differ in it, the commonest one."""
        return [statistics.mode(choice for choice in full_route if choice >= 0)]

    def see(self, backbone: Any, state: Any, price: Tensor | float) -> Tensor:
        """Return what a policy sees, in the columns of the table above."""
        walk, shape = state.walk, (state.count, self.width)
        view = torch.zeros(shape, dtype=torch.float32, device=state.rows.device)
        if not state.ended:
            view[:, self.features + state.point] = 1.0
            mask, first = backbone.open_choices(state), self.price + 1
            open_choices = view[:, first : first + backbone.points[state.point].n]
            open_choices.copy_(mask) if mask is not None else open_choices.fill_(1.0)
        view[:, self.price] = state.get(price) if isinstance(price, Tensor) else price
        view[:, self.last : self.spent].scatter_(1, state.get(walk.last).unsqueeze(1), 1.0)
        torch.div(state.get(walk.macs).float(), backbone.dense_macs, out=view[:, self.spent])
        if not state.ended:  # this comes last: features of a gated walk have a graph, and `out=` refuses such tensors
            features = backbone.observe(state)
            if features.shape[1] > self.features:  # they would lie over the columns behind them, the price among these
                raise ValueError(
                    f"expected {type(backbone).__name__}.observe to show at most {self.features} numbers of a row, its "
                    f"feature_width, got {features.shape[1]}"
                )
            view[:, : features.shape[1]] = features
        return view

    def mask(self, observation: Tensor) -> Tensor:
        """Return the last columns of the observation, which are the mask."""
        return observation[:, None, self.price + 1 :]

    def pick(self, answer: Tensor, state: Any) -> Tensor:
        """Return the rows' part of the one decision that there is."""
        return state.get(answer[:, 0])

    def follow(
        self, backbone: Any, think: Callable[[Tensor], Tensor], price: Tensor | float
    ) -> Callable[[Any], Tensor]:
        """Return a `Sight.follow` that looks at every state."""
        return lambda state: think(self.see(backbone, state, price))[:, 0]


@dataclass(frozen=True)
class RouteSight(Sight):
    """The policy looks once at the input, before the network runs, and makes a choice for every column of the route.

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
        """Return the sight of `backbone`.

        Raises:
            ValueError: the backbone's inputs are no images.
        """
        if not isinstance(backbone.input_shape, tuple) or len(backbone.input_shape) != 3:
            raise ValueError(
                f"deciding upfront needs images [channels, height, width], not inputs of shape {backbone.input_shape}; "
                "decide step by step"
            )
        channels, height, width = backbone.input_shape
        counts = [backbone.points[point].n for point in backbone.column_point.tolist()]
        return cls((channels, min(height, VIEW), min(width, VIEW)), tuple(counts))

    @property
    def price(self) -> int:
        """The column of the price, which is the last."""
        channels, height, width = self.view
        return channels * height * width

    @property
    def width(self) -> int:
        """The length of the vector."""
        return self.price + 1

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of choices in each column of the route."""
        return self.column_choices

    @property
    def span(self) -> int:
        """One answer covers a whole walk."""
        return len(self.column_choices)

    def start(self, full_route: tuple[int, ...]) -> list[int]:
        """Return the full route, with the first choice in columns that it never visits."""
        return [max(0, choice) for choice in full_route]

    def see(self, backbone: Any, state: Any, price: Tensor | float) -> Tensor:
        """Return what a policy sees, in the columns of the table above, wherever the rows stand."""
        images, (_, height, width) = state.get(state.walk.inputs), self.view
        seen = F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)
        told = state.get(price).unsqueeze(1) if isinstance(price, Tensor) else torch.full_like(seen[:, :1], price)
        return torch.cat([seen, told], 1)

    def mask(self, observation: Tensor) -> Tensor:
        """Return the mask, which is the same for all inputs: it has the choices that each column's point has."""
        counts = torch.tensor(self.column_choices, device=observation.device).unsqueeze(1)
        has = (torch.arange(self.choices, device=observation.device) < counts).float()
        return has.expand(observation.shape[0], -1, -1)  # len() would make a traced size a constant

    def pick(self, answer: Tensor, state: Any) -> Tensor:
        """Return the rows' part of the answer for the column that they come to next."""
        return state.along(answer)

    def follow(
        self, backbone: Any, think: Callable[[Tensor], Tensor], price: Tensor | float
    ) -> Callable[[Any], Tensor]:
        """Return a `Sight.follow` that looks at the first state and keeps the answer in the walk."""

        def at(state: Any) -> Tensor:
            walk = state.walk
            if walk.answer is None:
                assert state.together, "the first look is at all rows"
                walk.answer = think(self.see(backbone, state, price))
            return state.along(walk.answer)

        return at


SIGHTS: Mapping[str, type[Sight]] = {sight.name: sight for sight in (StepSight, RouteSight)}
