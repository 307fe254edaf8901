"""`routed_linear` multiplies each row with the matrix of the expert that it chose."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynrl.ops.backend import Path, path
from dynrl.ops.move import put_rows
from dynrl.ops.partition import Partition


def column_major(weight: Tensor) -> Tensor:
    """Lay `weight` [..., m, k] out in the order fastest for few rows: by columns on the CPU, by rows on CUDA.

    About 5 to 60 rows are multiplied faster; for fewer and for more rows, there is no difference. Weights that are in
    no cache are read a little slower.
    """
    if weight.is_cuda:
        return weight.contiguous()
    return weight.transpose(-1, -2).contiguous().transpose(-1, -2)


def routed_linear_macs(rows: int, inputs: int, outputs: int) -> int:
    """Return the MACs of `rows` rows at an expert with `inputs` inputs and `outputs` outputs."""
    return rows * inputs * outputs


def routed_linear_ref(
    x: Tensor,
    weight: Tensor,
    parts: Partition,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    splits: tuple[int, ...] | None = None,
    relu: bool = False,
    sorted_in: bool = False,
    sorted_out: bool = False,
) -> Tensor:
    """Compute the definition of `routed_linear`: all experts compute all rows, and each row takes one result.

    Two calls make a layer of two-layer experts: the first with `sorted_out`, the second with `sorted_in`. Experts of
    unequal hidden width lie side by side in one weight, and `splits` tells their widths; 0 is an expert without units.

    Args:
        x: [n, k], in the batch's order, or sorted by choice where `sorted_in`.
        weight: [E, m, k]. With `splits` and `sorted_out`: [sum(splits), k], where expert e gives the first splits[e]
            columns of its rows, and the other columns are undefined. With `splits` and `sorted_in`: [m, sum(splits)],
            where expert e reads the first splits[e] columns of its rows.
        parts: the partition of the n rows by their E experts.
        bias: [E, m]; [sum(splits)] with `splits` and `sorted_out`.
        scale: [n] in the batch's order, or None; each row of the result is multiplied with it, after ReLU.
        splits: E widths.
        relu: apply ReLU.
        sorted_in: whether the rows of `x` are sorted by choice.
        sorted_out: whether the rows of the result are to be sorted by choice.

    Returns:
        [n, m], m = max(splits) where the outputs are split.

    Source: the grouped product of mixture-of-experts layers (Tan et al. 2024, "Scattered Mixture-of-Experts
    Implementation", section 3), with the router outside.
    """
    order, offsets = parts.order, parts.offsets
    rows = x if sorted_in else x[order]
    place = torch.arange(len(rows), device=x.device).unsqueeze(1)
    width = _width(weight, splits, sorted_out)
    out = rows.new_zeros(len(rows), width)
    for e, (matrix, shift) in enumerate(_experts(weight, bias, splits, sorted_out, [1] * parts.num_choices)):
        y = F.pad(F.linear(rows[:, : matrix.shape[1]], matrix, shift), (0, width - len(matrix)))
        out = torch.where((place >= offsets[e]) & (place < offsets[e + 1]), y, out)
    out = out.relu() if relu else out
    if scale is not None:
        out = out * scale[order].unsqueeze(1).to(out.dtype)
    return out if sorted_out else torch.zeros_like(out).index_copy(0, order, out)


def routed_linear(
    x: Tensor,
    weight: Tensor,
    parts: Partition,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    splits: tuple[int, ...] | None = None,
    relu: bool = False,
    sorted_in: bool = False,
    sorted_out: bool = False,
) -> Tensor:
    """Do `routed_linear_ref`, with each row at its own expert only. Differentiable in all float tensors.

    Few rows are multiplied faster with a `weight` that has been laid out by `column_major`.

    The MACs are `routed_linear_macs` for each expert's rows.
    """
    how: Any = {"splits": splits, "relu": relu, "sorted_in": sorted_in, "sorted_out": sorted_out}
    match path(x):
        case Path.REF:
            return routed_linear_ref(x, weight, parts, bias, scale, **how)
        case Path.TRACED if not torch.is_grad_enabled():
            widths = list(splits) if splits else None
            return torch.ops.dynrl.routed_linear(
                x, weight, parts.order, parts.offsets, bias, scale, widths, relu, sorted_in, sorted_out
            )
        case Path.TRITON:
            return _on_triton(x, weight, parts, bias, scale, **how)
        case _:
            return _on_host(x, weight, parts, bias, scale, **how)


@torch.library.custom_op("dynrl::routed_linear", mutates_args=())
def _traced(
    x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, bias: Tensor | None, scale: Tensor | None,
    splits: list[int] | None, relu: bool, sorted_in: bool, sorted_out: bool,
) -> Tensor:  # fmt: skip
    return routed_linear(
        x, weight, Partition(order, len(offsets) - 1, sorted_choice=None, offsets=offsets), bias, scale,
        splits=tuple(splits) if splits else None, relu=relu, sorted_in=sorted_in, sorted_out=sorted_out,
    )  # fmt: skip


@_traced.register_fake
def _(
    x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, bias: Tensor | None, scale: Tensor | None,
    splits: list[int] | None, relu: bool, sorted_in: bool, sorted_out: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], max(splits) if splits and sorted_out else weight.shape[-2])


def _on_host(
    x: Tensor, weight: Tensor, parts: Partition, bias: Tensor | None, scale: Tensor | None, *,
    splits: tuple[int, ...] | None, relu: bool, sorted_in: bool, sorted_out: bool,
) -> Tensor:  # fmt: skip
    order = parts.order
    rows = x if sorted_in else x.index_select(0, order)
    width = _width(weight, splits, sorted_out)
    experts = _experts(weight, bias, splits, sorted_out, parts.sizes)
    if torch.is_grad_enabled():
        pieces = [
            F.pad(F.linear(part[:, : matrix.shape[1]], matrix, shift), (0, width - len(matrix)))
            for part, (matrix, shift) in zip(rows.split(parts.sizes), experts, strict=True)
            if len(part)
        ]
        out = torch.cat(pieces) if pieces else rows.new_zeros(0, width)
        out = out.relu() if relu else out
        out = out if scale is None else out * scale[order].unsqueeze(1).to(out.dtype)
        return out if sorted_out else torch.zeros_like(out).index_copy(0, order, out)
    out = rows.new_empty(len(rows), width)
    for part, into, (matrix, shift) in zip(rows.split(parts.sizes), out.split(parts.sizes), experts, strict=True):
        if not len(part):
            continue
        if splits:
            part, into = part[:, : matrix.shape[1]], into[:, : len(matrix)]
        if shift is None:
            torch.mm(part, matrix.t(), out=into)
        else:
            torch.addmm(shift, part, matrix.t(), out=into)
    out = out.relu_() if relu else out
    if scale is not None:
        out.mul_(scale.index_select(0, order).unsqueeze(1))
    return out if sorted_out else put_rows(torch.empty_like(out), order, out)


def _width(weight: Tensor, splits: tuple[int, ...] | None, ragged_out: bool) -> int:
    """Return the number of columns of the result."""
    if splits and ragged_out:
        return max(splits)
    return weight.shape[-2]


def _experts(
    weight: Tensor, bias: Tensor | None, splits: tuple[int, ...] | None, ragged_out: bool, sizes: list[int]
) -> list[tuple[Tensor, Tensor | None]]:
    """Return each expert's matrix [m_e, k_e] and bias [m_e]; experts without rows may get any others, to save time."""
    if splits is None:
        return [(weight[e], None if bias is None else bias[e]) if n else (weight, None) for e, n in enumerate(sizes)]
    matrices = weight.split(splits, 0 if ragged_out else 1)
    if bias is None:
        return [(matrix, None) for matrix in matrices]
    return list(zip(matrices, bias.split(splits) if ragged_out else bias.unbind(0), strict=True))


@cache  # without a bound: a CUDA graph keeps reading the tensors that it read when it was recorded
@torch.inference_mode(False)  # otherwise training could not use tensors made in inference
def _starts(
    splits: tuple[int, ...] | None, experts: int, rows: int, row_stride: int, ragged_out: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return where each expert's matrix and bias start, and how wide it is, as three tensors on the device.

    They are made once, since a CUDA graph cannot copy them from the host.
    """
    before = [sum(splits[:e]) for e in range(experts)] if splits else [e * rows for e in range(experts)]
    starts = before if splits and not ragged_out else [b * row_stride for b in before]
    bias_starts = [e * rows for e in range(experts)] if splits and not ragged_out else before
    widths = torch.tensor(splits, dtype=torch.int32, device=device) if splits else None
    return torch.tensor(starts, device=device), torch.tensor(bias_starts, device=device), widths


def _on_triton(
    x: Tensor, weight: Tensor, parts: Partition, bias: Tensor | None, scale: Tensor | None, *,
    splits: tuple[int, ...] | None, relu: bool, sorted_in: bool, sorted_out: bool,
) -> Tensor:  # fmt: skip
    from dynrl.ops.kernels.linear import linear_rows

    ragged_out = splits is not None and sorted_out
    weight = weight.to(x.dtype).contiguous()  # under autocast, rows are in half precision, but weights are not
    starts, bias_starts, widths = _starts(
        splits, parts.num_choices, weight.shape[-2], weight.stride(-2), sorted_out, x.device
    )
    ways = {
        "in_rows": None if sorted_in else parts.order, "out_rows": None if sorted_out else parts.order,
        "in_widths": None if ragged_out else widths, "out_widths": widths if ragged_out else None,
    }  # fmt: skip
    width = _width(weight, splits, sorted_out)
    if not torch.is_grad_enabled():
        factors = scale.index_select(0, parts.order) if scale is not None and sorted_out else scale
        if bias is None:
            bias_at: dict[str, Any] = {}
        else:
            bias_at = {"bias": bias.contiguous(), "bias_starts": bias_starts}
        out = x.new_empty(len(x), width)
        return linear_rows(
            x.contiguous(), weight, out, parts.offsets, starts, scale=factors, relu=relu, **bias_at, **ways
        )  # fmt: skip
    # Only the product needs a backward pass of its own; autograd does the pointwise steps.
    out = GroupedProduct.apply(x, weight, parts.offsets, starts, width, ways)
    if bias is not None:
        out = out + _bias_rows(bias.to(x.dtype), parts, splits, sorted_out, width)
    out = out.relu() if relu else out
    return out if scale is None else out * (scale[parts.order] if sorted_out else scale).unsqueeze(1).to(out.dtype)


def _bias_rows(bias: Tensor, parts: Partition, splits: tuple[int, ...] | None, sorted_out: bool, width: int) -> Tensor:
    """Return the bias of each row's expert, in the order of the result: [n, width]."""
    order = parts.order
    expert = torch.searchsorted(parts.offsets[1:], torch.arange(len(order), device=order.device), right=True)
    if splits and sorted_out:
        bias = torch.stack([F.pad(part, (0, width - len(part))) for part in bias.split(splits)])
    rows = bias[expert]
    return rows if sorted_out else torch.zeros_like(rows).index_copy(0, order, rows)


class GroupedProduct(torch.autograd.Function):
    """This is the grouped product by the kernels, with its gradients; `ways` are arguments of `linear_rows`."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, starts: Tensor, width: int, ways: dict[str, Any]
    ) -> Tensor:
        from dynrl.ops.kernels.linear import linear_rows

        ctx.save_for_backward(x, weight, offsets, starts)
        ctx.ways = ways
        return linear_rows(x.contiguous(), weight, x.new_zeros(len(x), width), offsets, starts, **ways)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        from dynrl.ops.kernels.linear import grad_weight_rows, linear_rows

        x, weight, offsets, starts = ctx.saved_tensors
        ways, dy = ctx.ways, grads[0].contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            back = {
                "in_rows": ways["out_rows"], "out_rows": ways["in_rows"],
                "in_widths": ways["out_widths"], "out_widths": ways["in_widths"],
            }  # fmt: skip
            dx = linear_rows(dy, weight.transpose(-1, -2), x.new_zeros(x.shape), offsets, starts, **back)
        if ctx.needs_input_grad[1]:
            dw = grad_weight_rows(
                x.contiguous(), dy, torch.zeros_like(weight), offsets, starts, x_rows=ways["in_rows"],
                dy_rows=ways["out_rows"], in_widths=ways["in_widths"], out_widths=ways["out_widths"],
            )  # fmt: skip
        return dx, dw, None, None, None, None
