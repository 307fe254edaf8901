"""These kernels gather chosen positions of chosen rows, and put back what a block made of them."""

# Triton gives kernel parameters their types when a kernel is called.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # the numbers that a program moves


@triton.jit
def _take_positions_kernel(
    x_ptr, rows_ptr, order_ptr, out_ptr, items, count, size, stride_row, stride_place, stride_order,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = item < items
    row = tl.load(rows_ptr + item // count, mask=mine, other=0).to(tl.int64)
    place = tl.load(order_ptr + row * stride_order + item % count, mask=mine, other=0).to(tl.int64)
    mask = mine[:, None] & (n < size)[None, :]
    values = tl.load(x_ptr + (row * stride_row + place * stride_place)[:, None] + n[None, :], mask=mask)
    tl.store(out_ptr + item.to(tl.int64)[:, None] * size + n[None, :], values, mask=mask)


@triton.jit
def _put_positions_kernel(
    done_ptr, rows_ptr, order_ptr, weight_ptr, x_ptr, items, count, size, stride_row, stride_place, stride_order,
    stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = item < items
    row = tl.load(rows_ptr + item // count, mask=mine, other=0).to(tl.int64)
    place = tl.load(order_ptr + row * stride_order + item % count, mask=mine, other=0).to(tl.int64)
    mask = mine[:, None] & (n < size)[None, :]
    done = tl.load(done_ptr + item.to(tl.int64)[:, None] * size + n[None, :], mask=mask)
    at = x_ptr + (row * stride_row + place * stride_place)[:, None] + n[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row * stride_weight + place, mask=mine, other=0.0).to(tl.float32)[:, None]
        before = tl.load(at, mask=mask).to(tl.float32)
        done = (before + weight * (done.to(tl.float32) - before)).to(x_ptr.dtype.element_ty)
    tl.store(at, done, mask=mask)


def _grid(items: int, size: int) -> tuple[tuple[int, int], dict[str, int]]:
    block_n = min(128, triton.next_power_of_2(size))
    block_m = TILE // block_n
    return (triton.cdiv(items, block_m), triton.cdiv(size, block_n)), {"BLOCK_M": block_m, "BLOCK_N": block_n}


def take_positions(x: Tensor, rows: Tensor, order: Tensor, count: int) -> Tensor:
    """Gather the first `count` positions of the order of each of `rows`.

    Args:
        x: [n, T, d], last stride 1, any other strides.
        rows: [m] int64, contiguous.
        order: [n, T] int64, last stride 1.
        count: the number of positions, at least 1.

    Returns:
        a new tensor [m, count, d].
    """
    assert x.stride(2) == 1 and order.stride(1) == 1 and rows.is_contiguous()
    size, items = x.shape[2], len(rows) * count
    out = torch.empty(len(rows), count, size, dtype=x.dtype, device=x.device)
    if items and size:
        grid, blocks = _grid(items, size)
        _take_positions_kernel[grid](
            x, rows, order, out, items, count, size, x.stride(0), x.stride(1), order.stride(0), **blocks
        )
    return out


def put_positions(done: Tensor, rows: Tensor, order: Tensor, weight: Tensor | None, x: Tensor) -> Tensor:
    """Put back what `take_positions` gathered: x changes by its weight times the difference to `done`.

    Args:
        done: [m, count, d] contiguous, x's dtype.
        rows, order: the same as in `take_positions`; rows are distinct, and so are the positions of a row.
        weight: [n, T], any float dtype, last stride 1; None puts `done` in the place of what was there.
        x: [n, T, d], last stride 1; changed in place. Other positions are untouched.

    Returns:
        `x`.
    """
    assert done.is_contiguous() and done.dtype == x.dtype and x.stride(2) == 1 and order.stride(1) == 1
    assert weight is None or weight.stride(1) == 1
    count, size = done.shape[1:]
    items = len(rows) * count
    if items and size:
        grid, blocks = _grid(items, size)
        _put_positions_kernel[grid](
            done, rows, order, weight, x, items, count, size, x.stride(0), x.stride(1), order.stride(0),
            0 if weight is None else weight.stride(0), **blocks,
        )  # fmt: skip
    return x
