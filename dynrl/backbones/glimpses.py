"""These networks see an image by glimpses: after each look, each row decides where it looks next, if anywhere."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Parts
from dynrl.backbones.looks import Looks
from dynrl.backbones.walk import STOP, State
from dynrl.cost import count_macs
from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.crops import crops
from dynrl.schema import MOST_ROWS, check_count, check_counts

DULL = 0.2  # what is left of a place's attention once it was looked at
CELLS = 4  # the pixels of the small image in a window of scale 1, each way
MOST_SHARES = 2_000_000  # shares of places in windows
FAINT = 1e-2  # the least attention that a policy is told


class Glimpses(Looks):
    """A network that looks at an image through small windows: choice 0 stops, choice i looks through window i.

    At first, each row sees its image, as small as a window of scale 1 would be in 4 x 4 pixels. Each of these is the
    mean of a cell of side / 4 pixels each way. This glance does not see the last edge % (side / 4) rows and columns of
    an image, which fill no cell; windows show them. Two convolutions say what may be there, and how much attention each
    place deserves. The attention's mean is the first state, off which a first answer is read.

    A look takes a window, at full resolution or at a coarser scale, all of `side` x `side` pixels. Three convolutions
    encode it. Of their maps only the highest values count, wherever in the window they are. A linear layer follows,
    and the window's place is added. Windows of one scale overlap by half.

    The full route looks at everything: first through the coarsest windows side by side, then through those between
    them, and so on with finer ones, up to `looks` windows.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs of the head, from 2 on.
        side: the width and height of what a look sees, in pixels; a multiple of 4.
        scales: how many pixels of the image are one pixel of a look, each way, rising; each window fits in the image.
        looks: the most looks of a walk.
        width: the channels of the first convolution of a look; each further one has twice as many.
        hidden: the number of hidden units.

    Sources: Recurrent Models of Visual Attention (Mnih et al. 2014, NeurIPS): windows at scales, a recurrent state,
    where to look by REINFORCE. Glance and Focus (Wang et al. 2020, NeurIPS): a small image first, and the gain of each
    look as the reward.
    """

    family = "glimpses"
    orders: ClassVar = {
        "random places": lambda self, inputs: torch.rand(len(inputs), len(self.shares)).to(inputs.device),
        "brightest first": lambda self, inputs: self.brightness(inputs),
        "likeliest first": lambda self, inputs: self.likelihood(inputs),
    }
    corners: Tensor  # [windows, 2], the pixel at each window's upper left corner

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        side: int = 12,
        scales: tuple[int, ...] = (1, 2),
        looks: int = 6,
        width: int = 16,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        check_counts("scales", scales)
        for count, value in (("width", width), ("hidden", hidden)):
            check_count(count, value, 1, MOST_ROWS)
        if list(scales) != sorted(set(scales)):
            raise ValueError(f"expected scales that rise, got {tuple(scales)}")
        if len(input_shape) != 3 or side < CELLS or side % CELLS or side * scales[-1] > min(input_shape[1:]):
            raise ValueError(
                f"expected images [channels, height, width] that a window of side x scale pixels fits in, and a side "
                f"that is a multiple of {CELLS}, got {tuple(input_shape)}, {side} and scales {tuple(scales)}"
            )
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "side": side, "scales": list(scales),
            "looks": looks, "width": width, "hidden": hidden,
        }  # fmt: skip
        self.side, channels = side, input_shape[0]
        self.periphery = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.attention, self.lead = nn.Conv2d(width, 1, 1), nn.Linear(width, hidden)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.AdaptiveMaxPool2d(1), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * width, hidden),
        )  # fmt: skip
        self._set_windows(scales)
        windows = self.suggested = len(self.scale)
        lead, shape = count_macs(self.periphery, (channels, *(edge // self._cell for edge in input_shape[1:])))
        places = shape[1] * shape[2]
        lead += count_macs(self.attention, shape)[0] + places * (width + windows) + width * hidden
        look = count_macs(self.encoder, (channels, side, side))[0] + places * windows  # what is left of the attention
        self._pose_looks(looks, classes, hidden, self._sweep(), start=lead, look=look, told=windows)

    def _set_windows(self, scales: tuple[int, ...]) -> None:
        """Lay out the windows, from the coarsest to the finest, row by row."""
        height, width = self.input_shape[1:]
        self._cell, found = self.side // CELLS, []
        spans = [scale * self.side for scale in scales]
        count = sum(math.prod(1 - (span - edge) // (span // 2) for edge in (height, width)) for span in spans)
        places = math.prod(-(-(edge // self._cell) // 2) for edge in (height, width))
        if count * places > MOST_SHARES:  # before any of them is laid out: a file may say anything
            raise ValueError(
                f"expected at most {MOST_SHARES} windows times places of the peripheral view, got {count} x {places}; "
                "give a larger side"
            )
        for scale in reversed(scales):
            span = scale * self.side
            tops, lefts = (sorted({*range(0, edge - span, span // 2), edge - span}) for edge in (height, width))
            found += [(top, left, scale) for top in tops for left in lefts]
        windows = torch.tensor(found)
        self.register_buffer("corners", windows[:, :2], persistent=False)
        self.register_buffer("scale", windows[:, 2], persistent=False)
        rows, columns = (-(-(edge // self._cell) // 2) for edge in (height, width))  # as the second convolution has
        inside = [
            (torch.minimum(corner + span, start + 2 * self._cell) - torch.maximum(corner, start)).clamp_min(0)
            for corner, span, start in (
                (windows[:, i], windows[:, 2] * self.side, 2 * self._cell * torch.arange(count).unsqueeze(1))
                for i, count in enumerate((rows, columns))
            )
        ]
        shares = inside[0].unsqueeze(1) * inside[1].unsqueeze(0) / (2 * self._cell) ** 2
        self.register_buffer("shares", shares.flatten(0, 1), persistent=False)

    def _sweep(self) -> list[int]:
        """Return the windows in the order of the full route."""
        spans = (self.scale * self.side).unsqueeze(1)
        between = (self.corners % spans != 0).any(1).tolist()
        return sorted(range(len(between)), key=lambda window: (-int(self.scale[window]), between[window], window))

    def _attended(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the peripheral view holds, [n, width, places], and the attention that each place gets."""
        seen = self.periphery(F.avg_pool2d(inputs, self._cell))
        return seen.flatten(2), self.attention(seen).flatten(1).softmax(1)

    def _glance(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the first state [n, hidden], the attention that each place gets [n, places], and each window's."""
        seen, attention = self._attended(inputs)
        told = torch.bmm(seen, attention.unsqueeze(2)).squeeze(2)
        return self.lead(told).tanh(), attention, attention @ self.shares.to(attention.dtype)

    def likelihood(self, inputs: Tensor) -> Tensor:
        """Return the attention that each place of the peripheral view gets, [n, places]; it adds up to 1."""
        return self._attended(inputs)[1]

    def brightness(self, inputs: Tensor) -> Tensor:
        """Return how much brighter each place is than the darkest pixel of its image, [n, places].

        As in the glance, the last rows and columns, which fill no cell, are left out.
        """
        high, wide = (edge // self._cell * self._cell for edge in inputs.shape[2:])
        light = (inputs - inputs.amin((1, 2, 3), keepdim=True)).mean(1, keepdim=True)
        return F.avg_pool2d(light[:, :, :high, :wide], 2 * self._cell, ceil_mode=True).flatten(1)

    def _codes(self, inputs: Tensor, rows: Tensor, part: Tensor) -> Tensor:
        """Return the code [n, hidden] of what is seen of the images at `rows` [n] through the windows `part` [n]."""
        top, left = self.corners[part].unbind(1)
        seen = self.encoder(crops(inputs, rows, top, left, self.scale[part], self.side))
        return F.relu(seen + self.place(part))

    def _looked(self, kept: tuple[Tensor, ...], part: Tensor) -> tuple[Tensor, ...]:
        left, shares = kept[0], self.shares.to(kept[0].dtype)
        left = left * (1 - (1 - DULL) * shares.t()[part])
        return left, left @ shares

    def _told(self, state: State) -> Tensor:
        """Return the attention left in each window, as a logarithm; of places that were looked at, a fifth is left."""
        return state.features[2].float().clamp_min(FAINT).log()

    def _weigh(self, features: tuple[Tensor, ...]) -> Tensor:
        return features[2]

    def for_inference(self) -> Self:
        """Return a frozen copy with folded convolutions, in channels_last, where pooling is faster."""
        twin = super().for_inference()
        for layers in (twin.periphery, twin.encoder):
            for i, layer in enumerate(layers):
                if type(layer) is nn.Conv2d:  # a copy of a copy is folded already
                    layers[i] = FoldedConv2d.of(layer)
        return twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def regions(self, inputs: Tensor, route: Tensor) -> list[list[Parts]]:
        """Return `Backbone.regions`: the windows of the looks."""
        spans = (self.scale * self.side).unsqueeze(1).expand(-1, 2)
        windows = torch.cat([self.corners, spans], 1).tolist()
        return [[[windows[action - 1]] for action in row if action > STOP] for row in route.tolist()]
