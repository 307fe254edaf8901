"""These kernels multiply chosen rows with the matrix of their group, and compute these matrices' gradients."""

# Triton gives kernel parameters their types when a kernel is called.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynrl.ops.kernels.partition import group_of_tile, tile_bound

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def device_time(call: Callable[[], None], quantiles: tuple[float, ...]) -> Any:
    """Return the device's time alone for the autotuner, since the host's time would hide that of small work."""
    return triton.testing.do_bench_cudagraph(call, rep=10, quantiles=quantiles)


def dot_precision(x: Tensor) -> str:
    """Return `input_precision` for tl.dot: torch's own switch says whether float32 may be rounded to TF32."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def size_class(size: int) -> int:
    """Return a number that grows by one with each factor of four; tile sizes are chosen again when it changes."""
    return size.bit_length() // 2


def tile_configs(tiles: list[tuple[int, int, int, int, int]]) -> list[triton.Config]:
    """Return the autotuner's configurations from (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages).

    Interpreted kernels cannot be timed. For them, there is one configuration, so small that test shapes need several
    tiles.
    """
    if INTERPRETED:
        tiles = [(16, 16, 16, 4, 1)]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in tiles
    ]


def fitting_configs(
    configs: list[triton.Config], x: Tensor, precision: str, size_n: int, size_k: int
) -> list[triton.Config]:
    """Return the configurations that are not mostly padding, fit in shared memory and keep all sums in registers."""

    def fits(config: triton.Config) -> bool:
        m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        if n > max(32, triton.next_power_of_2(size_n)) or k > max(32, triton.next_power_of_2(size_k)):
            return False
        if x.dtype != torch.float32:
            return True
        # Larger tiles spill, even more without tensor cores, where a thread holds the whole BLOCK_K of its operands.
        return k <= 32 and m * n <= (8192 if precision == "tf32" else 512 * config.num_warps)

    return [config for config in configs if fits(config)] or configs[:1]


def _prune(configs: list[triton.Config], args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    return fitting_configs(configs, args["x_ptr"], kwargs["PRECISION"], args["size_out"], args["size_in"])


def _prune_grad(configs: list[triton.Config], args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    return fitting_configs(configs, args["x_ptr"], kwargs["PRECISION"], args["size_in"], 4 ** args["size_class"])


# The first tile fits everything; it is chosen where no other tile fits. Narrow tiles are for few rows a group.
LINEAR_TILES = [
    (16, 32, 32, 4, 4),
    (16, 64, 128, 4, 3),
    (16, 128, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (64, 32, 32, 4, 3),
    (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 128, 32, 4, 4),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 3),
]
GRAD_WEIGHT_TILES = [
    (32, 32, 32, 4, 4),
    (64, 64, 32, 8, 3),
    (64, 64, 64, 4, 4),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 3),
]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Add a @ b to acc, which is float32."""
    if INTERPRETED:
        # The interpreter would multiply the bit patterns of bfloat16 (triton-lang/triton#11584).
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _product(
    x_ptr, w_ptr, row, row_mask, n, width, out_width, stride_x, stride_wm, stride_wk,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return x[row, :width] times w[n, :width] transposed, [BLOCK_M, BLOCK_N] float32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_rows = x_ptr + row.to(tl.int64) * stride_x  # [BM]
    w_rows = w_ptr + n.to(tl.int64) * stride_wm  # [BN]
    for first in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows[:, None] + k[None, :], mask=row_mask[:, None] & (k < width)[None, :], other=0.0)  # [BM, BK]
        w = tl.load(
            w_rows[None, :] + k.to(tl.int64)[:, None] * stride_wk,
            mask=(n < out_width)[None, :] & (k < width)[:, None],
            other=0.0,
        )  # [BK, BN]
        acc = dot(x, w, acc, PRECISION)
    return acc


@triton.autotune(
    tile_configs(LINEAR_TILES),
    key=["size_in", "size_out", "size_class", "stride_wk", "NUM_GROUPS", "PRECISION"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=device_time,
)
@triton.jit
def _linear_rows_kernel(
    x_ptr, w_ptr, out_ptr, offsets_ptr, starts_ptr, in_rows_ptr, out_rows_ptr, bias_ptr, bias_starts_ptr,
    in_widths_ptr, out_widths_ptr, scale_ptr,
    size_in, size_out, stride_x, stride_wm, stride_wk, stride_out,
    size_class,  # read by the autotuner only
    NUM_GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(size_out, BLOCK_N)
    tile = tl.program_id(0) // blocks_n
    group, number, begin, end = group_of_tile(offsets_ptr, tile, 1, NUM_GROUPS, BLOCK_GROUPS, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    width = size_in
    out_width = size_out
    if in_widths_ptr is not None:
        width = tl.load(in_widths_ptr + group)
    if out_widths_ptr is not None:
        out_width = tl.load(out_widths_ptr + group)
    if (number * BLOCK_M >= end - begin) | (tl.program_id(0) % blocks_n * BLOCK_N >= out_width):
        return
    item = begin + number * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = item < end
    in_row = item
    out_row = item
    if in_rows_ptr is not None:
        in_row = tl.load(in_rows_ptr + item, mask=row_mask, other=0)
    if out_rows_ptr is not None:
        out_row = tl.load(out_rows_ptr + item, mask=row_mask, other=0)

    # Numbers from memory have no known alignment, so elements would be read one by one. Where they are multiples
    # of 16, writing them as such lets the compiler read 16 bytes at once. The other branch prefetches nothing (one
    # stage), as its buffers would be kept in shared memory beside those of the first, and takes half as many elements
    # of a row at a time, as elements on their own need more registers.
    start = tl.load(starts_ptr + group)
    aligned = (start % 16 == 0) & (width % 16 == 0) & (out_width % 16 == 0)
    if aligned:
        acc = _product(
            x_ptr, w_ptr + start // 16 * 16, in_row, row_mask, n, width // 16 * 16, out_width // 16 * 16,
            stride_x, stride_wm, stride_wk, None, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        acc = _product(
            x_ptr, w_ptr + start, in_row, row_mask, n, width, out_width,
            stride_x, stride_wm, stride_wk, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K // 2,
        )  # fmt: skip

    if bias_ptr is not None:
        bias_start = tl.load(bias_starts_ptr + group)
        acc += tl.load(bias_ptr + bias_start + n, mask=n < out_width, other=0.0).to(tl.float32)[None, :]
    if RELU:
        # NaN is propagated, as in torch: a NaN that turns into 0 would hide a fault.
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + out_row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + out_row.to(tl.int64)[:, None] * stride_out + n[None, :]  # [BM, BN]
    y = acc.to(out_ptr.dtype.element_ty)
    if aligned:
        tl.store(out, y, mask=row_mask[:, None] & (n < out_width // 16 * 16)[None, :])
    else:
        tl.store(out, y, mask=row_mask[:, None] & (n < out_width)[None, :])


def linear_rows(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    offsets: Tensor,
    starts: Tensor,
    *,
    in_rows: Tensor | None = None,
    out_rows: Tensor | None = None,
    bias: Tensor | None = None,
    bias_starts: Tensor | None = None,
    in_widths: Tensor | None = None,
    out_widths: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Multiply each item's row with the matrix of its group, then add the bias, relu and scale, in this order.

    Item j of group g (offsets[g] <= j < offsets[g + 1]) reads row in_rows[j] of `x` and writes row out_rows[j] of
    `out`; no other row and nothing beyond a group's widths is touched.

    Args:
        x: [N, k] float32, float16 or bfloat16; last stride 1, any row stride.
        weight: x's dtype, at least 2-D. Group g's matrix [m_g, k_g] starts starts[g] elements behind the first of
            `weight`; its two strides are the last two of `weight` (for the gradient of x, pass a transposed view).
        out: [M, m], last stride 1, any row stride; must not overlap with `x`.
        offsets: [G + 1] int32. Items before offsets[0] belong to no group and are not done.
        starts: [G] int64; zeros where all groups share one matrix.
        in_rows: [capacity] int32 or int64, or None: row j.
        out_rows: [capacity] int32 or int64, distinct among the items, or None: row j.
        bias: flat, or None; group g's m_g elements begin at bias_starts[g].
        bias_starts: [G] int64; needed with `bias`.
        in_widths: [G] int32, k_g, or None: k.
        out_widths: [G] int32, m_g, or None: m.
        scale: [M] any float dtype, one factor for each row of `out`, or None.
        relu: whether to clip at zero, before scaling.

    Returns:
        `out`.
    """
    assert x.stride(1) == 1 and out.stride(1) == 1 and x.dtype == weight.dtype
    assert (bias is None) == (bias_starts is None)
    rows = next((r for r in (in_rows, out_rows) if r is not None), x)
    capacity, num_groups = len(rows), len(offsets) - 1
    size_in, size_out = x.shape[1], out.shape[1]
    if capacity == 0 or size_out == 0:
        return out

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (tile_bound(capacity, num_groups, meta["BLOCK_M"]) * triton.cdiv(size_out, meta["BLOCK_N"]),)

    _linear_rows_kernel[grid](
        x, weight, out, offsets, starts, in_rows, out_rows, bias, bias_starts, in_widths, out_widths, scale,
        size_in, size_out, x.stride(0), weight.stride(-2), weight.stride(-1), out.stride(0), size_class(capacity),
        NUM_GROUPS=num_groups, BLOCK_GROUPS=triton.next_power_of_2(num_groups), RELU=relu, PRECISION=dot_precision(x),
    )  # fmt: skip
    return out


@triton.autotune(
    tile_configs(GRAD_WEIGHT_TILES),
    key=["size_in", "size_out", "size_class", "NUM_GROUPS", "PRECISION"],
    prune_configs_by={"early_config_prune": _prune_grad},
    do_bench=device_time,
)
@triton.jit
def _grad_weight_rows_kernel(
    x_ptr, dy_ptr, dw_ptr, offsets_ptr, starts_ptr, x_rows_ptr, dy_rows_ptr, in_widths_ptr, out_widths_ptr, scale_ptr,
    size_in, size_out, stride_x, stride_dy, stride_wm, stride_wk,
    size_class,  # read by the autotuner only
    NUM_GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # One program owns a tile of one matrix and loops over all its items: without atomics, the sum is always the same.
    # M runs over outputs, N over inputs, K over items.
    blocks_n = tl.cdiv(size_in, BLOCK_N)
    tile = tl.program_id(0) // NUM_GROUPS
    group = tl.program_id(0) % NUM_GROUPS
    first_m = tile // blocks_n * BLOCK_M
    first_n = tile % blocks_n * BLOCK_N
    width = size_in
    out_width = size_out
    if in_widths_ptr is not None:
        width = tl.load(in_widths_ptr + group)
    if out_widths_ptr is not None:
        out_width = tl.load(out_widths_ptr + group)
    if (first_m >= out_width) | (first_n >= width):
        return
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    begin = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    # A narrower group's matrix is read up to the ends of full rows, which exist, and is cut when it is written: NaN in
    # a channel of x or dy spoils only that channel of the result.
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(begin, end, BLOCK_K):
        item = first + tl.arange(0, BLOCK_K)
        row_mask = item < end
        x_row = item
        dy_row = item
        if x_rows_ptr is not None:
            x_row = tl.load(x_rows_ptr + item, mask=row_mask, other=0)
        if dy_rows_ptr is not None:
            dy_row = tl.load(dy_rows_ptr + item, mask=row_mask, other=0)
        dy = tl.load(
            dy_ptr + dy_row.to(tl.int64)[None, :] * stride_dy + m[:, None],
            mask=row_mask[None, :] & (m < size_out)[:, None],
            other=0.0,
        )  # [BM, BK]
        x = tl.load(
            x_ptr + x_row.to(tl.int64)[:, None] * stride_x + n[None, :],
            mask=row_mask[:, None] & (n < size_in)[None, :],
            other=0.0,
        )  # [BK, BN]
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + dy_row, mask=row_mask, other=0.0).to(tl.float32)
            dy = (dy.to(tl.float32) * scale[None, :]).to(dy_ptr.dtype.element_ty)
        acc = dot(dy, x, acc, PRECISION)
    matrix = dw_ptr + tl.load(starts_ptr + group)
    dw = matrix + m.to(tl.int64)[:, None] * stride_wm + n.to(tl.int64)[None, :] * stride_wk
    mask = (m < out_width)[:, None] & (n < width)[None, :]
    tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=mask)


def grad_weight_rows(
    x: Tensor,
    dy: Tensor,
    dw: Tensor,
    offsets: Tensor,
    starts: Tensor,
    *,
    x_rows: Tensor | None = None,
    dy_rows: Tensor | None = None,
    in_widths: Tensor | None = None,
    out_widths: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of `linear_rows` by its matrices: for each group, the sum over items of scale * dy^T x.

    Every element of each group's matrix within its widths is written, zeros for a group without items; elements
    between the matrices are unchanged. The result is the same each time.

    Args:
        x: [N, k] float32, float16 or bfloat16; last stride 1, any row stride.
        dy: [M, m], x's dtype; last stride 1, any row stride.
        dw: float32, float16 or bfloat16. Group g's matrix [m_g, k_g] starts at element starts[g], its strides are the
            last two of `dw`. The matrices must not overlap: groups that share one weight need one matrix each here,
            for the caller to add.
        offsets: [G + 1] int32, as in `linear_rows`.
        starts: [G] int64.
        x_rows: [capacity] int32 or int64, or None: row j.
        dy_rows: [capacity] int32 or int64, or None: row j.
        in_widths: [G] int32, k_g, or None: k.
        out_widths: [G] int32, m_g, or None: m.
        scale: [M] any float dtype, one factor for each row of `dy`, or None. The product is rounded to dy's dtype.

    Returns:
        `dw`.
    """
    assert x.stride(1) == 1 and dy.stride(1) == 1 and x.dtype == dy.dtype
    num_groups, size_in, size_out = len(offsets) - 1, x.shape[1], dy.shape[1]
    rows = next((r for r in (x_rows, dy_rows) if r is not None), x)
    if num_groups == 0 or size_in == 0 or size_out == 0:
        return dw

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(size_out, meta["BLOCK_M"]) * triton.cdiv(size_in, meta["BLOCK_N"]) * num_groups,)

    _grad_weight_rows_kernel[grid](
        x, dy, dw, offsets, starts, x_rows, dy_rows, in_widths, out_widths, scale,
        size_in, size_out, x.stride(0), dy.stride(0), dw.stride(-2), dw.stride(-1), size_class(len(rows)),
        NUM_GROUPS=num_groups, PRECISION=dot_precision(x),
    )  # fmt: skip
    return dw
