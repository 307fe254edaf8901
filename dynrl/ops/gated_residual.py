"""`gated_residual`: run a block on the rows that chose it, hand the other rows through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gated_residual_ref(x: Tensor, run: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
    """The definition. Computes every row and selects: saves nothing.

    Args:
        x: [n, ...].
        run: [n] bool (or 0/1), the rows to run.
        block: a function of rows that keeps their shape, each row's result depending on that row only.

    Returns:
        [n, ...]: `block(x)` where `run`, else `x`.
    """
    return torch.where(run.bool().view(-1, *[1] * (x.dim() - 1)), block(x), x)


def gated_residual(x: Tensor, run: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
    """`gated_residual_ref`, paying only for the rows that run: rows are gathered, computed, scattered back.

    Where no gradient is recorded, `x` itself is overwritten and returned.
    MACs: those of `block` for each row that runs, 0 for the others.
    """
    index = run.nonzero().squeeze(1)
    if len(index) == 0:
        return x
    if len(index) == len(x):
        return block(x)
    # A row must be copied as one run of memory: index_select on a channels_last tensor copies element by element
    # and hands back a contiguous one, which every layer after it would convert again.
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    flat = x.permute(0, 2, 3, 1) if last else x
    rows = flat.index_select(0, index)
    done = block(rows.permute(0, 3, 1, 2) if last else rows)
    done = done.permute(0, 2, 3, 1) if last else done
    if torch.is_grad_enabled():
        flat = flat.index_copy(0, index, done.to(flat.dtype))
    else:
        _write_rows(flat, index, done.to(flat.dtype))
    return flat.permute(0, 3, 1, 2) if last else flat


def _write_rows(x: Tensor, index: Tensor, rows: Tensor) -> None:
    """`x[index] = rows`. On the CPU index_copy_ moves one element at a time, so rows go as 16-byte elements.

    Measured on [256, 4096] float32, half of the rows: 0.06 instead of 0.17 ms; index_select takes 0.05.
    """
    bytes_apart = x.element_size() * (x[0].numel() | int(x.storage_offset()) | int(rows.storage_offset()))
    if x.is_contiguous() and rows.is_contiguous() and bytes_apart % 16 == 0 and not x.is_cuda:
        x, rows = (t.view(len(t), -1).view(torch.complex128) for t in (x, rows))
    x.index_copy_(0, index, rows)
