"""What a policy sees: one function, for the environment and the plugged model alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dynrl.backbones import END, Backbone, State


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
    walk, rows, layout = state.walk, state.rows, Layout.of(backbone)
    # A routed batch makes one of these at every point: few operations count for more than small ones.
    view = torch.zeros(state.count, layout.width, device=rows.device)
    if state.point != END:
        features = backbone.observe(state)
        view[:, : features.shape[1]] = features
        view[:, layout.features + state.point] = 1
        mask = backbone.open_choices(state)
        view[:, layout.mask : layout.mask + backbone.points[state.point].n] = 1 if mask is None else mask.float()
    view[:, layout.last : layout.spent].scatter_(1, walk.at(walk.last, rows).unsqueeze(1), 1.0)
    torch.div(walk.at(walk.macs, rows), backbone.dense_macs, out=view[:, layout.spent])
    view[:, layout.price] = walk.at(price, rows) if isinstance(price, Tensor) else price
    return view
