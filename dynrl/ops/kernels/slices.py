"""This kernel finishes what a dense convolution leaves, for rows that use unequally many of its channels."""

# Triton gives kernel parameters their types when a kernel is called.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = (
    4096  # pixels times channels of a program; at most 64 channels, so that no map has more tiles than sums have parts
)


@triton.jit
def _finish_slices_kernel(
    y_ptr, out_ptr, residual_ptr, choice_ptr, scale_ptr, shift_ptr, widths_ptr, sums_ptr,
    pixels, channels, blocks, parts, stride_choice,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    choice = tl.load(choice_ptr + row * stride_choice)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    c_mask = c < channels
    mask = (p < pixels)[:, None] & c_mask[None, :]
    image = row * pixels * channels
    place = p[:, None] * channels + c[None, :]
    scale = tl.load(scale_ptr + choice * channels + c, mask=c_mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + choice * channels + c, mask=c_mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + image + place, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + image + place, mask=mask, other=0.0).to(tl.float32)
    # NaN is propagated, as in torch: a NaN that turns into 0 would hide a fault.
    y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if widths_ptr is not None:
        # A product by 0 would leave NaN of what is infinite in a channel that this row does not have.
        y = tl.where((c < tl.load(widths_ptr + choice))[None, :], y, 0.0)
    done = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + image + place, done, mask=mask)
    if sums_ptr is not None:
        # The sum is of what is written, so what is rounded away and what lies outside the map do not count.
        added = tl.sum(tl.where(mask, done.to(tl.float32), 0.0), 0)
        part = sums_ptr + (row * parts + block) * channels + c
        tl.store(part, added, mask=c_mask)
        # Sums may have more parts than this map has tiles; the parts that no tile makes become zeros.
        for i in tl.static_range(1, ROUNDS):
            inside = block + i * blocks < parts
            tl.store(part + i * blocks * channels, tl.zeros([BLOCK_C], tl.float32), mask=c_mask & inside)


def finish_slices(
    y: Tensor, out: Tensor, choice: Tensor, scale: Tensor, shift: Tensor, *, widths: Tensor | None = None,
    residual: Tensor | None = None, sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scale and shift each map by its row's choice, add the residual, relu, and make channels beyond a width zero.

    Args:
        y: [n, C, H, W] channels_last, the result of a convolution.
        out: [n, C, H, W] channels_last; may be `y` itself.
        choice: [n] int64 in 0 ... G-1, of any stride.
        scale, shift: [G, C] of any float dtype, contiguous.
        widths: [G] int32, how many channels a choice has, or None: C.
        residual: [n, C, H, W] channels_last, or None; may be `out` itself.
        sums: [n, map_parts(H, W), C] float32, contiguous, or None. The sums of each channel over parts of what is
            written are written here.

    Returns:
        `out`.
    """
    n, channels, height, width = y.shape
    pixels = height * width
    for maps in (y, out, residual):
        assert maps is None or (maps.shape == y.shape and maps.is_contiguous(memory_format=torch.channels_last))
    assert scale.is_contiguous() and shift.is_contiguous() and scale.shape == shift.shape
    assert scale.shape[1] == channels and pixels * channels < 2**31
    if y.numel() == 0:
        return out
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    block_p = min(TILE // block_c, triton.next_power_of_2(pixels))
    blocks, parts = triton.cdiv(pixels, block_p), 0 if sums is None else sums.shape[1]
    assert sums is None or (sums.is_contiguous() and blocks <= parts), (blocks, parts)
    _finish_slices_kernel[(n * blocks, triton.cdiv(channels, block_c))](
        y, out, residual, choice, scale, shift, widths, sums, pixels, channels, blocks, parts, choice.stride(0),
        BLOCK_P=block_p, BLOCK_C=block_c, ROUNDS=triton.cdiv(parts, blocks), num_warps=4,
    )  # fmt: skip
    return out
