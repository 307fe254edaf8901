"""`sliced_conv` is a residual block that uses the first inner channels only, as many as each row chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from dynrl.ops.backend import Path, path, selects
from dynrl.ops.convolution import FoldedConv2d, fold
from dynrl.ops.gated_residual import ResidualBlock
from dynrl.ops.move import compute_groups, compute_rows
from dynrl.ops.partition import partition
from dynrl.ops.pooled import MapSums


class SlicedBlock(nn.Module):
    """A residual block for inference only, relu(x + branch_w(x)), with several inner widths w.

    Its branch is a chain of convolutions, of which choice c uses the first widths[c] inner channels. All widths share
    the weights. Batch norm is not shared: it is folded into a scale and a shift for each width and channel.

    Args:
        convolutions: two or more convolutions of stride 1 that keep the map's size. All channels between them are
            inner.
        norms: for each convolution, a batch norm for each width, over its channels at that width.
        widths: the inner channels at each choice, none of them 0.
    """

    active: Tensor

    def __init__(
        self, convolutions: Sequence[nn.Conv2d], norms: Sequence[Sequence[nn.Module]], widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        inner = convolutions[0].out_channels
        if min(widths) < 1 or max(widths) > inner:
            raise ValueError(f"expected widths in 1..{inner}, the inner channels of the block, got {widths}")
        for convolution, by_width in zip(convolutions, norms, strict=True):
            if convolution.stride != (1, 1) or convolution.groups != 1 or len(by_width) != len(widths):
                raise ValueError(
                    f"expected convolutions of stride 1 in one group with {len(widths)} norms, one a width, got stride "
                    f"{convolution.stride}, {convolution.groups} groups and {len(by_width)} norms"
                )
        self.widths = widths
        self.count = len(convolutions)
        self.paddings = [int(c.padding[0]) for c in convolutions]
        for i, (convolution, by_width) in enumerate(zip(convolutions, norms, strict=True)):
            weight = convolution.weight.detach()
            scale = torch.ones(len(widths), len(weight), dtype=torch.float32, device=weight.device)
            shift = torch.zeros_like(scale)
            for c, norm in enumerate(by_width):
                active = slice(self.channels(i, c)[1])
                bias = None if convolution.bias is None else convolution.bias[active]
                scale[c, active], shift[c, active] = fold(norm, weight[active], bias)
            self.register_buffer(f"weight{i}", weight.clone())
            self.register_buffer(f"scale{i}", scale)
            self.register_buffer(f"shift{i}", shift)
        self.register_buffer("active", torch.tensor(widths, dtype=torch.int32, device=convolutions[0].weight.device))
        self._narrow: dict[int, ResidualBlock] = {}

    def channels(self, i: int, choice: int) -> tuple[int | None, int | None]:
        """Return how many input and output channels convolution `i` uses at a choice, as slice ends; None for all."""
        return (None if i == 0 else self.widths[choice], None if i == self.count - 1 else self.widths[choice])

    def narrow(self, choice: int) -> ResidualBlock:
        """Return the block at one width, as a block of its own, which is made once."""
        if choice not in self._narrow:
            convolutions = []
            for i, padding in enumerate(self.paddings):
                inputs, outputs = self.channels(i, choice)
                scale, shift = (getattr(self, f"{name}{i}")[choice, :outputs] for name in ("scale", "shift"))
                full = getattr(self, f"weight{i}")
                weight = (full[:outputs, :inputs] * scale.view(-1, 1, 1, 1)).to(full.dtype)
                convolutions.append(FoldedConv2d.holding(weight, shift.to(full.dtype), padding=padding))
            self._narrow[choice] = ResidualBlock(convolutions)
        return self._narrow[choice]

    def masked(self, x: Tensor, choice: int) -> Tensor:
        """Run the block at one width by masks over all channels, which is the definition: [n, C, H, W] to the same."""
        y = x
        for i, padding in enumerate(self.paddings):
            weight, scale, shift = (getattr(self, f"{name}{i}") for name in ("weight", "scale", "shift"))
            y = F.conv2d(y, weight, padding=padding)
            y = y * scale[choice].to(y).view(-1, 1, 1) + shift[choice].to(y).view(-1, 1, 1)
            if i < self.count - 1:
                active = torch.arange(y.shape[1], device=y.device) < self.widths[choice]
                y = torch.where(active.view(-1, 1, 1), y.relu(), 0)
        return (x + y).relu()

    def sliced(self, x: Tensor, choice: int) -> Tensor:
        """Run the block at one width by slices of the weights: [n, C, H, W] to the same.

        Traced code uses this, as packed weights mean nothing to a tracer. It is differentiable in `x`.
        """
        y = x
        for i, padding in enumerate(self.paddings):
            inputs, outputs = self.channels(i, choice)
            scale, shift = (getattr(self, f"{name}{i}")[choice, :outputs].view(-1, 1, 1) for name in ("scale", "shift"))
            y = F.conv2d(y, getattr(self, f"weight{i}")[:outputs, :inputs], padding=padding) * scale + shift
            y = y.relu() if i < self.count - 1 else (x + y).relu()
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Run the block at its last width, [n, C, H, W] to the same; without gradients, `x` may be overwritten."""
        last = len(self.widths) - 1
        return self.sliced(x, last) if torch.is_grad_enabled() or is_compiling() else self.narrow(last)(x)

    # The narrow blocks are a cache for these weights, device and type, so whatever changes or copies them drops the
    # cache.
    def _load_from_state_dict(self, *args: Any) -> None:
        self._narrow = {}
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> SlicedBlock:
        self._narrow = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_narrow": {}}


def sliced_conv_ref(x: Tensor, choice: Tensor, block: SlicedBlock, sums: MapSums | None = None) -> Tensor:
    """Compute the definition of `sliced_conv`: all rows at all widths, with masks, and then a selection.

    Args:
        x: [n, C, H, W].
        choice: [n] integers in 0 ... choices-1.
        block: a block that has a width for each choice.
        sums: what is known of the sums of `x`; here, they stay as they are, like `x` itself.

    Returns:
        [n, C, H, W].

    Source: slicing instead of masking, DS-Net (Li et al. 2021, CVPR, section 3.3); switchable batch norm, slimmable
    networks (Yu et al. 2019, ICLR, section 3.2).
    """
    out = x
    for c in range(len(block.widths)):
        out = torch.where((choice == c).view(-1, 1, 1, 1), block.masked(x, c), out)
    return out


def sliced_conv(x: Tensor, choice: Tensor, block: SlicedBlock, sums: MapSums | None = None) -> Tensor:
    """Do `sliced_conv_ref`, computing each row at its width only.

    `x` itself is overwritten and returned, and `sums` hold for the result, or are not known: only the kernels bring
    them along. If gradients are recorded, the definition runs instead, which is differentiable in `x`. Inside
    `device_counts(select=True)`, all rows are computed at full width, by the vendor's convolutions.

    The MACs are those of the block at each row's width.
    """
    if torch.is_grad_enabled():
        return sliced_conv_ref(x, choice, block)
    known = None if sums is None else sums.take(x)
    match path(x, vendor=True):
        case Path.REF:
            return sliced_conv_ref(x, choice, block)
        case Path.TRACED:
            for c in range(len(block.widths)):
                x = compute_rows(x, (choice == c).nonzero().squeeze(1), partial(block.sliced, choice=c))
            return x
        case Path.TRITON:
            maps = x.contiguous(memory_format=torch.channels_last)
            (_at_full_width if selects() else _on_triton)(maps, choice, block, known)
            x = x if maps is x else x.copy_(maps)
            if sums is not None:
                sums.keep(x, known)
            return x
        case Path.HOST:
            parts = partition(choice, len(block.widths))
            if max(parts.sizes) == len(x):  # all rows chose the same width
                return block.narrow(parts.sizes.index(len(x)))(x)
            ends = pairwise(parts.ends)
            groups = [(block.narrow(c), start, end) for c, (start, end) in enumerate(ends) if end > start]
            return compute_groups(x, parts.order, groups)


def _on_triton(x: Tensor, choice: Tensor, block: SlicedBlock, sums: Tensor | None) -> None:
    """Overwrite `x` in channels_last by each row at its width."""
    from dynrl.ops.kernels.conv import conv_rows

    parts = partition(choice, len(block.widths))
    order, offsets = parts.order, parts.offsets
    y = x
    for i, padding in enumerate(block.paddings):
        first, last = i == 0, i == block.count - 1
        weight, scale, shift = (getattr(block, f"{name}{i}") for name in ("weight", "scale", "shift"))
        size = (len(y), len(weight), *(side + 2 * padding - weight.shape[2] + 1 for side in y.shape[2:]))
        out = x if last else torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        conv_rows(
            y, weight, out, offsets, in_rows=order if first else None, out_rows=order if last else None,
            scale=scale, shift=shift, in_widths=None if first else block.active,
            out_widths=None if last else block.active, residual=x if last else None, relu=True, padding=padding,
            granule=weight.shape[1] if first else math.gcd(*block.widths), sums=sums if last else None,
        )  # fmt: skip
        y = out


def _at_full_width(x: Tensor, choice: Tensor, block: SlicedBlock, sums: Tensor | None) -> None:
    """Overwrite `x` in channels_last by all rows at full width, where channels beyond a row's width are zero.

    Behind each convolution of the vendor's, one kernel does what depends on the row.
    """
    from dynrl.ops.kernels.slices import finish_slices

    y = x
    for i, padding in enumerate(block.paddings):
        last = i == block.count - 1
        weight, scale, shift = (getattr(block, f"{name}{i}") for name in ("weight", "scale", "shift"))
        y = F.conv2d(y, weight, padding=padding).contiguous(memory_format=torch.channels_last)
        finish_slices(
            y, x if last else y, choice, scale, shift, widths=None if last else block.active,
            residual=x if last else None, sums=sums if last else None,
        )  # fmt: skip
