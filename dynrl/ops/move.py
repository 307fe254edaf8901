"""The ops move rows by these functions, when some rows of a batch are computed and the rest stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dynrl.ops.backend import may_look
from dynrl.ops.costs import COSTS

Block = Callable[[Tensor], Tensor]


def each(function: Callable[..., Any], *features: Any) -> Any:
    """Apply a function of tensors to features: if they are tuples, to each of their tensors; None stays None."""
    first = features[0]
    if first is None:
        return None
    return tuple(map(function, *features)) if isinstance(first, tuple) else function(*features)


def tensors_of(features: Any) -> tuple[Tensor, ...]:
    """Return the tensors that features are: those of a tuple, or the one; none of None."""
    if features is None:
        return ()
    return features if isinstance(features, tuple) else (features,)


def beside(values: Tensor, x: Tensor) -> Tensor:
    """Return a number for each row, [n], in the shape that broadcasts along rows like those of `x` [n, ...]."""
    return values.view(-1, *[1] * (x.dim() - 1))


def keep_rows(chosen: Tensor, *features: Any) -> tuple[Any, ...] | None:
    """Return the chosen rows of each tensor, in their memory format. Differentiable.

    Args:
        chosen: [n] bool.
        features: tensors [n, ...], or tuples of such tensors.

    Returns:
        [k, ...] each. If all rows are chosen, these are the given tensors themselves; if no row is chosen, the result
        is None. Traced code, which cannot ask how many rows are chosen, always gets new tensors.

    Raises:
        ValueError: inside `device_counts`, where the host must not learn how many rows are chosen.
    """
    if not (is_compiling() or may_look()):
        raise ValueError("the host must know how many rows go on here, which a CUDA graph does not let it: no capture")
    if not is_compiling() and chosen.shape[0] == 1:  # finding the index would take longer
        return features if chosen.item() else None
    index = chosen.nonzero().squeeze(1)
    if is_compiling():
        torch._check(index.shape[0] < 2**31)  # sums of such counts must fit in 64 bits, or ONNX refuses them
    else:
        if len(index) == len(chosen):
            return features
        if len(index) == 0:
            return None
    return tuple(each(lambda tensor: take_rows(tensor, index), given) for given in features)


def replace_some(run: Tensor, function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, *into: Tensor) -> list[Tensor]:
    """Return `into` after `into[k][run] = function(x[run])[k]`, in a program that is exported.

    The program asks whether any row runs. If none does, it does not get to `function`, which need not work on no rows:
    then batch norm is not defined, `view(n, -1, d)` is ambiguous, and runtimes of ONNX fail in matrix products.

    Args:
        run: [n] bool.
        function: a function of rows.
        x: [n, ...], what the rows are taken from.
        into: [n, ...] each; they are not changed.
    """
    # Both branches have to return tensors of the same strides, so rows lie one behind the other in all of them.
    last, lasts = _channels_last(x), [_channels_last(whole) for whole in into]
    flat = as_rows(x).contiguous()
    wholes = [flat if whole is x else as_rows(whole).contiguous() for whole in into]  # no two views of one tensor

    def some(flat: Tensor, run: Tensor, *wholes: Tensor) -> list[Tensor]:
        index = run.nonzero().squeeze(1)
        torch._check(index.shape[0] >= 1)
        torch._check(index.shape[0] < 2**31)  # sums of such counts must fit in 64 bits, or ONNX refuses them
        rows = flat.index_select(0, index)
        replaced = []
        for whole, is_last, made in zip(
            wholes, lasts, function(rows.permute(0, 3, 1, 2) if last else rows), strict=True
        ):
            made = (made.permute(0, 2, 3, 1) if is_last else made).to(whole.dtype)
            replaced.append(whole.index_copy(0, index, made))
        return replaced

    def none(flat: Tensor, run: Tensor, *wholes: Tensor) -> list[Tensor]:
        return [whole.clone() for whole in wholes]

    replaced: list[Tensor] = torch.cond(run.any(), some, none, (flat, run, *wholes))
    return [whole.permute(0, 3, 1, 2) if is_last else whole for whole, is_last in zip(replaced, lasts, strict=True)]


def apart(x: Tensor, other: Tensor) -> Tensor:
    """Return `x`, or a copy if it may share memory with `other`, so that writing to the result never changes `other`.

    Whether a layer copies may depend on strides. Traced code knows no addresses and always copies.
    """
    return x.clone() if is_compiling() or x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() else x


def compute_rows(x: Tensor, index: Tensor, block: Block) -> Tensor:
    """Return `x` after `x[index] = block(x[index])`, for a rising `index`. Differentiable.

    If no gradient is recorded, `x` is overwritten and returned, and `block` may overwrite its input. A block with large
    weights gives their size in an attribute `weight_bytes`.
    """
    if not (torch.is_grad_enabled() or is_compiling()):
        return compute_groups(x, index, ((block, 0, len(index)),))
    last, flat = _channels_last(x), as_rows(x)
    rows = flat.index_select(0, index)
    done = block(rows.permute(0, 3, 1, 2) if last else rows)
    flat = flat.index_copy(0, index, (done.permute(0, 2, 3, 1) if last else done).to(x.dtype))
    return flat.permute(0, 3, 1, 2) if last else flat


def compute_groups(x: Tensor, order: Tensor, groups: Sequence[tuple[Block, int, int]]) -> Tensor:
    """Set `x[i] = block(x[i])` for i in `order[start:end]`, for each (block, start, end), and return `x`.

    The groups follow one another and together make up `order`. No gradients are recorded.
    """
    count = len(order)
    if count == 0:  # compiled code gets here without knowing the count
        return x
    if x.is_cuda:
        return compute_copies(x, order, groups)
    row_bytes, weight_bytes = x.stride(0) * x.element_size(), 0
    for block, start, end in groups:
        weight_bytes += getattr(block, "weight_bytes", 0) * (end - start) // count
    size = COSTS.piece_rows(count, row_bytes, weight_bytes)
    if COSTS.stays(row_bytes, weight_bytes):
        for block, start, end in groups:
            _compute_in_place(x, order[start:end].tolist(), block, size)
        return x
    last, flat = _channels_last(x), as_rows(x)
    for begin in range(0, count, size):
        part = order if size >= count else order[begin : begin + size]
        held = flat.index_select(0, part)
        rows = held.permute(0, 3, 1, 2) if last else held
        for block, start, end in groups:
            start, end = start - begin, end - begin
            if start < size and end > 0:
                given = rows[max(start, 0) : end]
                done = block(given)
                if len(given) == len(rows) and done.dtype is x.dtype:
                    held = (done.permute(0, 2, 3, 1) if last else done).contiguous()
                elif done is not given:
                    given.copy_(done)
        put_rows(flat, part, held)
    return x


def compute_copies(x: Tensor, order: Tensor, groups: Sequence[tuple[Block, int, int]]) -> Tensor:
    """Do `compute_groups` by a copy of each group's rows, which is best on CUDA."""
    last, flat = _channels_last(x), as_rows(x)
    for block, start, end in groups:
        index = order[start:end]
        rows = flat.new_empty(end - start, *flat.shape[1:])
        words, into = _words(flat), _words(rows)
        if words is None or into is None:
            torch.index_select(flat, 0, index, out=rows)
        else:
            torch.index_select(words, 0, index, out=into)
        done = block(rows.permute(0, 3, 1, 2) if last else rows).to(x.dtype)
        put_rows(flat, index, (done.permute(0, 2, 3, 1) if last else done).contiguous())
    return x


def moves_nothing(x: Tensor, block: Block) -> bool:
    """Tell whether `compute_rows` computes rows like those of `x` where they lie."""
    return COSTS.stays(x.stride(0) * x.element_size(), getattr(block, "weight_bytes", 0))


def as_rows(x: Tensor) -> Tensor:
    """Return a view of `x` whose rows are each moved as one run of memory."""
    return x.permute(0, 2, 3, 1) if _channels_last(x) else x


def _compute_in_place(x: Tensor, index: list[int], block: Block, size: int) -> None:
    """Compute large rows where they lie, one run of neighbours after the other: nothing is moved."""
    start = index[0]
    for row, after in zip(index, [*index[1:], -1], strict=True):
        if after != row + 1 or row + 1 - start == size:
            part = x[start : row + 1]
            done = block(part)
            if done is not part:
                part.copy_(done)
            start = after


def _channels_last(x: Tensor) -> bool:
    # A row must be moved as one run of memory: index_select on a channels_last tensor copies element by element and
    # returns a contiguous tensor, which every following layer would convert again.
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _words(x: Tensor) -> Tensor | None:
    """Return [n, ...] as [n, words of 16 bytes], or None if rows are not made up of such words."""
    # index_put_ on the CPU, and CUDA, move rows one element at a time, so larger elements are faster.
    if not x.is_contiguous() or (x.stride(0) * x.element_size() | x.data_ptr()) % 16:
        return None
    return x.flatten(1).view(torch.complex128)


def put_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Set `x[index] = rows` in place and return `x`, for `x` and `rows` [n, ...] of one type."""
    flat = as_rows(x)
    if flat is not x:
        rows = rows.permute(0, 2, 3, 1)
    if rows.numel() >= COSTS.words:
        words, given = _words(flat), _words(rows)
        if words is not None and given is not None:
            if x.is_cuda:
                words.index_copy_(0, index, given)
            else:
                words.index_put_((index,), given)
            return x
    flat.index_copy_(0, index, rows)
    return x


def add_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return `x` after `x[index] += rows`, for a rising `index`. Differentiable.

    If no gradient is recorded, `x` is overwritten and returned.
    """
    traced = is_compiling()
    if not traced and len(index) == len(x):
        return x + rows if torch.is_grad_enabled() else x.add_(rows)
    last, flat = _channels_last(x), as_rows(x)
    given = (rows.permute(0, 2, 3, 1) if last else rows).to(x.dtype)
    if traced or torch.is_grad_enabled():
        flat = flat.index_add(0, index, given)
        return flat.permute(0, 3, 1, 2) if last else flat
    flat.index_add_(0, index, given)
    return x


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return `x[index]` in the memory format of `x`. Differentiable."""
    if is_compiling():  # a tensor whose size is data cannot be asked for its memory format
        return x.index_select(0, index)
    rows = as_rows(x).index_select(0, index)
    return rows.permute(0, 3, 1, 2) if _channels_last(x) else rows
