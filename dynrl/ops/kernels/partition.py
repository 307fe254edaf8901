"""These kernels sort rows by choice; other kernels find the group that a tile belongs to by the helpers here."""

# Triton gives kernel parameters their types when a kernel is called.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def tile_bound(capacity: int, num_groups: int, block: int) -> int:
    """Return the most tiles of `block` items that `capacity` items need if each of `num_groups` groups starts one."""
    return min(capacity, (capacity + num_groups * (block - 1)) // block)


@triton.jit
def group_of_tile(
    offsets_ptr, tile, per_item, NUM_GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return the group of the `tile`-th tile of `BLOCK_M` pairs, its number in the group, and the group's bounds.

    The pairs are (item, pixel). Beyond the last tile, the bounds are equal, like those of a group without items.
    """
    if NUM_GROUPS == 1:
        group = 0
        number = tile
        begin = tl.load(offsets_ptr)
        end = tl.load(offsets_ptr + 1)
    else:
        groups = tl.arange(0, BLOCK_GROUPS)
        begins = tl.load(offsets_ptr + groups, mask=groups < NUM_GROUPS, other=0)
        ends = tl.load(offsets_ptr + groups + 1, mask=groups < NUM_GROUPS, other=0)
        tiles = ((ends - begins) * per_item + BLOCK_M - 1) // BLOCK_M  # [BLOCK_GROUPS]
        before = tl.cumsum(tiles, 0) <= tile
        number = tile - tl.sum(tl.where(before, tiles, 0), 0)
        group = tl.minimum(tl.sum(before.to(tl.int32), 0), NUM_GROUPS - 1)
        begin = tl.load(offsets_ptr + group)
        end = tl.where(tile < tl.sum(tiles, 0), tl.load(offsets_ptr + group + 1), begin)
    return group, number, begin, end


@triton.jit
def _partition_kernel(choice_ptr, order_ptr, offsets_ptr, n, stride_choice, BLOCK: tl.constexpr):
    # Program e reads all choices twice: counting gives every row its place, without atomics and in a fixed order.
    expert = tl.program_id(0)
    lower = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        row = first + tl.arange(0, BLOCK)
        choice = tl.load(choice_ptr + row.to(tl.int64) * stride_choice, mask=row < n, other=0).to(tl.int32)
        lower += ((choice < expert) & (row < n)).to(tl.int32)
    start = tl.sum(lower, 0)
    tl.store(offsets_ptr + expert, start)
    for first in range(0, n, BLOCK):
        row = first + tl.arange(0, BLOCK)
        choice = tl.load(choice_ptr + row.to(tl.int64) * stride_choice, mask=row < n, other=0).to(tl.int32)
        mine = (choice == expert) & (row < n)
        place = start + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order_ptr + place, row.to(tl.int64), mask=mine)
        start += tl.sum(mine.to(tl.int32), 0)
    if expert == tl.num_programs(0) - 1:
        tl.store(offsets_ptr + expert + 1, start)


def partition(choice: Tensor, num_choices: int) -> tuple[Tensor, Tensor]:
    """Sort rows by their choice, stably.

    Args:
        choice: [n] int64, int32 or bool; any stride. Values outside 0..num_choices-1 are the caller's bug: such rows
            are missing from `order`, which then has unwritten places.
        num_choices: how many choices there are, at least 1.

    Returns:
        order [n] int64, the row numbers sorted by choice, and offsets [num_choices + 1] int32: the rows that chose e
        are order[offsets[e]:offsets[e + 1]].
    """
    assert choice.dim() == 1 and num_choices >= 1
    assert choice.dtype in (torch.int64, torch.int32, torch.bool), choice.dtype
    n = len(choice)
    order = torch.empty(n, dtype=torch.int64, device=choice.device)
    offsets = torch.empty(num_choices + 1, dtype=torch.int32, device=choice.device)
    if choice.dtype == torch.bool:
        choice = choice.view(torch.uint8)
    block = min(4096, triton.next_power_of_2(max(n, 16)))
    _partition_kernel[(num_choices,)](choice, order, offsets, n, choice.stride(0), BLOCK=block, num_warps=8)
    return order, offsets


@triton.jit
def _running_kernel(action_ptr, rows_ptr, index_ptr, count_ptr, arrived_ptr, n, size, BLOCK: tl.constexpr):
    arrived = n
    if arrived_ptr is not None:
        arrived = tl.minimum(tl.load(arrived_ptr), n).to(tl.int32)
    total = 0
    last = 0
    for first in range(0, n, BLOCK):
        row = first + tl.arange(0, BLOCK)
        going = (tl.load(action_ptr + row, mask=row < n, other=0) == 1) & (row < arrived)
        place = total + tl.cumsum(going.to(tl.int32), 0) - 1
        tl.store(index_ptr + place, tl.load(rows_ptr + row, mask=going, other=0), mask=going)
        total += tl.sum(going.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(going, row, 0), 0))
    again = tl.load(rows_ptr + last)
    for first in range(0, size, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(index_ptr + place, again, mask=(place >= total) & (place < size))
    tl.store(count_ptr, total)


def running(action: Tensor, rows: Tensor, index: Tensor, count: Tensor, arrived: Tensor | None) -> None:
    """Write which rows run, and how many (see `dynrl.ops.running.running_ref`).

    Args:
        action, rows: [n] int64, contiguous, n > 0.
        index: [B] int64, contiguous, B >= n.
        count: [1] int64.
        arrived: [1] int64, or None.
    """
    n, size = len(action), len(index)
    assert 0 < n <= size and rows.is_contiguous() and index.is_contiguous()
    block = min(4096, triton.next_power_of_2(size))
    _running_kernel[(1,)](action, rows, index, count, arrived, n, size, BLOCK=block, num_warps=8)
