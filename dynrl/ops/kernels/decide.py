"""These kernels do the steps of a decision other than layers: pooling, the router, the records of the walk."""

# Triton gives kernel parameters their types when a kernel is called.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynrl.ops.kernels.linear import dot


@triton.jit
def _pool_kernel(
    x_ptr, out_ptr, sums_ptr, offsets_ptr, rows_ptr, places, pixels, channels, parts, groups, stride_n, stride_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if offsets_ptr is not None:
        row += tl.load(offsets_ptr)
        if row >= tl.load(offsets_ptr + groups):
            return
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in tl.range(0, places, BLOCK_P, num_stages=3):
        p = first + tl.arange(0, BLOCK_P)
        mask = (p < places)[:, None] & c_mask[None, :]
        acc += tl.load(x_ptr + row * stride_n + p[:, None] * stride_p + c[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(acc, 0)
    if out_ptr is not None:
        tl.store(out_ptr + row * channels + c, total / pixels, mask=c_mask)
    if sums_ptr is not None:
        # The first part holds all of the map.
        for first in tl.range(0, parts, BLOCK_P):
            part = first + tl.arange(0, BLOCK_P)
            mask = (part < parts)[:, None] & c_mask[None, :]
            values = tl.where((part == 0)[:, None], total[None, :], 0.0)
            tl.store(sums_ptr + (row * parts + part[:, None]) * channels + c[None, :], values, mask=mask)


def _pool(
    x: Tensor, pixels: int, out: Tensor | None, sums: Tensor | None, offsets: Tensor | None, rows: Tensor | None
) -> None:
    """Launch the kernel for `x` [n, places, C], whose channels are next to each other."""
    n, places, channels = x.shape
    assert x.stride(2) == 1
    if n == 0 or channels == 0:
        return
    # With few rows, blocks of channels are narrow, so that enough programs share the work.
    block_c = min(64 if n >= 64 else 16, max(16, triton.next_power_of_2(channels)))
    block_p = min(2048 // block_c, triton.next_power_of_2(places))
    parts, groups = 0 if sums is None else sums.shape[1], 0 if offsets is None else len(offsets) - 1
    _pool_kernel[(n, triton.cdiv(channels, block_c))](
        x, out, sums, offsets, rows, places, pixels, channels, parts, groups, x.stride(0), x.stride(1),
        BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip


def _places(x: Tensor) -> Tensor:
    """Return maps [n, C, H, W] in channels_last as [n, H W, C]."""
    assert x.stride(1) == 1 and x.stride(2) == x.shape[3] * x.stride(3), "channels_last"
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def pool(x: Tensor, out: Tensor, sums: Tensor | None = None) -> Tensor:
    """Write the mean of each channel over its map.

    Args:
        x: [n, C, H, W] channels_last; a slice of a wider tensor will do.
        out: [n, C] float32, contiguous.
        sums: [n, T, C] float32, contiguous, or None. If given, sums over parts of each map are written here: the first
            part is the whole map, the others are zeros.

    Returns:
        `out`.
    """
    _pool(_places(x), x.shape[2] * x.shape[3], out, sums, None, None)
    return out


def sum_maps(x: Tensor, sums: Tensor, offsets: Tensor, rows: Tensor | None) -> None:
    """Write `sums` as `pool` does, for some maps only.

    Args:
        x: [n, C, H, W] channels_last; a slice of a wider tensor will do.
        sums: [n, T, C] float32, contiguous.
        offsets: [G + 1] int32; the items offsets[0] <= j < offsets[G] are done.
        rows: [capacity] int32 or int64, the map of each item, or None: map j.
    """
    _pool(_places(x), 1, None, sums, offsets, rows)


def pool_sums(sums: Tensor, pixels: int, out: Tensor) -> Tensor:
    """Write the mean of each channel over its map by the sums over the map's parts.

    Args:
        sums: [n, T, C] float32, contiguous.
        pixels: the number of pixels of a map.
        out: [n, C] float32, contiguous.

    Returns:
        `out`.
    """
    _pool(sums, pixels, out, None, None, None)
    return out


@triton.jit
def _decide_kernel(
    features_ptr, weight_ptr, bias_ptr, last_weight_ptr, spent_weight_ptr, head_ptr, head_bias_ptr,
    last_ptr, macs_ptr, action_ptr, n, size_in, hidden, choices, dense_macs,
    LINEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < n
    h = tl.arange(0, BLOCK_H)
    h_mask = h < hidden
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for first in tl.range(0, size_in, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(
            features_ptr + row[:, None] * size_in + k[None, :],
            mask=row_mask[:, None] & (k < size_in)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + k[:, None] * hidden + h[None, :], mask=(k < size_in)[:, None] & h_mask[None, :], other=0.0
        )
        acc = dot(x, w, acc, "ieee")
    last = tl.load(last_ptr + row, mask=row_mask, other=0)
    spent = tl.load(macs_ptr + row, mask=row_mask, other=0).to(tl.float32) / dense_macs
    acc += tl.load(bias_ptr + h, mask=h_mask, other=0.0)[None, :]
    acc += tl.load(last_weight_ptr + last[:, None] * hidden + h[None, :], mask=h_mask[None, :], other=0.0)
    acc += spent[:, None] * tl.load(spent_weight_ptr + h, mask=h_mask, other=0.0)[None, :]
    c = tl.arange(0, BLOCK_C)
    if LINEAR:
        scores = acc
    else:
        acc = tl.maximum(acc, 0.0)
        head = tl.load(
            head_ptr + h[:, None] * choices + c[None, :], mask=h_mask[:, None] & (c < choices)[None, :], other=0.0
        )
        scores = dot(acc, head, tl.zeros([BLOCK_M, BLOCK_C], tl.float32), "ieee")
        scores += tl.load(head_bias_ptr + c, mask=c < choices, other=0.0)[None, :]
    scores = tl.where((c < choices)[None, :], scores, float("-inf"))
    tl.store(action_ptr + row, tl.argmax(scores, 1, tie_break_left=True).to(tl.int64), mask=row_mask)


def decide(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    last_weight: Tensor,
    spent_weight: Tensor,
    head: Tensor | None,
    head_bias: Tensor | None,
    last: Tensor,
    macs: Tensor,
    dense_macs: int,
    action: Tensor,
) -> Tensor:
    """Compute the likeliest choices of a router of one or two linear layers.

    scores = features weight + bias + last_weight[last] + macs / dense_macs * spent_weight; with a head, relu(scores)
    head + head_bias. All float tensors are float32 and contiguous.

    Args:
        features: [n, f].
        weight: [f, h]; without a head, h is the number of choices.
        bias: [h], including whatever is the same for every row.
        last_weight: [1 + choices, h].
        spent_weight: [h].
        head: [h, choices], or None.
        head_bias: [choices], or None.
        last: [n] int64, 0 ... choices.
        macs: [n] int64.
        action: [n] int64, for the result.

    Returns:
        `action`.
    """
    n, size_in = features.shape
    if n == 0:
        return action
    hidden = weight.shape[1]
    choices = hidden if head is None else head.shape[1]
    block_h = max(16, triton.next_power_of_2(hidden))
    block_c = block_h if head is None else max(16, triton.next_power_of_2(choices))
    # A program reads all weights. With few rows, it takes few of them, so that enough programs share the work.
    block_m = min(16, max(4, triton.next_power_of_2(n // 64)))
    _decide_kernel[(triton.cdiv(n, block_m),)](
        features, weight, bias, last_weight, spent_weight, head, head_bias, last, macs, action,
        n, size_in, hidden, choices, float(dense_macs),
        LINEAR=head is None, BLOCK_M=block_m, BLOCK_K=64, BLOCK_H=block_h, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return action


@triton.jit
def _record_kernel(
    action_ptr, costs_ptr, column_ptr, steps_ptr, last_ptr, macs_ptr, n, stride, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < n
    action = tl.load(action_ptr + row, mask=mask, other=0)
    tl.store(column_ptr + row.to(tl.int64) * stride, action, mask=mask)
    tl.store(steps_ptr + row, tl.load(steps_ptr + row, mask=mask, other=0) + 1, mask=mask)
    tl.store(last_ptr + row, action + 1, mask=mask)
    tl.store(
        macs_ptr + row, tl.load(macs_ptr + row, mask=mask, other=0) + tl.load(costs_ptr + action, mask=mask), mask=mask
    )


def record(action: Tensor, costs: Tensor, column: Tensor, steps: Tensor, last: Tensor, macs: Tensor) -> None:
    """Write a decision of all rows into a walk's records, in place (see `dynrl.ops.record.record_ref`).

    Args:
        action: [n] int64, contiguous.
        costs: [choices] int64, contiguous.
        column: [n] int64, of any stride.
        steps, last, macs: [n] int64, contiguous.
    """
    n = len(action)
    _record_kernel[(triton.cdiv(n, 256),)](action, costs, column, steps, last, macs, n, column.stride(0), BLOCK=256)
