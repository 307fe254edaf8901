"""One implicit matrix product convolves chosen images, with everything that follows it in a residual block."""

# Triton gives kernel parameters their types when a kernel is called.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynrl.ops.kernels.conv_tiles import conv_tiles, map_parts
from dynrl.ops.kernels.decide import sum_maps
from dynrl.ops.kernels.linear import INTERPRETED, device_time, dot, fitting_configs, size_class, tile_configs
from dynrl.ops.kernels.partition import group_of_tile, tile_bound

# The first tile fits everything; it is chosen where no other tile fits.
CONV_TILES = [
    (64, 32, 32, 4, 4),
    (32, 32, 32, 4, 4),
    (32, 64, 64, 4, 4),
    (64, 64, 32, 4, 4),
    (64, 64, 32, 8, 3),
    (64, 64, 64, 4, 4),
    (128, 32, 32, 4, 4),
    (128, 64, 64, 4, 3),
    (64, 128, 32, 8, 4),
    (64, 128, 64, 4, 4),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 3),
]


def _precision(x: Tensor) -> str:
    """Return `input_precision` for tl.dot: torch's switch for convolutions says whether TF32 may be used."""
    allowed = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if x.dtype == torch.float32 and allowed == "tf32" else "ieee"


@cache
def _has_tensor_copies(device: torch.device) -> bool:
    return bool(INTERPRETED) or torch.cuda.get_device_capability(device) >= (9, 0)


def _prune(configs: list[triton.Config], args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    return fitting_configs(configs, args["x_ptr"], kwargs["PRECISION"], args["size_k"], args["size_c"])


@triton.jit
def _convolve(
    x_ptr, w_ptr, image, top, left, m_mask, n, width, out_width, H, W,
    stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
    R: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the sum over taps and channels < width, [BLOCK_M, BLOCK_N] float32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks = tl.cdiv(width, BLOCK_K)
    # There is one loop over (tap, block of channels), not two nested ones: only an innermost loop has its loads
    # prefetched, and with few channels, a loop over channels would have a single step.
    for step in tl.range(0, R * S * blocks, num_stages=STAGES):
        tap = step // blocks
        c = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        h = top + tap // S
        w = left + tap % S
        inside = m_mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)  # [BM]
        x = tl.load(
            x_ptr + (image + h * stride_xh + w * stride_xw)[:, None] + c[None, :],
            mask=inside[:, None] & (c < width)[None, :],
            other=0.0,
        )  # [BM, BK]
        weight = tl.load(
            w_ptr + (n * stride_wk + tap // S * stride_wr + tap % S * stride_ws)[None, :] + c[:, None] * stride_wc,
            mask=(n < out_width)[None, :] & (c < width)[:, None],
            other=0.0,
        )  # [BK, BN]
        acc = dot(x, weight, acc, PRECISION)
    return acc


@triton.jit
def _finish(
    acc, out_ptr, out_offset, scale_ptr, shift_ptr, factor_ptr, residual_ptr, residual_offset, group, out_row, m_mask,
    n, out_width, size_k, RELU: tl.constexpr,
):  # fmt: skip
    """Apply scale, shift, factor, residual and relu, and write the result."""
    n_mask = n < out_width
    mask = m_mask[:, None] & n_mask[None, :]
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + group * size_k + n, mask=n_mask, other=0.0)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + group * size_k + n, mask=n_mask, other=0.0)[None, :]
    if factor_ptr is not None:
        acc *= tl.load(factor_ptr + out_row, mask=m_mask, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + residual_offset[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELU:
        # NaN is propagated, as in torch: a NaN that turns into 0 would hide a fault.
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + out_offset[:, None] + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.autotune(
    tile_configs(CONV_TILES),
    key=["size_c", "size_k", "size_class", "R", "S", "STRIDE", "NUM_GROUPS", "PRECISION"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=device_time,
)
@triton.jit
def _conv_rows_kernel(
    x_ptr, w_ptr, out_ptr, offsets_ptr, in_rows_ptr, out_rows_ptr, scale_ptr, shift_ptr,
    in_widths_ptr, out_widths_ptr, factor_ptr, residual_ptr,
    size_c, size_k, H, W, P, Q,
    stride_xn, stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
    stride_on, stride_oh, stride_ow, stride_rn, stride_rh, stride_rw,
    size_class,  # read by the autotuner only
    NUM_GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # M runs over (item, output pixel), N over output channels, K over (tap, input channel). Neighbouring programs share
    # their pixels, so the second program finds them in the cache.
    blocks_n = tl.cdiv(size_k, BLOCK_N)
    tile = tl.program_id(0) // blocks_n
    first_n = tl.program_id(0) % blocks_n * BLOCK_N
    group, number, begin, end = group_of_tile(offsets_ptr, tile, P * Q, NUM_GROUPS, BLOCK_GROUPS, BLOCK_M)
    width = size_c
    out_width = size_k
    if in_widths_ptr is not None:
        width = tl.load(in_widths_ptr + group)
    if out_widths_ptr is not None:
        out_width = tl.load(out_widths_ptr + group)
    if (number * BLOCK_M >= (end - begin) * (P * Q)) | (first_n >= out_width):
        return
    n = first_n + tl.arange(0, BLOCK_N)
    m = number * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < (end - begin) * (P * Q)
    item = begin + m // (P * Q)
    p = m % (P * Q) // Q
    q = m % Q
    in_row = item
    out_row = item
    if in_rows_ptr is not None:
        in_row = tl.load(in_rows_ptr + item, mask=m_mask, other=0)
    if out_rows_ptr is not None:
        out_row = tl.load(out_rows_ptr + item, mask=m_mask, other=0)
    image = in_row.to(tl.int64) * stride_xn  # [BM]
    out_offset = out_row.to(tl.int64) * stride_on + p * stride_oh + q * stride_ow
    residual_offset = out_row.to(tl.int64) * stride_rn + p * stride_rh + q * stride_rw
    top = p * STRIDE - PADDING
    left = q * STRIDE - PADDING

    # Widths from memory have no known alignment, so elements would be read and written one by one. Where they are
    # multiples of 16, writing them as such lets the compiler move 16 bytes at once. The other branch prefetches nothing
    # (one stage), as its buffers would be kept in shared memory beside those of the first, and takes half as many
    # channels at a time, as elements on their own need more registers.
    if in_widths_ptr is None and out_widths_ptr is None:
        acc = _convolve(
            x_ptr, w_ptr, image, top, left, m_mask, n, size_c, size_k, H, W,
            stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
            R, S, None, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _finish(
            acc, out_ptr, out_offset, scale_ptr, shift_ptr, factor_ptr, residual_ptr, residual_offset, group, out_row,
            m_mask, n, size_k, size_k, RELU,
        )  # fmt: skip
    elif (width % 16 == 0) & (out_width % 16 == 0):
        acc = _convolve(
            x_ptr, w_ptr, image, top, left, m_mask, n, width // 16 * 16, out_width // 16 * 16, H, W,
            stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
            R, S, None, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _finish(
            acc, out_ptr, out_offset, scale_ptr, shift_ptr, factor_ptr, residual_ptr, residual_offset, group, out_row,
            m_mask, n, out_width // 16 * 16, size_k, RELU,
        )  # fmt: skip
    else:
        acc = _convolve(
            x_ptr, w_ptr, image, top, left, m_mask, n, width, out_width, H, W,
            stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
            R, S, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K // 2,
        )  # fmt: skip
        _finish(
            acc, out_ptr, out_offset, scale_ptr, shift_ptr, factor_ptr, residual_ptr, residual_offset, group, out_row,
            m_mask, n, out_width, size_k, RELU,
        )  # fmt: skip


_tuned: set[tuple[Any, ...]] = set()


def conv_rows(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    offsets: Tensor,
    *,
    in_rows: Tensor | None = None,
    out_rows: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    in_widths: Tensor | None = None,
    out_widths: Tensor | None = None,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    stride: int = 1,
    padding: int = 0,
    granule: int | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Convolve chosen images, then scale, shift, multiply by a factor, add the residual and relu, all in float32.

    Item j of group g (offsets[g] <= j < offsets[g + 1]) reads image in_rows[j] of `x` and writes image out_rows[j]
    of `out`; no other image and nothing beyond a group's widths is touched. Zero padding.

    Args:
        x: [N, C, H, W] float32, float16 or bfloat16, channels_last; a slice of a wider tensor will do.
        weight: [K, C, R, S], x's dtype, any strides (channels_last is read fastest).
        out: [M, K, P, Q] channels_last, P and Q as torch's conv2d has them; must not overlap with `x`.
        offsets: [G + 1] int32. Items before offsets[0] belong to no group and are not done.
        in_rows: [capacity] int32 or int64, or None: image j.
        out_rows: [capacity] int32 or int64, distinct among the items, or None: image j.
        scale: [G, K] float32, or None: 1.
        shift: [G, K] any float dtype, or None: 0.
        in_widths: [G] int32, how many channels of `x` a group has, or None: C.
        out_widths: [G] int32, how many channels of `out` a group has, or None: K.
        factor: [M] any float dtype, one factor for each image of `out`, or None.
        residual: [M, K, P, Q] channels_last, or None. May be `out` itself, but must not overlap with it otherwise.
        relu: whether to clip at zero.
        stride: the same for both axes.
        padding: the same for both axes.
        granule: a common divisor of `in_widths`, if the host knows one. Then what lies beyond a group's `out_widths`
            may be overwritten.
        sums: [M, map_parts(P, Q), K] float32, contiguous, or None. For each image that is written, the sums of each
            channel over parts of the image are written here; other images' stay. Groups have all K channels then.

    Returns:
        `out`.
    """
    num_groups = len(offsets) - 1
    _, size_c, height, width = x.shape
    size_k, _, taps_h, taps_w = weight.shape
    _, _, out_height, out_width = out.shape
    assert x.dtype == weight.dtype and weight.shape[1] == size_c and out.shape[1] == size_k
    assert out_height == (height + 2 * padding - taps_h) // stride + 1
    assert out_width == (width + 2 * padding - taps_w) // stride + 1
    for images in (x, out, residual):
        assert images is None or images.stride(1) == 1 or images.shape[1] == 1, "channels_last"
        # Only image numbers are 64 bits wide in the kernel: offsets inside one image must fit in 32.
        assert images is None or images.stride(2) * images.shape[2] < 2**31
    assert residual is None or residual.shape == out.shape
    assert all(affine is None or affine.is_contiguous() for affine in (scale, shift))
    if sums is not None:
        assert out_widths is None and sums.dtype == torch.float32 and sums.is_contiguous()
        assert sums.shape == (len(out), map_parts(out_height, out_width), size_k)
    rows = next((r for r in (in_rows, out_rows) if r is not None), x)
    pixels = len(rows) * out_height * out_width
    assert weight.numel() < 2**31 and pixels < 2**31
    if pixels == 0 or size_k == 0:
        return out
    if residual is not None and residual.data_ptr() == out.data_ptr() and not INTERPRETED:
        # The autotuner's runs would add to the sum again and again, so the first call gives it a copy.
        sizes = (x.shape[1:], weight.shape, stride, size_class(pixels), num_groups, granule)
        given = (in_rows, out_rows, scale, shift, in_widths, out_widths, factor)
        dtypes = (x.dtype, *(None if tensor is None else tensor.dtype for tensor in given))
        key = (*sizes, dtypes, _precision(x), x.device)
        if key not in _tuned:
            _tuned.add(key)
            copy = out.clone(memory_format=torch.channels_last)
            conv_rows(
                x, weight, copy, offsets, in_rows=in_rows, out_rows=out_rows, scale=scale, shift=shift,
                in_widths=in_widths, out_widths=out_widths, factor=factor, residual=copy, relu=relu, stride=stride,
                padding=padding, granule=granule,
            )  # fmt: skip

    if granule is None and in_widths is None and out_widths is None:
        granule = size_c
    if stride == 1 and granule is not None and _has_tensor_copies(x.device):
        done = conv_tiles(
            x, weight, out, offsets, granule=granule, precision=_precision(x), in_rows=in_rows, out_rows=out_rows,
            scale=scale, shift=shift, in_widths=in_widths, out_widths=out_widths, factor=factor, residual=residual,
            relu=relu, padding=padding, sums=sums,
        )  # fmt: skip
        if done:
            return out

    def grid(meta: dict[str, int]) -> tuple[int]:
        tiles = tile_bound(pixels, num_groups, meta["BLOCK_M"])
        return (tiles * triton.cdiv(size_k, meta["BLOCK_N"]),)

    residual_strides = (0, 0, 0) if residual is None else (residual.stride(0), residual.stride(2), residual.stride(3))
    _conv_rows_kernel[grid](
        x, weight, out, offsets, in_rows, out_rows, scale, shift, in_widths, out_widths, factor, residual,
        size_c, size_k, height, width, out_height, out_width,
        x.stride(0), x.stride(2), x.stride(3), *weight.stride(), out.stride(0), out.stride(2), out.stride(3),
        *residual_strides, size_class(pixels),
        NUM_GROUPS=num_groups, BLOCK_GROUPS=triton.next_power_of_2(num_groups), R=taps_h, S=taps_w, STRIDE=stride,
        PADDING=padding, RELU=relu, PRECISION=_precision(x),
    )  # fmt: skip
    if sums is not None:  # a tile of this kernel may hold pixels of several images, so it leaves no sums
        sum_maps(out, sums, offsets, out_rows)
    return out
