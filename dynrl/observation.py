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
    | `choices` | one-hot: the last choice, all zero before the first |
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
        return self.last + self.choices

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
    view = torch.zeros(state.count, layout.width, device=rows.device)
    if state.point != END:
        features = backbone.observe(state)
        view[:, : features.shape[1]] = features
        view[:, layout.features + state.point] = 1
    steps = walk.at(walk.steps, rows)
    # Before the first decision there is no last choice: step 0 reads column 0, which then holds -1.
    last = walk.at(walk.route, rows).gather(1, (steps - 1).clamp_min(0).unsqueeze(1))
    view[:, layout.last : layout.spent].scatter_(1, last.clamp_min(0), (last >= 0).float())
    torch.div(walk.at(walk.macs, rows), backbone.dense_macs, out=view[:, layout.spent])
    view[:, layout.price] = walk.at(price, rows) if isinstance(price, Tensor) else price
    if state.point != END:
        mask = backbone.open_choices(state)
        view[:, layout.mask : layout.mask + backbone.points[state.point].n] = 1 if mask is None else mask.float()
    return view
