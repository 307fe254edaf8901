"""`gated_positions` runs a block on some positions of each row, such as tokens, and passes the others through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dynrl.ops.backend import Path, may_look, path
from dynrl.ops.move import put_rows
from dynrl.ops.partition import partition

Block = Callable[[Tensor], Tensor]


def gated_positions_ref(
    x: Tensor, choice: Tensor, order: Tensor, weight: Tensor, counts: Sequence[int], block: Block
) -> Tensor:
    """Compute the definition of `gated_positions`: it computes every row at every choice, and then selects.

    A row whose choice is c runs the block on the first counts[c] positions of its `order`, and these see no others.
    Each of them changes by its weight times what the block changes. Where all positions run, there is nothing to weigh,
    and the result is the block's own.

    Args:
        x: [n, T, d], n rows of T positions.
        choice: [n] integers in 0 ... choices-1.
        order: [n, T] int64, each row's positions, those that run first in front.
        weight: [n, T], each position's weight, by its place in the row.
        counts: the number of positions at each choice, in 0 ... T.
        block: a function from [m, k, d] to [m, k, d], each row's result depending on that row only.

    Returns:
        [n, T, d].

    Source: mixture of depths (Raposo et al. 2024, section 3), where the positions with the highest scores run a block,
    and the scores weigh what it adds.
    """
    out = x
    for c, count in enumerate(counts):
        if count == 0:
            continue
        if count == x.shape[1]:
            done = block(x.clone())
        else:
            index = order[:, :count].unsqueeze(2)
            part, share = x.take_along_dim(index, 1), weight.unsqueeze(2).take_along_dim(index, 1)
            changed = torch.lerp(part, block(part.clone()), share.to(part.dtype))
            done = x.scatter(1, index.expand_as(part), changed)
        out = torch.where((choice == c).view(-1, 1, 1), done, out)
    return out


def gated_positions(
    x: Tensor, choice: Tensor, order: Tensor, weight: Tensor, counts: Sequence[int], block: Block
) -> Tensor:
    """Do `gated_positions_ref`, computing only the positions that run. Differentiable if `block` is.

    If no gradient is recorded, `x` may be overwritten. Then `block` may overwrite its input, but not keep it.

    The MACs are those of `block` on as many positions as each row runs.

    Raises:
        ValueError: inside `device_counts`, since the block needs to know how many rows made each choice.
    """
    how = path(x)
    if how is Path.REF:
        return gated_positions_ref(x, choice, order, weight, counts, block)
    if how is not Path.TRACED and not may_look():
        raise ValueError("the host must know how many rows run which share of their positions, so there is no capture")
    groups = list(_groups(choice, counts, traced=how is Path.TRACED))
    if len(groups) == 1 and counts[groups[0][0]] == x.shape[1] and groups[0][1] is None:
        return block(x).to(x.dtype)
    if how is Path.TRITON and not torch.is_grad_enabled():
        return _on_triton(x, order, weight, counts, block, groups)
    return _on_rows(x, order, weight, counts, block, groups)


# The choice of a group and its rows, [m] int64; None stands for all rows.
_Group = tuple[int, Tensor | None]


def _groups(choice: Tensor, counts: Sequence[int], traced: bool) -> Iterator[_Group]:
    """Yield each choice that runs anything, with its rows."""
    running = [c for c, count in enumerate(counts) if count]
    if traced:
        yield from ((c, (choice == c).nonzero().squeeze(1)) for c in running)
        return
    parts = partition(choice, len(counts))
    for c in running:
        if parts.sizes[c] == len(choice):
            yield c, None
        elif parts.sizes[c]:
            yield c, parts.order[parts.ends[c] : parts.ends[c + 1]]


def _on_rows(
    x: Tensor, order: Tensor, weight: Tensor, counts: Sequence[int], block: Block, groups: Sequence[_Group]
) -> Tensor:
    n, positions, size = x.shape
    flat = x.flatten(0, 1)  # a view, or a copy if positions are not evenly spaced in memory
    places, results = [], []
    for c, rows in groups:
        count = counts[c]
        mine = torch.arange(n, device=x.device) if rows is None else rows
        some = order if rows is None else order.index_select(0, rows)
        # If all positions run, they keep their order, so that neighbours are moved together.
        which = some[:, :count] if count < positions else torch.arange(positions, device=x.device)
        at = (mine.unsqueeze(1) * positions + which).flatten()
        part = flat.index_select(0, at)
        # A block that overwrites its input must not change what its result is weighed with.
        given = part.clone() if count < positions else part
        done = block(given.view(-1, count, size)).to(x.dtype).flatten(0, 1)
        if count < positions:
            done = torch.lerp(part, done, weight.flatten().index_select(0, at).to(x.dtype).unsqueeze(1))
        places.append(at)
        results.append(done)
    if not groups:
        return x
    if torch.is_grad_enabled() or is_compiling():
        return flat.index_copy(0, torch.cat(places), torch.cat(results)).view(x.shape)
    for at, done in zip(places, results, strict=True):
        put_rows(flat, at, done)
    return x if flat.data_ptr() == x.data_ptr() else x.copy_(flat.view(x.shape))


def _on_triton(
    x: Tensor, order: Tensor, weight: Tensor, counts: Sequence[int], block: Block, groups: Sequence[_Group]
) -> Tensor:
    from dynrl.ops.kernels.positions import put_positions, take_positions

    before = x
    x, order, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, order, weight))
    for c, rows in groups:
        count = counts[c]
        mine = torch.arange(len(x), device=x.device) if rows is None else rows.contiguous()
        done = block(take_positions(x, mine, order, count)).to(x.dtype).contiguous()
        put_positions(done, mine, order, weight if count < x.shape[1] else None, x)
    return x if x is before else before.copy_(x)
