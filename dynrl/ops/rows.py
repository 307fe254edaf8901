"""Moving rows: what the CPU paths of the ops share. Some rows of a batch are computed, the others stay as they are."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dynrl.ops.pooled import noted, summary


def _cache_bytes() -> int:
    """Of the last-level cache; 32 MB where the system does not tell."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


# Rows are computed so many bytes at a time: a larger piece falls out of the cache between a block's layers, and every
# buffer above some megabytes is mapped and zeroed anew at each call; a smaller one pays the layers' start-up too often.
# Measured, residual block of 16 channels on 256 rows of 32x32: on an EPYC 23 ms at once, 12 in pieces of 2 MB, 14 of 1.
# On a Xeon with 48 MB of cache a routed ResNet-20 takes 111 ms for 256 images at 2 MB, 105 at 4, 101 at 8, 98 at 16;
# for 1024 454, 440, 392, 375, and with its router 465, 443, 423, 419.
PIECE = min(max(_cache_bytes() // 6, 2 << 20), 8 << 20)
# Each piece reads all weights anew, so it holds so many times as many bytes. Measured there, half of 256 rows of
# ResNet-50's stage 3 (0.8 MB a row, 4.4 MB of weights): 361, 344, 322, 305 ms at 1, 2, 4, 8 times.
PIECE_WEIGHTS = 4
# What starting a block once more costs (some 60 us), in bytes of rows that could be moved there and back meanwhile.
START = 600 << 10

Block = Callable[[Tensor], Tensor]


def piece_rows(rows: int, row_bytes: int, weight_bytes: int) -> int:
    """How many rows to compute at a time: pieces of equal, even size."""
    count = -(-rows * row_bytes // max(PIECE, PIECE_WEIGHTS * weight_bytes, 2 * row_bytes))
    return 2 * math.ceil(rows / (2 * count))


def compute_rows(x: Tensor, index: Tensor, block: Block, seen: Tensor | None = None) -> Tensor:
    """`x[index] = block(x[index])`, for an `index` that rises. Differentiable.

    Where no gradient is recorded `x` is overwritten and returned, and `block` may overwrite what it is given; `seen` is
    kept as `compute_groups` does. A block with large weights says so in `weight_bytes`.
    """
    if not (torch.is_grad_enabled() or is_compiling()):
        return compute_groups(x, index, ((block, 0, len(index)),), seen)
    last, flat = _channels_last(x), as_rows(x)
    rows = flat.index_select(0, index)
    done = block(rows.permute(0, 3, 1, 2) if last else rows)
    flat = flat.index_copy(0, index, (done.permute(0, 2, 3, 1) if last else done).to(x.dtype))
    return noted(flat.permute(0, 3, 1, 2) if last else flat, seen)


def compute_groups(
    x: Tensor, order: Tensor, groups: Sequence[tuple[Block, int, int]], seen: Tensor | None = None
) -> Tensor:
    """`x[i] = block(x[i])` for i in `order[start:end]`, for each (block, start, end); in place, without gradients.

    The groups follow each other and together make up `order`. `seen`, the `summary` of `x`, is brought up to date; on
    the CPU only the rows computed are looked at, and while they lie in the cache (ResNet-20, 256 images of 32x32, half
    of the MACs, router in: 109 instead of 114 ms).
    """
    if len(order) == 0:  # compiled code comes here without having looked
        return x
    layout = _layout(x)
    if x.is_cuda:
        return noted(_compute_copies(x, layout, order, groups), seen)
    count, weight_bytes = len(order), 0
    for block, start, end in groups:
        weight_bytes += getattr(block, "weight_bytes", 0) * (end - start) // count
    size = count if count * layout.row_bytes <= PIECE else piece_rows(count, layout.row_bytes, weight_bytes)
    if _large(layout.row_bytes, weight_bytes):
        for block, start, end in groups:
            _compute_in_place(x, order[start:end].tolist(), block, size, seen)
        return x
    words = layout.words(x)
    scratch = layout.take(size)
    held_words, held_rows = scratch
    for begin in range(0, count, size):
        part = order if size >= count else order[begin : begin + size]
        length = len(part)
        held = held_words[:length]
        torch.index_select(words, 0, part, out=held)
        for block, start, end in groups:
            start, end = start - begin, end - begin
            if start < length and end > 0:
                rows = held_rows[max(start, 0) : min(end, length)]
                done = block(rows)
                if done is not rows:
                    rows.copy_(done)
        if seen is not None:
            seen.index_copy_(0, part, summary(held_rows[:length]))
        words.index_put_((part,), held)
    layout.free.append(scratch)
    return x


def _compute_copies(x: Tensor, layout: _Layout, order: Tensor, groups: Sequence[tuple[Block, int, int]]) -> Tensor:
    """`compute_groups` by a copy of each group's rows."""
    words, form = layout.words(x), torch.channels_last if layout.last else torch.contiguous_format
    for block, start, end in groups:
        index = order[start:end]
        rows = torch.empty((end - start, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=form)
        torch.index_select(words, 0, index, out=layout.words(rows))
        done = block(rows).to(x.dtype).contiguous(memory_format=form)  # `to` leaves other strides as they are
        words.index_copy_(0, index, layout.words(done))
    return x


def _large(row_bytes: int, weight_bytes: int) -> bool:
    """Whether moving a row there and back takes longer than starting a block anew, which reads its weights anew.

    Weights are read twice as fast as rows are moved: they stay in the cache.
    """
    return 2 * row_bytes > START + weight_bytes // 2


def moves_nothing(x: Tensor, block: Block) -> bool:
    """Whether `compute_rows` computes rows like `x`'s where they lie."""
    return _large(x.stride(0) * x.element_size(), getattr(block, "weight_bytes", 0))


def as_rows(x: Tensor) -> Tensor:
    """`x` as a view whose rows are moved as one run of memory each."""
    return x.permute(0, 2, 3, 1) if _channels_last(x) else x


def _compute_in_place(x: Tensor, index: list[int], block: Block, size: int, seen: Tensor | None) -> None:
    """Compute large rows where they lie, one run of neighbours after the other: dearer starts, but nothing is moved."""
    start = index[0]
    for row, after in zip(index, [*index[1:], -1], strict=True):
        if after != row + 1 or row + 1 - start == size:
            part = x[start : row + 1]
            done = block(part)
            if done is not part:
                part.copy_(done)
            if seen is not None:
                seen[start : row + 1] = summary(part)
            start = after


def _channels_last(x: Tensor) -> bool:
    # A row must be moved as one run of memory: index_select on a channels_last tensor copies element by element
    # and hands back a contiguous one, which every layer after it would convert again.
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class _Layout:
    """How rows of one kind are moved, and room for some, kept: fresh memory costs page faults at every call.

    Each thread has its own. A block that calls an op itself finds the room taken, and other room is made for it.
    """

    def __init__(self, x: Tensor) -> None:
        self.last = _channels_last(x)
        self.whole = self.last or x.is_contiguous()  # a row is one run of memory, and the next row follows
        self.row = x.stride(0)
        self.row_bytes = self.row * x.element_size()
        # On the CPU index_put_ moves one element at a time, so rows go as words of 16 bytes where that fits. Measured
        # on [256, 4096] float32, half of the rows: 0.06 instead of 0.17 ms; index_select takes 0.05 either way.
        self.wide = self.whole and self.row_bytes % 16 == 0 and x.data_ptr() % 16 == 0
        self.shape, self.dtype = x.shape[1:], x.dtype
        self.free: list[tuple[Tensor, Tensor]] = []

    def words(self, x: Tensor) -> Tensor:
        """[n, ...] as [n, words]; as it is, if its rows are not whole."""
        if not self.whole:
            return x
        flat = x.as_strided((len(x), self.row), (self.row, 1))
        return flat.view(torch.complex128) if self.wide else flat

    def take(self, size: int) -> tuple[Tensor, Tensor]:
        """Room for at least `size` rows, as words and as rows; to be put back into `free`."""
        if self.free:
            pair = self.free.pop()
            if len(pair[1]) >= size:
                return pair
        form = torch.channels_last if self.last else torch.contiguous_format
        with torch.inference_mode(False):  # so that it can be written to in and out of inference mode
            rows = torch.empty(size, *self.shape, dtype=self.dtype, memory_format=form)
            return self.words(rows), rows


class _Layouts(threading.local):
    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], _Layout] = {}


_layouts = _Layouts()


def _layout(x: Tensor) -> _Layout:
    key = (x.shape[1:], x.stride(), x.dtype, x.data_ptr() % 16)
    found = _layouts.known.get(key)
    if found is None:
        found = _layouts.known[key] = _Layout(x)
    return found


def put_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`x[index] = rows` in place, `x` and `rows` [n, ...] contiguous and of one type; returns `x`."""
    # Of few elements, making views of larger words costs as much as it saves. Measured on a Xeon, half of 64 rows of
    # 128: 5 us as they are, 8 in words; half of 256 rows of 256: 37 and 17.
    if x.is_cuda or rows.numel() < 1 << 14 or (x.stride(0) * x.element_size() | rows.data_ptr() | x.data_ptr()) % 16:
        return x.index_copy_(0, index, rows)
    wide = torch.complex128
    x.view(len(x), -1).view(wide).index_put_((index,), rows.view(len(rows), -1).view(wide))
    return x


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]`, in the memory format of `x`. Differentiable."""
    if is_compiling():  # whose memory format is the compiler's affair, and cannot be asked for where a size is data
        return x.index_select(0, index)
    rows = as_rows(x).index_select(0, index)
    return rows.permute(0, 3, 1, 2) if _channels_last(x) else rows
