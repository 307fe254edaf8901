"""Which dimension of a user's features holds the channels is read off the ops that compute on them.

The shape does not tell: [n, 4, 16000] may be 4 channels of a signal or 4 tokens, and [n, 14, 14, 96] may be a map whose
channels come last. A convolution has its channels in dimension 1; a linear layer and a layer norm have them last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dynrl.cost import Executed, watched


def takes_channels_last(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Tell whether the first op of `function` that knows the channels of its input `x` has them last."""
    shape = x.shape
    with watched() as ops:
        function(x)
    return next((found.last for found in _layouts(ops) if found.fits(found.read, shape)), len(shape) == 3)


def gives_channels_last(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Tell whether the last op of `function` that knows the channels of the result has them last."""
    with watched() as ops:
        shape = function(x).shape
    known = [found.last for found in _layouts(ops) if found.fits(found.made, shape)]
    return known[-1] if known else len(shape) == 3


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
