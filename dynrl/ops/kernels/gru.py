"""These kernels run torch.nn.GRUCell on chosen rows, and write rows back to where they came from."""

# Triton gives kernel parameters their types when a kernel is called.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynrl.ops.kernels.linear import device_time, dot, dot_precision, fitting_configs, size_class, tile_configs

# Tiles are small, as each program holds four tiles of sums. The first one fits everything.
GRU_TILES = [
    (16, 16, 32, 4, 4),
    (16, 32, 64, 4, 4),
    (32, 32, 32, 4, 3),
    (32, 32, 64, 4, 4),
    (64, 32, 64, 4, 4),
    (64, 64, 64, 8, 3),
]


def _prune(configs: list[triton.Config], args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    size_k = max(args["size_in"], args["width"])
    fitting = fitting_configs(configs, args["x_ptr"], kwargs["PRECISION"], args["width"], size_k)
    if args["x_ptr"].dtype == torch.float32 and kwargs["PRECISION"] == "ieee":
        # Each step multiplies with three matrices, so the registers are full at smaller tiles than with one matrix.
        return [c for c in fitting if c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] <= 1024]
    return fitting


@triton.jit
def _gates(
    x_ptr, w_ptr, row, row_mask, n, size, width, stride_w, size_hidden, stride_x, acc_r, acc_z, acc_n,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add x[row, :size] times the first `width` columns of each of the three matrices in w to the sums [BM, BN]."""
    x_rows = x_ptr + row.to(tl.int64) * stride_x
    for first in range(0, size, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows[:, None] + k[None, :], mask=row_mask[:, None] & (k < size)[None, :], other=0.0)  # [BM, BK]
        w = w_ptr + n[None, :] * stride_w + k[:, None]
        mask = (n < width)[None, :] & (k < size)[:, None]
        w_r = tl.load(w, mask=mask, other=0.0)  # [BK, BN]
        w_z = tl.load(w + size_hidden * stride_w, mask=mask, other=0.0)
        w_n = tl.load(w + 2 * size_hidden * stride_w, mask=mask, other=0.0)
        acc_r = dot(x, w_r, acc_r, PRECISION)
        acc_z = dot(x, w_z, acc_z, PRECISION)
        acc_n = dot(x, w_n, acc_n, PRECISION)
    return acc_r, acc_z, acc_n


@triton.autotune(
    tile_configs(GRU_TILES),
    key=["size_in", "width", "size_class", "PRECISION"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=device_time,
)
@triton.jit
def _gru_rows_kernel(
    x_ptr, h_ptr, w_ih_ptr, w_hh_ptr, b_ih_ptr, b_hh_ptr, out_ptr, offsets_ptr, x_rows_ptr, h_rows_ptr, out_rows_ptr,
    saved_ptr,
    size_in, size_hidden, width, stride_x, stride_h, stride_out,
    size_class,  # read by the autotuner only
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(width, BLOCK_N)
    item = tl.load(offsets_ptr) + tl.program_id(0) // blocks_n * BLOCK_M
    end = tl.load(offsets_ptr + 1)
    if item >= end:
        return
    item += tl.arange(0, BLOCK_M)
    row_mask = item < end
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < width
    x_row = item
    h_row = item
    out_row = item
    if x_rows_ptr is not None:
        x_row = tl.load(x_rows_ptr + item, mask=row_mask, other=0)
    if h_rows_ptr is not None:
        h_row = tl.load(h_rows_ptr + item, mask=row_mask, other=0)
    if out_rows_ptr is not None:
        out_row = tl.load(out_rows_ptr + item, mask=row_mask, other=0)

    # The two halves of the third gate stay apart, since r multiplies only the half from h.
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sum_r, sum_z, from_x = _gates(
        x_ptr, w_ih_ptr, x_row, row_mask, n, size_in, width, size_in, size_hidden, stride_x, zeros, zeros, zeros,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    sum_r, sum_z, from_h = _gates(
        h_ptr, w_hh_ptr, h_row, row_mask, n, width, width, size_hidden, size_hidden, stride_h, sum_r, sum_z, zeros,
        PRECISION, BLOCK_K,
    )  # fmt: skip

    b_ih = b_ih_ptr + n
    b_hh = b_hh_ptr + n
    bias_r = tl.load(b_ih, mask=n_mask, other=0.0).to(tl.float32) + tl.load(b_hh, mask=n_mask, other=0.0).to(tl.float32)
    bias_z = tl.load(b_ih + size_hidden, mask=n_mask, other=0.0).to(tl.float32)
    bias_z += tl.load(b_hh + size_hidden, mask=n_mask, other=0.0).to(tl.float32)
    r = tl.sigmoid(sum_r + bias_r[None, :])
    z = tl.sigmoid(sum_z + bias_z[None, :])
    from_x += tl.load(b_ih + 2 * size_hidden, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    from_h += tl.load(b_hh + 2 * size_hidden, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    # This is tanh, written so that it also runs interpreted.
    new = 2 * tl.sigmoid(2 * (from_x + r * from_h)) - 1

    mask = row_mask[:, None] & n_mask[None, :]
    h = tl.load(h_ptr + h_row.to(tl.int64)[:, None] * stride_h + n[None, :], mask=mask, other=0.0).to(tl.float32)
    y = new + z * (h - new)
    tl.store(
        out_ptr + out_row.to(tl.int64)[:, None] * stride_out + n[None, :], y.to(out_ptr.dtype.element_ty), mask=mask
    )
    if saved_ptr is not None:
        saved = saved_ptr + item.to(tl.int64)[:, None] * (4 * size_hidden) + n[None, :]
        tl.store(saved, r.to(saved_ptr.dtype.element_ty), mask=mask)
        tl.store(saved + size_hidden, z.to(saved_ptr.dtype.element_ty), mask=mask)
        tl.store(saved + 2 * size_hidden, new.to(saved_ptr.dtype.element_ty), mask=mask)
        tl.store(saved + 3 * size_hidden, from_h.to(saved_ptr.dtype.element_ty), mask=mask)


def gru_rows(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    out: Tensor,
    offsets: Tensor,
    *,
    x_rows: Tensor | None = None,
    h_rows: Tensor | None = None,
    out_rows: Tensor | None = None,
    saved: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Run one step of torch.nn.GRUCell (gates in the order r, z, n) for items offsets[0] to offsets[1] - 1.

    Item j reads row x_rows[j] of `x` and h_rows[j] of `h` and writes row out_rows[j] of `out`; no other row is touched.
    With `width`, only the first units are read and written, as if the cell had no others.

    Args:
        x: [N, I] float32, float16 or bfloat16; last stride 1, any row stride.
        h: [M, H], x's dtype; last stride 1, any row stride.
        w_ih: [3H, I] contiguous, x's dtype.
        w_hh: [3H, H] contiguous, x's dtype.
        b_ih: [3H] contiguous, any float dtype.
        b_hh: [3H] contiguous, any float dtype.
        out: [L, H], last stride 1, any row stride. Must not overlap with `h`, which programs that compute other columns
            of a row still read: write into a buffer and move its rows with `scatter_rows`.
        offsets: [2] int32.
        x_rows: [capacity] int32 or int64, or None: row j.
        h_rows: [capacity] int32 or int64, or None: row j.
        out_rows: [capacity] int32 or int64, distinct among the items, or None: row j.
        saved: [capacity, 4, H] contiguous, any float dtype, or None; takes r, z, n and (W_hn h + b_hn) of item j in
            row j for a backward pass.
        width: 1 ... H, or None: H.

    Returns:
        `out`.
    """
    size_in, size_hidden = w_ih.shape[1], w_hh.shape[1]
    assert x.dtype == h.dtype == w_ih.dtype == w_hh.dtype and x.shape[1] == size_in and h.shape[1] == size_hidden
    assert len(w_ih) == len(w_hh) == len(b_ih) == len(b_hh) == 3 * size_hidden and out.shape[1] == size_hidden
    assert all(t.is_contiguous() for t in (w_ih, w_hh, b_ih, b_hh)) and (saved is None or saved.is_contiguous())
    assert x.stride(1) == h.stride(1) == out.stride(1) == 1
    assert 3 * size_hidden * max(size_in, size_hidden) < 2**31
    width = width or size_hidden
    capacity = len(next((r for r in (x_rows, h_rows, out_rows) if r is not None), x))
    if capacity == 0:
        return out

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(capacity, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]),)

    _gru_rows_kernel[grid](
        x, h, w_ih, w_hh, b_ih, b_hh, out, offsets, x_rows, h_rows, out_rows, saved,
        size_in, size_hidden, width, x.stride(0), h.stride(0), out.stride(0), size_class(capacity),
        PRECISION=dot_precision(x),
    )  # fmt: skip
    return out


@triton.jit
def _scatter_rows_kernel(
    src_ptr, dst_ptr, rows_ptr, offsets_ptr, size, stride_src, stride_dst, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    item = tl.load(offsets_ptr) + tl.program_id(0) * BLOCK_M
    end = tl.load(offsets_ptr + 1)
    if item >= end:
        return
    item += tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(rows_ptr + item, mask=item < end, other=0)
    mask = (item < end)[:, None] & (n < size)[None, :]
    values = tl.load(src_ptr + item.to(tl.int64)[:, None] * stride_src + n[None, :], mask=mask)  # [BM, BN]
    tl.store(dst_ptr + row.to(tl.int64)[:, None] * stride_dst + n[None, :], values, mask=mask)


def scatter_rows(src: Tensor, dst: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Set dst[rows[j]] = src[j] for offsets[0] <= j < offsets[1]. Other rows of `dst` are unchanged.

    Args:
        src: [capacity, n], last stride 1, any row stride.
        dst: [M, n], src's dtype, last stride 1, any row stride; must not overlap with `src`.
        rows: [capacity] int32 or int64, distinct among the items.
        offsets: [2] int32.

    Returns:
        `dst`.
    """
    size = src.shape[1]
    assert src.dtype == dst.dtype and dst.shape[1] == size and src.stride(1) == dst.stride(1) == 1
    if len(rows) and size:
        block_n = min(128, triton.next_power_of_2(size))
        block_m = 2048 // block_n
        grid = (triton.cdiv(len(rows), block_m), triton.cdiv(size, block_n))
        _scatter_rows_kernel[grid](
            src, dst, rows, offsets, size, src.stride(0), dst.stride(0), BLOCK_M=block_m, BLOCK_N=block_n
        )
    return dst
