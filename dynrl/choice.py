"""What a learned policy chooses on a walk: as a module while it learns, folded and fused where it is plugged in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dynrl.backbones import Backbone, State
from dynrl.observation import Layout, observation, overview
from dynrl.ops.decide import decide
from dynrl.policies import LearnedPolicy, UpfrontRouter


def logits_on(backbone: Backbone, policy: LearnedPolicy, inputs: Tensor, price: Tensor) -> Callable[[State], Tensor]:
    """From a state of a walk of `inputs` [B, ...] at prices [B] to the policy's logits [n, choices]; differentiable."""
    if not isinstance(policy, UpfrontRouter):
        return lambda state: policy(observation(backbone, state, price))
    route = policy(overview(inputs, price)).view(-1, policy.decisions, policy.choices)
    return lambda state: route[state.rows, state.walk.steps[state.rows]]


class FoldedChoice:
    """The choice of largest score of a router at one price, whose observation is never built.

    A column of it that is constant, or one of a few numbers, costs a table here, not a product; features go where the
    backbone has them (`Backbone.project`).

    Args:
        backbone: to be walked.
        weight: [units, columns of the observation before the price], the first layer.
        bias: [units], the price's part in it.
        head: the second layer; None for a router of one, whose units are the scores.
    """

    def __init__(self, backbone: Backbone, weight: Tensor, bias: Tensor, head: nn.Linear | None) -> None:
        layout = Layout.of(backbone)
        self.backbone, self.masked = backbone, backbone.may_close
        self.differs = layout.choices == 2 and not self.masked

        def scoring(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            # Of two choices that never close the difference decides: one column instead of two.
            return (weight[1:] - weight[:1], bias[1:] - bias[:1]) if self.differs else (weight, bias)

        closed = torch.zeros(len(backbone.points), layout.choices, device=bias.device)
        for i, point in enumerate(backbone.points):
            closed[i, point.n :] = -torch.inf
        if self.differs:
            closed = closed[:, :1]
        if head is None:
            weight, bias = scoring(weight, bias)
        features, points, last, spent = weight.split((layout.features, layout.points, 1 + layout.choices, 1), 1)
        # Transposed, and so kept: products with a contiguous [features, 2] take five times as long (measured).
        self.features = features.contiguous().t()
        self.spent = spent.t() / backbone.dense_macs
        self.start = last.t() + (points.t() + bias).unsqueeze(1)  # [points, last choices, units]
        self.head: Tensor | None = None
        if head is None:
            self.start += closed.unsqueeze(1)
        else:
            weight, bias = scoring(head.weight.detach(), head.bias.detach())
            self.head, self.head_bias = weight.contiguous().t(), bias + closed
        by_step = backbone.foreknown(self.features)
        self.by_step = by_step is not None
        if by_step is not None:  # a loop, then: of one point
            self.start = self.start + by_step.unsqueeze(1)  # [max_steps, last choices, units]

    def __call__(self, state: State) -> Tensor:
        """[n] int64, as `Router.act(observation(...))` but for rounding."""
        walk, rows, backbone = state.walk, state.rows, self.backbone
        last = walk.at(walk.last, rows)
        if self.by_step and rows is not walk.all_rows:
            start = self.start[walk.steps[rows], last]
        else:
            start = self.start[walk.common_steps if self.by_step else state.point].index_select(0, last)
        scores = backbone.project(state, self.features, start)
        scores.addcmul_(walk.at(walk.macs, rows).unsqueeze(1), self.spent)
        if self.head is not None:
            scores = torch.addmm(self.head_bias[state.point], scores.relu_(), self.head)
        if self.masked:
            mask = backbone.open_choices(state)
            if mask is not None:
                scores[:, : mask.shape[1]].masked_fill_(~mask, -torch.inf)
        elif self.differs:
            return (scores > 0).squeeze(1).long()
        return scores.argmax(1)


class FusedChoice:
    """What a router of two layers chooses at one price, by one op from the features on: for where a kernel runs it.

    Args:
        backbone: to be walked; its choices never close.
        weight: [units, columns of the observation before the price], the first layer.
        bias: [units], the price's part in it.
        head: the second layer.
    """

    def __init__(self, backbone: Backbone, weight: Tensor, bias: Tensor, head: nn.Linear) -> None:
        layout = Layout.of(backbone)
        self.backbone = backbone
        features, points, last, spent = weight.split((layout.features, layout.points, 1 + layout.choices, 1), 1)
        self.features, self.at_point = features.t().contiguous(), (points.t() + bias).contiguous()
        self.after_last, self.spent = last.t().contiguous(), spent.flatten().contiguous()
        self.head, self.head_bias = head.weight.detach().t().contiguous(), head.bias.detach()

    def __call__(self, state: State) -> Tensor:
        """[n] int64, as `Router.act(observation(...))` but for rounding."""
        walk, rows, features = state.walk, state.rows, self.backbone.observe(state)
        return decide(
            features, walk.at(walk.last, rows), walk.at(walk.macs, rows), weight=self.features[: features.shape[1]],
            bias=self.at_point[state.point], last_weight=self.after_last, spent_weight=self.spent, head=self.head,
            head_bias=self.head_bias, dense_macs=self.backbone.dense_macs,
        )  # fmt: skip
