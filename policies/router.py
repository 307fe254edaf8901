"""The router is the learned policy that decides step by step: a small network from an observation to a choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynrl.ops.decide import decide, is_fused
from dynrl.policies.base import LearnedPolicy
from dynrl.policies.sight import StepSight


class Router(LearnedPolicy):
    """A router has two linear layers, or one. Agents train the same module that is deployed.

    Where a backbone suggests choices (`StepSight.suggested`), its log-odds are added to the scores, times one learned
    weight, which is 1 at first. No other choices are favoured then.

    Args:
        sight, price_range, hidden, start: the arguments of `LearnedPolicy`.
        units: [features], what each feature is divided by before the first layer; None divides none. Large features
            would drown the price and put scores far beyond the cap.

    Raises:
        ValueError: also, if there is not one unit above 0 for each feature.
    """

    sight_class = StepSight
    sight: StepSight
    units: Tensor | None

    def __init__(
        self,
        sight: StepSight,
        price_range: tuple[float, float],
        hidden: int = 64,
        start: list[int] | None = None,
        units: list[float] | None = None,
    ) -> None:
        super().__init__(sight, price_range, hidden, start or [0])
        if units is not None:
            if len(units) != sight.features or not all(0 < unit < math.inf for unit in units):
                raise ValueError(f"expected a unit above 0 for each of {sight.features} features, got {units}")
            self.config["units"] = list(units)
        known = None if units is None else torch.tensor(units, dtype=torch.float32)
        self.register_buffer("units", known, persistent=False)  # the configuration has them
        self.hidden = nn.Linear(sight.price + 1, hidden) if hidden else None
        self.head = nn.Linear(hidden or sight.price + 1, sight.choices)
        self._favour(self.head)
        self.trust = nn.Linear(1, 1, bias=False) if sight.suggested else None
        if self.trust is not None:
            nn.init.ones_(self.trust.weight)
            nn.init.zeros_(self.head.bias)

    def trunk(self, observation: Tensor) -> Tensor:
        """Return `LearnedPolicy.trunk` with features in their units."""
        seen = super().trunk(observation)
        if self.units is not None:
            seen[:, : self.sight.features] /= self.units
        return seen

    def _scores(self, observation: Tensor) -> Tensor:
        seen, features = self.trunk(observation), self.sight.features
        scores: Tensor = self.head(seen if self.hidden is None else torch.relu_(self.hidden(seen)))
        if self.trust is None:
            return scores
        suggested = self.trust(observation[:, features - self.sight.suggested : features].unsqueeze(2)).squeeze(2)
        return scores + nn.functional.pad(suggested, (self.sight.choices - self.sight.suggested, 0))

    @torch.inference_mode(False)  # tables made in inference mode could not be part of an exported program
    @torch.no_grad()
    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """Return a `Policy.chooser` that never builds observations: tables replace most of their columns.

        Args:
            backbone: the backbone that will be walked; it stays on its device.
            price: the price of the dense network's compute, which is part of the tables.
        """
        first = self.head if self.hidden is None else self.hidden
        weight = first.weight[:, : self.sight.price]
        if self.units is not None:
            weight = torch.cat([weight[:, : len(self.units)] / self.units, weight[:, len(self.units) :]], 1)
        bias = first.bias + self.told(price) * first.weight[:, self.sight.price]
        folded = Folded(backbone, self, weight, bias)
        if self.hidden is None or backbone.may_close or self.trust is not None:
            return folded
        fused = Fused(backbone, self, weight, bias)
        return lambda state: fused(state) if is_fused(state.walk.macs) else folded(state)


class Folded:
    """This function returns the choice of the largest score of a router at one price.

    Columns of the observation that are constant or take few values are looked up in tables here and cost no product.
    The backbone itself multiplies its features (`Backbone.projector`).

    Args:
        backbone: the backbone to walk.
        router: the router that the weights belong to.
        weight: [units, columns of the observation before the price], the first layer's weight.
        bias: [units], the first layer's bias, with the price's part added.
    """

    def __init__(self, backbone: Any, router: Router, weight: Tensor, bias: Tensor) -> None:
        sight, head = router.sight, None if router.hidden is None else router.head
        self.backbone, self.masked = backbone, backbone.may_close
        self.differs = sight.choices == 2 and not self.masked and not sight.suggested

        def scoring(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            # If there are two choices that never close, their difference decides: one column instead of two.
            return (weight[1:] - weight[:1], bias[1:] - bias[:1]) if self.differs else (weight, bias)

        closed = bias.new_zeros(len(backbone.points), sight.choices)
        for i, point in enumerate(backbone.points):
            closed[i, point.n :] = -torch.inf
        if self.differs:
            closed = closed[:, :1]
        if head is None:
            weight, bias = scoring(weight, bias)
        features, points, last, spent = weight.split((sight.features, sight.points, 1 + sight.choices, 1), 1)
        # It is kept as a transposed view: a product with a contiguous [features, 2] takes several times as long.
        self.features = features.contiguous().t()
        self.project = backbone.projector(self.features)
        self.suggested, self.trust = sight.suggested, 0.0 if router.trust is None else float(router.trust.weight)
        self.spent = spent.t() / backbone.dense_macs
        self.start = last.t() + (points.t() + bias).unsqueeze(1)  # [points, last choices, units]
        self.head: Tensor | None = None
        if head is None:
            self.start += closed.unsqueeze(1)
        else:
            weight, bias = scoring(head.weight.detach(), head.bias.detach())
            self.head, self.head_bias = weight.contiguous().t(), bias + closed

    def __call__(self, state: Any) -> Tensor:
        """Return the choices [n] int64, which are those of `Router.act` except for rounding."""
        walk, start = state.walk, self.start[state.point].index_select(0, state.get(state.walk.last))
        if self.suggested:  # what is suggested counts once more, at the end
            seen = self.backbone.observe(state)
            scores, suggested = torch.addmm(start, seen, self.features), seen[:, -self.suggested :]
        else:
            scores = self.project(state, start)
        scores.addcmul_(state.get(walk.macs).unsqueeze(1), self.spent)
        if self.head is not None:
            scores = torch.addmm(self.head_bias[state.point], scores.relu_(), self.head)
        if self.suggested:
            scores[:, -self.suggested :].add_(suggested, alpha=self.trust)
        if self.masked:
            mask = self.backbone.open_choices(state)
            if mask is not None:
                scores[:, : mask.shape[1]].masked_fill_(~mask, -torch.inf)
        elif self.differs:
            return (scores > 0).squeeze(1).long()
        return scores.argmax(1)


class Fused:
    """This function returns the choice of a router of two layers at one price, by one op that has a kernel.

    The arguments are those of `Folded`; the backbone's choices must never close.
    """

    def __init__(self, backbone: Any, router: Router, weight: Tensor, bias: Tensor) -> None:
        sight, head = router.sight, router.head
        self.backbone = backbone
        features, points, last, spent = weight.split((sight.features, sight.points, 1 + sight.choices, 1), 1)
        self.features, self.at_point = features.t().contiguous(), (points.t() + bias).contiguous()
        self.after_last, self.spent = last.t().contiguous(), spent.flatten().contiguous()
        self.head, self.head_bias = head.weight.detach().t().contiguous(), head.bias.detach()

    def __call__(self, state: Any) -> Tensor:
        """Return the choices [n] int64, which are those of `Router.act` except for rounding."""
        walk, features = state.walk, self.backbone.observe(state)
        return decide(
            features, state.get(walk.last), state.get(walk.macs), weight=self.features[: features.shape[1]],
            bias=self.at_point[state.point], last_weight=self.after_last, spent_weight=self.spent, head=self.head,
            head_bias=self.head_bias, dense_macs=self.backbone.dense_macs,
        )  # fmt: skip
