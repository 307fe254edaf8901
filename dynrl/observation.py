"""What a policy sees: one function for those that decide step by step, one for those that decide upfront.

The environment and the plugged model call the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from dynrl.backbones import END, Backbone, State

VIEW = 16  # pixels that an upfront policy sees of an image, at most, in each direction


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
    def counts(self) -> int:
        """Choices of the one decision that an observation is for."""
        return self.choices

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


@dataclass(frozen=True)
class View:
    """What stands in the observation of a policy that decides upfront: `view`, flat, and behind it the price.

    Attributes:
        view: (channels, height, width) of the input, average-pooled to at most `VIEW` pixels each way.
        counts: choices of each decision.
    """

    view: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, backbone: Backbone) -> View:
        """That of `backbone`.

        Raises:
            ValueError: its inputs are no images.
        """
        if len(backbone.input_shape) != 3:
            raise ValueError(
                f"deciding upfront needs images [channels, height, width], not inputs of shape {backbone.input_shape}; "
                "decide step by step"
            )
        channels, height, width = backbone.input_shape
        counts = tuple((backbone.column_costs >= 0).sum(1).tolist())
        return cls((channels, min(height, VIEW), min(width, VIEW)), counts)

    def to_dict(self) -> dict[str, list[int]]:
        """Its numbers, for a policy's configuration."""
        return {name: list(numbers) for name, numbers in asdict(self).items()}

    @property
    def price(self) -> int:
        """Column of the price, the last."""
        return self.view[0] * self.view[1] * self.view[2]

    @property
    def width(self) -> int:
        """Length of the vector."""
        return self.price + 1


def overview(inputs: Tensor, price: Tensor | float) -> Tensor:
    """What a policy sees that decides upfront: [n, View.width] float32, from images [n, channels, height, width].

    Args:
        price: of the dense network's compute, in units of the accuracy term: one number, or [n].
    """
    height, width = inputs.shape[2:]
    seen = F.adaptive_avg_pool2d(inputs.float(), (min(height, VIEW), min(width, VIEW))).flatten(1)
    told = price.unsqueeze(1) if isinstance(price, Tensor) else torch.full_like(seen[:, :1], price)
    return torch.cat([seen, told], 1)
