"""Which dimension of a user's features holds the channels is read off the ops that compute on them.

The shape does not tell: [n, 4, 16000] may be 4 channels of a signal or 4 tokens, and [n, 14, 14, 96] may be a map whose
channels come last. A convolution has its channels in dimension 1; a linear layer and a layer norm have them last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dynrl.cost import Executed

CHANNELS = ("first", "last")


def takes_channels_last(ops: list[Executed], shape: torch.Size) -> bool | None:
    """Tell whether the first of `ops` that knows the channels of features of this shape has them last; None: no op."""
    if len(shape) < 3:
        return False
    return next((found.last for found in _layouts(ops) if found.fits(found.read, shape)), None)


def gives_channels_last(ops: list[Executed], shape: torch.Size) -> bool | None:
    """Tell whether the last of `ops` that knows the channels of features of this shape has them last; None: no op."""
    if len(shape) < 3:
        return False
    known = [found.last for found in _layouts(ops) if found.fits(found.made, shape)]
    return known[-1] if known else None


@dataclass(frozen=True)
class _Layout:
    """An op read and made tensors of these shapes, with their channels in the last dimension or in dimension 1."""

    read: torch.Size
    made: torch.Size
    last: bool

    def fits(self, mine: torch.Size, features: torch.Size) -> bool:
        """Tell whether the op's tensor of the shape `mine` is features of the shape `features`, for all that it shows.

        A product has flattened the places, and pooling behind a convolution has changed them; channels stay.
        """
        if not self.last:
            return len(mine) == len(features) and mine[1] == features[1]
        return mine[-1] == features[-1] and mine.numel() == features.numel()


def _layouts(ops: list[Executed]) -> Iterator[_Layout]:
    for op in ops:
        name, tensors = op.func._overloadpacket.__name__, [x for x in op.given if isinstance(x, Tensor)]
        made = op.result[0] if isinstance(op.result, tuple | list) else op.result
        if "convolution" in name or "batch_norm" in name or "group_norm" in name:
            if tensors[0].dim() > 2:
                yield _Layout(tensors[0].shape, made.shape, False)
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            left = tensors[name in ("addmm", "baddbmm")]
            yield _Layout(left.shape, made.shape, True)
        elif name in ("native_layer_norm", "_fused_rms_norm") and len(op.given[1]) == 1:
            yield _Layout(tensors[0].shape, made.shape, True)
