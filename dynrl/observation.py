"""What a policy sees: one function, for the environment and the plugged model alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from dynrl.backbones import END, Backbone, State
from dynrl.ops.decide import decide


@dataclass(frozen=True)
class Layout:
    """Where things stand in an observation vector.

    | columns | what |
    |---|---|
    | `features` | the backbone's summary, zeros beyond the point's width |
    | `points` | one-hot: the point the row stands at, all zero at the end |
    | 1 + `choices` | one-hot: no choice yet, or the last choice |
    | 1 | MACs spent so far over the dense network's |
    | 1 | the price of compute |
    | `choices` | the mask: 1 for each open choice |
    """

    features: int
    points: int
    choices: int

    @classmethod
    def of(cls, backbone: Backbone) -> Layout:
        """The layout of observations of `backbone`."""
        return cls(backbone.feature_width, len(backbone.points), backbone.num_choices)

    def to_dict(self) -> dict[str, int]:
        """Its numbers, for a policy's configuration."""
        return asdict(self)

    @property
    def last(self) -> int:
        """First column of the last choice."""
        return self.features + self.points

    @property
    def spent(self) -> int:
        """Column of the share of MACs spent; the price is the next."""
        return self.last + 1 + self.choices

    @property
    def price(self) -> int:
        """Column of the price."""
        return self.spent + 1

    @property
    def mask(self) -> int:
        """First column of the mask."""
        return self.spent + 2

    @property
    def width(self) -> int:
        """Length of the vector."""
        return self.mask + self.choices


def observation(backbone: Backbone, state: State, price: Tensor | float) -> Tensor:
    """What a policy sees of the rows of `state`.

    Args:
        price: of the dense network's compute, in units of the accuracy term: one number, or [B], one a slot.

    Returns:
        [n, Layout.width] float32, a tensor of its own.
    """
    # A routed batch makes one of these at every point, and after a block's layers each small step costs some 25 us,
    # since they have swept the caches: few steps count for more than small ones.
    walk, rows, layout = state.walk, state.rows, Layout.of(backbone)
    if state.point == END:
        view = torch.zeros(state.count, layout.width, device=rows.device)
        view[:, layout.price] = walk.at(price, rows) if isinstance(price, Tensor) else price
    else:
        mask = backbone.open_choices(state)
        same = None if isinstance(price, Tensor) else price
        open_count = backbone.points[state.point].n
        make = template.__wrapped__ if is_compiling() else template  # a tracer's tensors must not be kept
        view = make(layout, state.point, open_count, same, rows.device).repeat(state.count, 1)
        if mask is not None:
            view[:, layout.mask : layout.mask + open_count] = mask.float()
        if isinstance(price, Tensor):
            view[:, layout.price] = walk.at(price, rows)
    view[:, layout.last : layout.spent].scatter_(1, walk.at(walk.last, rows).unsqueeze(1), 1.0)
    torch.div(walk.at(walk.macs, rows), backbone.dense_macs, out=view[:, layout.spent])
    if state.point != END:  # last: `out=` refuses a tensor with a graph, which features of a gated walk bring
        features = backbone.observe(state)
        view[:, : features.shape[1]] = features
    return view


@lru_cache(maxsize=256)
def template(layout: Layout, point: int, open_count: int, price: float | None, device: torch.device) -> Tensor:
    """[1, width]: what all rows at a point have in common."""
    with torch.inference_mode(False):
        row = torch.zeros(1, layout.width, device=device)
        row[0, layout.features + point] = 1
        row[0, layout.mask : layout.mask + open_count] = 1
        if price is not None:
            row[0, layout.price] = price
        return row


class LinearChoice:
    """The choice of largest score, scores being linear in the observation at one price, which is never built.

    A column that is constant, or one of a few numbers, costs a table here, not a product; features go where the
    backbone has them (`Backbone.project`).

    Args:
        backbone: to be walked.
        weight: [choices, columns of the observation before the price].
        bias: [choices], the price's part in it.
    """

    def __init__(self, backbone: Backbone, weight: Tensor, bias: Tensor) -> None:
        layout = Layout.of(backbone)
        self.backbone, self.masked = backbone, backbone.may_close
        if layout.choices == 2 and not self.masked:
            # The difference decides: one column instead of two.
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        features, points, last, spent = weight.split((layout.features, layout.points, 1 + layout.choices, 1), 1)
        # Transposed, and so kept: products with a contiguous [features, 2] take five times as long (measured).
        self.features = features.contiguous().t()
        self.spent = spent.t() / backbone.dense_macs
        self.start = last.t() + (points.t() + bias).unsqueeze(1)  # [points, last choices, scores]
        for i, point in enumerate(backbone.points):
            self.start[i, :, point.n :] = -torch.inf

    def __call__(self, state: State) -> Tensor:
        """[n] int64, as `Router.act(observation(...))` but for rounding."""
        walk, rows, backbone = state.walk, state.rows, self.backbone
        start = self.start[state.point].index_select(0, walk.at(walk.last, rows))
        scores = backbone.project(state, self.features, start)
        scores.addcmul_(walk.at(walk.macs, rows).unsqueeze(1), self.spent)
        if self.masked:
            mask = backbone.open_choices(state)
            if mask is not None:
                scores[:, : mask.shape[1]].masked_fill_(~mask, -torch.inf)
        elif scores.shape[1] == 1:
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
