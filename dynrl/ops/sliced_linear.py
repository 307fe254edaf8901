"""`sliced_linear` is two products that use the first hidden units only, as many as each row chose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.ops.backend import Path, path
from dynrl.ops.costs import COSTS
from dynrl.ops.move import put_rows
from dynrl.ops.partition import partition
from dynrl.ops.routed_linear import column_major


class SlicedLinear(nn.Module):
    """Two layers for inference only, second[:, :w](relu(first[:w](x))): choice c uses the first w = widths[c] units.

    Args:
        first: the layer to the hidden units.
        second: the layer from the hidden units.
        widths: the hidden units at each choice, rising.
    """

    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    active: Tensor
    limit: Tensor
    starts: Tensor

    def __init__(self, first: nn.Linear, second: nn.Linear, widths: tuple[int, ...]) -> None:
        super().__init__()
        hidden = first.out_features
        if list(widths) != sorted(set(widths)) or widths[0] < 0 or widths[-1] > hidden:
            raise ValueError(f"expected rising widths in 0..{hidden}, the hidden units of the layer, got {widths}")
        self.widths = widths
        tensors = {"w1": first.weight, "b1": first.bias, "w2": second.weight, "b2": second.bias}
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        device = first.weight.device
        self.register_buffer("active", torch.tensor(widths, dtype=torch.int32, device=device))
        inside = torch.arange(hidden, device=device) < self.active.unsqueeze(1)
        # [choices, hidden], infinity within the width and 0 beyond it, so that ReLU and mask are one clamp.
        self.register_buffer("limit", torch.where(inside, torch.inf, 0.0).to(first.weight.dtype))
        self.register_buffer("starts", torch.zeros(len(widths), dtype=torch.int64, device=device))
        self._lay_out()

    def _lay_out(self) -> None:
        self.w1, self.w2 = column_major(self.w1), column_major(self.w2)

    def _apply(self, fn: Any, recurse: bool = True) -> SlicedLinear:
        super()._apply(fn, recurse)
        self._lay_out()
        return self


def sliced_linear_macs(rows: int, inputs: int, width: int, outputs: int) -> int:
    """Return the MACs of `rows` rows that use `width` hidden units."""
    return rows * width * (inputs + outputs)


def sliced_linear_ref(x: Tensor, choice: Tensor, layer: SlicedLinear) -> Tensor:
    """Compute the definition of `sliced_linear`: all rows compute all hidden units and keep the first of them.

    Args:
        x: [n, inputs].
        choice: [n] integers in 0 ... choices-1.
        layer: a layer that has a width for each choice.

    Returns:
        [n, outputs].

    Source: width slices of slimmable networks (Yu et al. 2019, ICLR), sliced and not masked as in DS-Net (Li et al.
    2021, CVPR, section 3.3).
    """
    hidden = F.linear(x, layer.w1, layer.b1).relu()
    return F.linear(torch.where(layer.limit[choice] > 0, hidden, 0), layer.w2, layer.b2)


def sliced_linear(x: Tensor, choice: Tensor, layer: SlicedLinear) -> Tensor:
    """Do `sliced_linear_ref`, reading and computing each row's slice only.

    The CPU sorts the rows by width and multiplies them with one block of the weights after the other: block j with all
    rows that are wide enough for it. So the weights are read once, not once for each width. If gradients are recorded,
    the definition runs instead, which is differentiable in `x`.

    The MACs are `sliced_linear_macs` for each width's rows.
    """
    if torch.is_grad_enabled():
        return sliced_linear_ref(x, choice, layer)
    tensors = (layer.w1, layer.b1, layer.w2, layer.b2, layer.limit)
    match path(x):
        case Path.REF:
            return sliced_linear_ref(x, choice, layer)
        case Path.TRACED:
            return torch.ops.dynrl.sliced_linear(x, choice, *tensors, list(layer.widths))
        case Path.TRITON:
            return _on_triton(x, choice, layer)
        case Path.HOST:
            return _on_host(x, choice, *tensors, list(layer.widths))


def _on_host(
    x: Tensor, choice: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, limit: Tensor,
    widths: list[int],
) -> Tensor:  # fmt: skip
    n, weights = len(x), w1.numel() + w2.numel()
    # If saving half of the work would not pay, the estimate below is not worth its time.
    if n > 1 and not COSTS.worth_compacting(COSTS.mac_time(n * weights) / 2, COSTS.moving):
        return _masked(x, choice, w1, b1, w2, b2, limit)
    choices = choice.tolist()
    if n and choices.count(choices[0]) == n:
        width = widths[choices[0]]
        hidden = F.linear(x, w1[:width], None if b1 is None else b1[:width]).relu_()
        return F.linear(hidden, w2[:, :width], b2)
    blocks = list(_blocks(choices, widths))
    whole = COSTS.product_time(n, w1.numel()) + COSTS.product_time(n, w2.numel())
    sides = w1.shape[1], w2.shape[0]
    sliced = sum(COSTS.product_time(rows, (stop - start) * side) for rows, start, stop in blocks for side in sides)
    if not COSTS.worth_compacting(whole - sliced, COSTS.moving):
        return _masked(x, choice, w1, b1, w2, b2, limit)
    # The widest rows come first, so that each block takes the first rows.
    order = torch.sort(choice, descending=True, stable=True).indices
    rows = x.index_select(0, order)
    # Several blocks are added up in float32; otherwise each would be rounded to half precision.
    out = x.new_empty(n, len(w2), dtype=torch.float32)
    for i, (count, start, stop) in enumerate(blocks):
        hidden = F.linear(rows[:count], w1[start:stop], None if b1 is None else b1[start:stop]).relu_()
        into, matrix = out[:count], w2[:, start:stop].t()
        if x.dtype != torch.float32:
            product = torch.mm(hidden, matrix)
            into.copy_(product) if i == 0 else into.add_(product)
        elif i:
            into.addmm_(hidden, matrix)
        elif b2 is None:
            torch.mm(hidden, matrix, out=into)
        else:
            torch.addmm(b2, hidden, matrix, out=into)
    if x.dtype != torch.float32:
        out = (out if b2 is None else out.add_(b2)).to(x.dtype)
    return put_rows(torch.empty_like(out), order, out)


_traced = torch.library.custom_op("dynrl::sliced_linear", _on_host, mutates_args=())


@_traced.register_fake
def _(
    x: Tensor, choice: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, limit: Tensor,
    widths: list[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], len(w2))


def _masked(
    x: Tensor, choice: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, limit: Tensor
) -> Tensor:
    hidden = F.linear(x, w1, b1)
    return F.linear(hidden.clamp_(hidden.new_zeros(()), limit.index_select(0, choice)), w2, b2)


def _blocks(choices: list[int], widths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield each block of hidden units start ... stop-1 as (rows, start, stop), where the first `rows` rows use it."""
    rows, start = len(choices), 0
    for c, stop in enumerate(widths):
        if rows and (stop > start or c == 0):  # the first block, even if empty, sets the biases
            yield rows, start, stop
        start = stop
        rows -= choices.count(c)


def _on_triton(x: Tensor, choice: Tensor, layer: SlicedLinear) -> Tensor:
    from dynrl.ops.kernels.linear import linear_rows

    parts = partition(choice, len(layer.widths))
    order, offsets, starts = parts.order, parts.offsets, layer.starts
    hidden = x.new_empty(len(x), len(layer.w1))  # sorted by choice; nothing beyond a row's width is written or read
    linear_rows(
        x.contiguous(), layer.w1, hidden, offsets, starts, in_rows=order, out_widths=layer.active, relu=True,
        bias=layer.b1, bias_starts=None if layer.b1 is None else starts,
    )  # fmt: skip
    return linear_rows(
        hidden, layer.w2, x.new_empty(len(x), len(layer.w2)), offsets, starts, out_rows=order, in_widths=layer.active,
        bias=layer.b2, bias_starts=None if layer.b2 is None else starts,
    )  # fmt: skip
