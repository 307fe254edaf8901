"""This kernel convolves chosen images by rectangular tiles, which Hopper's tensor copies move whole."""

# Triton gives kernel parameters their types when a kernel is called.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dynrl.ops.kernels.linear import INTERPRETED, device_time, dot, size_class


def tile_width(height: int, width: int, pixels: int) -> int:
    """Return the width of tiles of a given number of pixels, a power of two, for which the fewest cover a map.

    If several widths need equally few tiles, the widest is taken.
    """
    widths = [1 << i for i in range(pixels.bit_length())]
    return min(widths, key=lambda w: (-(-width // w) * -(-height * w // pixels), -w))


def _shape_descriptors(args: dict[str, Any]) -> None:
    """Cut descriptors to a configuration's tile; the autotuner calls it before each launch."""
    w = tile_width(args["H"], args["W"], args["BLOCK_M"])
    h, n, k = args["BLOCK_M"] // w, args["BLOCK_N"], args["BLOCK_K"]
    args["x_desc"].block_shape = [1, h, w, k]
    args["w_desc"].block_shape = [n, 1, k]
    for name in ("out_desc", "residual_desc"):
        if args[name] is not None:
            args[name].block_shape = [1, h, w, n]


# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, and the programs on a multiprocessor that take one tile after another, or 0
# for one program a tile). The first one fits everything.
TILES = [
    (64, 16, 16, 4, 4, 0),
    (128, 16, 16, 4, 4, 0),
    (64, 32, 32, 4, 4, 0),
    (128, 32, 32, 4, 4, 0),
    (64, 64, 32, 4, 4, 0),
    (128, 64, 32, 4, 4, 0),
    (64, 64, 64, 4, 4, 0),
    (128, 64, 64, 4, 3, 0),
    (64, 128, 64, 4, 4, 0),
    (128, 128, 64, 8, 3, 0),
    (128, 128, 64, 4, 3, 0),
    (256, 64, 64, 8, 3, 0),
    (64, 256, 64, 4, 3, 0),
    (64, 32, 32, 4, 4, 4),
    (64, 64, 64, 4, 4, 3),
    (128, 64, 64, 4, 4, 2),
    (128, 64, 64, 4, 3, 3),
    (128, 128, 64, 8, 4, 1),
    (128, 128, 64, 4, 3, 2),
    (64, 128, 64, 4, 3, 3),
    (128, 256, 64, 8, 3, 1),
    (256, 128, 64, 8, 3, 1),
]


def _configs() -> list[triton.Config]:
    tiles = [(16, 16, 16, 4, 1, 1)] if INTERPRETED else TILES
    return [
        triton.Config(
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "RESIDENT": resident}, num_warps=warps, num_stages=stages,
            pre_hook=_shape_descriptors,
        )
        for m, n, k, warps, stages, resident in tiles
    ]  # fmt: skip


def _prune(configs: list[triton.Config], args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    """Return the configurations whose blocks divide the channels in use, are not mostly padding, and fit in memory."""
    values = args | kwargs

    def fits(config: triton.Config) -> bool:
        m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        if values["granule"] % k or n > max(32, triton.next_power_of_2(values["size_k"])):
            return False
        if m > max(64, triton.next_power_of_2(values["H"] * values["W"])):
            return False
        if values["x_desc"].base.dtype != torch.float32:
            return True
        return k <= 32 and m * n <= (8192 if values["PRECISION"] == "tf32" else 512 * config.num_warps)

    return [config for config in configs if fits(config)] or configs[:1]


def tile_count(height: int, width: int, pixels: int) -> int:
    """Return how many tiles of a given number of pixels cover a map."""
    w = tile_width(height, width, pixels)
    return -(-width // w) * -(-height * w // pixels)


@cache
def map_parts(height: int, width: int) -> int:
    """Return the most tiles that any configuration has for a map, whose lines of pixels may also be one."""
    sizes = {config.kwargs["BLOCK_M"] for config in _configs()}
    return max(tile_count(*sides, pixels) for sides in ((height, width), (1, height * width)) for pixels in sizes)


@triton.autotune(
    _configs(),
    # The autotuner distinguishes types of tensors, but not types of their descriptors.
    key=["size_c", "size_k", "size_class", "granule", "element_bytes", "H", "W", "R", "NUM_GROUPS", "PRECISION"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=device_time,
)
@triton.heuristics(
    {
        "TILE_W": lambda args: tile_width(args["H"], args["W"], args["BLOCK_M"]),
        "ROUNDS": lambda args: -(-args["parts"] // tile_count(args["H"], args["W"], args["BLOCK_M"])),
    }
)
@triton.jit
def _conv_tiles_kernel(
    x_desc, w_desc, out_desc, residual_desc,
    offsets_ptr, in_rows_ptr, out_rows_ptr, scale_ptr, shift_ptr, in_widths_ptr, out_widths_ptr, factor_ptr,
    sums,  # an address: the autotuner distinguishes types of tensors, and one tile serves with sums and without
    size_c, size_k, H, W, parts,
    size_class, granule, element_bytes,  # read by the autotuner only
    NUM_GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PADDING: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RESIDENT: tl.constexpr, TILE_W: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    TILE_H: tl.constexpr = BLOCK_M // TILE_W
    blocks_n = tl.cdiv(size_k, BLOCK_N)
    tiles_w = tl.cdiv(W, TILE_W)
    tiles = tl.cdiv(H, TILE_H) * tiles_w
    begin = tl.load(offsets_ptr)
    total = (tl.load(offsets_ptr + NUM_GROUPS) - begin) * tiles * blocks_n
    # Resident programs fetch the next tile while they finish one. Neighbours have the same tile and other output
    # channels, so the second one finds its pixels in the cache.
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=RESIDENT > 0 and in_widths_ptr is None):
        n0 = index % blocks_n * BLOCK_N
        tile = index // blocks_n % tiles
        item = begin + index // blocks_n // tiles
        group = 0
        if NUM_GROUPS > 1:
            groups = tl.arange(0, BLOCK_GROUPS)
            ends = tl.load(offsets_ptr + 1 + groups, mask=groups < NUM_GROUPS, other=2**31 - 1)
            group = tl.sum((ends <= item).to(tl.int32), 0)
        width = size_c
        out_width = size_k
        if in_widths_ptr is not None:
            width = tl.load(in_widths_ptr + group)
        if out_widths_ptr is not None:
            out_width = tl.load(out_widths_ptr + group)
        in_row = item
        out_row = item
        if in_rows_ptr is not None:
            in_row = tl.load(in_rows_ptr + item).to(tl.int32)
        if out_rows_ptr is not None:
            out_row = tl.load(out_rows_ptr + item).to(tl.int32)
        top = tile // tiles_w * TILE_H
        left = tile % tiles_w * TILE_W

        if n0 < out_width:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            blocks = width // BLOCK_K
            for step in tl.range(0, R * S * blocks):
                tap = step // blocks
                c = step % blocks * BLOCK_K
                # What lies outside the map is read as zeros.
                x = x_desc.load([in_row, top + tap // S - PADDING, left + tap % S - PADDING, c])
                w = w_desc.load([n0, tap, c])
                acc = dot(x.reshape(BLOCK_M, BLOCK_K), w.reshape(BLOCK_N, BLOCK_K).T, acc, PRECISION)

            n = n0 + tl.arange(0, BLOCK_N)
            n_mask = n < size_k
            if scale_ptr is not None:
                acc *= tl.load(scale_ptr + group * size_k + n, mask=n_mask, other=0.0)[None, :]
            if shift_ptr is not None:
                acc += tl.load(shift_ptr + group * size_k + n, mask=n_mask, other=0.0)[None, :]
            if factor_ptr is not None:
                acc *= tl.load(factor_ptr + out_row).to(tl.float32)
            if residual_desc is not None:
                acc += residual_desc.load([out_row, top, left, n0]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
            if RELU:
                # NaN is propagated, as in torch: a NaN that turns into 0 would hide a fault.
                acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
            done = acc.to(out_desc.dtype)
            out_desc.store([out_row, top, left, n0], done.reshape(1, TILE_H, TILE_W, BLOCK_N))
            if sums is not None:
                # The sum is of what is written, so what is rounded away and what lies outside the map do not count.
                place = tl.arange(0, BLOCK_M)
                inside = (top + place // TILE_W < H) & (left + place % TILE_W < W)
                added = tl.sum(tl.where(inside[:, None], done.to(tl.float32), 0.0), 0)
                part = sums.to(tl.pointer_type(tl.float32)) + (out_row.to(tl.int64) * parts + tile) * size_k + n
                tl.store(part, added, mask=n_mask)
                # Other tiles may have left more parts here, so the parts that this tile does not make become zeros.
                for i in tl.static_range(1, ROUNDS):
                    mask = n_mask & (tile + i * tiles < parts)
                    tl.store(part + i * tiles * size_k, tl.zeros([BLOCK_N], tl.float32), mask=mask)


@cache
def _multiprocessors(device: torch.device) -> int:
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _maps(x: Tensor, flat: bool) -> Tensor | None:
    """Return [N, C, H, W] as [N, H, W, C], one line of pixels if `flat`; None if tensor copies cannot address it."""
    rows = x.permute(0, 2, 3, 1)
    n, height, width, channels = rows.shape
    if rows.stride(3) != 1 or any(stride * x.element_size() % 16 for stride in rows.stride()[:3]):
        return None
    if x.data_ptr() % 16 or x.numel() == 0:
        return None
    if not flat:
        return rows
    if rows.stride(1) != width * rows.stride(2):
        return None
    return rows.as_strided((n, 1, height * width, channels), (rows.stride(0), rows.stride(0), rows.stride(2), 1))


def _descriptor(x: Tensor) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1] * x.dim())  # the block's shape comes with the tile


def conv_tiles(
    x: Tensor, weight: Tensor, out: Tensor, offsets: Tensor, *, granule: int, precision: str,
    in_rows: Tensor | None, out_rows: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    in_widths: Tensor | None, out_widths: Tensor | None, factor: Tensor | None, residual: Tensor | None,
    relu: bool, padding: int, sums: Tensor | None,
) -> bool:  # fmt: skip
    """Do `conv_rows` of stride 1 if tensor copies can address its tensors; else do nothing and return False.

    Beyond a group's width, `out` is overwritten up to a multiple of the tile.

    Args:
        granule: a common divisor of all widths of the input.
        precision: the precision of float32 products.
    """
    _, size_c, taps_h, taps_w = weight.shape
    flat = taps_h == taps_w == 1
    x_view, out_view = _maps(x, flat), _maps(out, flat)
    residual_view = None if residual is None else _maps(residual, flat)
    taps = weight.permute(0, 2, 3, 1)
    if x_view is None or out_view is None or (residual is not None and residual_view is None):
        return False
    if granule % 16 or not taps.is_contiguous() or weight.data_ptr() % 16:
        return False
    _, height, width, _ = out_view.shape
    size_k = len(weight)
    items = len(next((rows for rows in (in_rows, out_rows) if rows is not None), x))
    num_groups = len(offsets) - 1

    def grid(meta: dict[str, int]) -> tuple[int]:
        total = items * tile_count(height, width, meta["BLOCK_M"]) * triton.cdiv(size_k, meta["BLOCK_N"])
        return (min(total, meta["RESIDENT"] * _multiprocessors(x.device)) if meta["RESIDENT"] else total,)

    _conv_tiles_kernel[grid](
        _descriptor(x_view), _descriptor(taps.reshape(size_k, taps_h * taps_w, size_c)), _descriptor(out_view),
        None if residual_view is None else _descriptor(residual_view),
        offsets, in_rows, out_rows, scale, shift, in_widths, out_widths, factor,
        None if sums is None else sums.data_ptr(),
        size_c, size_k, height, width, 0 if sums is None else sums.shape[1],
        size_class(items * height * width), granule, x.element_size(),
        NUM_GROUPS=num_groups, BLOCK_GROUPS=triton.next_power_of_2(num_groups), R=taps_h, S=taps_w, PADDING=padding,
        RELU=relu, PRECISION=precision,
    )  # fmt: skip
    return True
