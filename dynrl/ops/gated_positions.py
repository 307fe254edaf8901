"""`gated_positions` runs a block on some positions of each row, such as tokens, and passes the others through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dynrl.ops.backend import Path, may_look, path
from dynrl.ops.move import put_rows
from dynrl.ops.partition import partition

# A function from (x [m, k, d], rows [m] or None, places [m, k] or None) to [m, k, d]: rows and places are where in the
# batch `x` comes from, for a block that is told more about them, such as a mask. None stands for all, in order.
Block = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def gated_positions_ref(
    x: Tensor, choice: Tensor, order: Tensor, weight: Tensor, counts: Sequence[int] | Tensor, block: Block
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
        counts: the number of positions at each choice, in 0 ... T, the last of all. Or [n, choices] int64, such numbers
            for each row, where a row's last one is that of its real positions; those behind them in `order` are
            padding, which never changes. One position more never adds more than one to a count, so that where rows run
            together, each has enough padding to be as long as the longest.
        block: see `Block`; each row's result depends on that row only, and that of a real position not on padding.

    Returns:
        [n, T, d].

    Source: mixture of depths (Raposo et al. 2024, section 3), where the positions with the highest scores run a block,
    and the scores weigh what it adds.
    """
    if isinstance(counts, Tensor):
        return _of_each_row(x, choice, order, weight, counts, block)
    out = x
    for c, count in enumerate(counts):
        if count == 0:
            continue
        if count == x.shape[1]:
            done = block(x.clone(), None, None)
        else:
            places = order[:, :count]
            index = places.unsqueeze(2)
            part, share = x.take_along_dim(index, 1), weight.unsqueeze(2).take_along_dim(index, 1)
            changed = torch.lerp(part, block(part.clone(), None, places), share.to(part.dtype))
            done = x.scatter(1, index.expand_as(part), changed)
        out = torch.where((choice == c).view(-1, 1, 1), done, out)
    return out


def _of_each_row(x: Tensor, choice: Tensor, order: Tensor, weight: Tensor, counts: Tensor, block: Block) -> Tensor:
    done = list(x.split(1))
    for row in range(len(x)):
        mine, (count, real) = torch.tensor([row], device=x.device), counts[row, [int(choice[row]), -1]].tolist()
        if count:
            places = order[row : row + 1, :count]
            part = x[mine].take_along_dim(places.unsqueeze(2), 1)
            changed = block(part.clone(), mine, places)
            if count < real:
                changed = torch.lerp(part, changed, weight[mine].gather(1, places).unsqueeze(2).to(x.dtype))
            done[row] = done[row].scatter(1, places.unsqueeze(2).expand_as(part), changed)
    return torch.cat(done)


def gated_positions(
    x: Tensor, choice: Tensor, order: Tensor, weight: Tensor, counts: Sequence[int] | Tensor, block: Block
) -> Tensor:
    """Do `gated_positions_ref`, computing only the positions that run. Differentiable if `block` is.

    If no gradient is recorded, `x` may be overwritten. Then `block` may overwrite its input, but not keep it.

    The MACs are those of `block` on as many positions as each row runs. If rows have padding, a row of a choice also
    runs as much of it as makes it as long as the longest row of that choice.

    Raises:
        ValueError: inside `device_counts`, since the block needs to know how many rows made each choice; or in traced
            code, if `counts` differ between rows.
    """
    how = path(x)
    if how is Path.REF:
        return gated_positions_ref(x, choice, order, weight, counts, block)
    if how is not Path.TRACED and not may_look():
        raise ValueError("the host must know how many rows run which share of their positions, so there is no capture")
    padded = isinstance(counts, Tensor)
    if isinstance(counts, Tensor):
        if how is Path.TRACED:
            raise ValueError("the host must know how long rows are without their padding, so they cannot be traced")
        order, weight, counts, padded = _lengthened(choice, order, weight, counts)
    groups = list(_groups(choice, counts, traced=how is Path.TRACED))
    if len(groups) == 1 and counts[groups[0][0]] == x.shape[1] and groups[0][1] is None and not padded:
        return block(x, None, None).to(x.dtype)
    if how is Path.TRITON and not torch.is_grad_enabled():
        return _on_triton(x, order, weight, counts, block, groups, padded)
    return _on_rows(x, order, weight, counts, block, groups, padded)


def _lengthened(
    choice: Tensor, order: Tensor, weight: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, list[int], bool]:
    """Let padding follow the positions that each row runs, so that all rows of a choice can run as many.

    Returns:
        the new order; weights that are 0 for positions that do not run, and 1 where all real ones do; the number of
        positions at each choice, the most that a row of it runs; and whether any row has padding.
    """
    positions = order.shape[1]
    count, real = counts.gather(1, choice.unsqueeze(1)), counts[:, -1:]
    most = counts.new_zeros(counts.shape[1]).scatter_reduce(0, choice, count.squeeze(1), "amax").tolist()
    if bool((real == positions).all()):
        return order, weight, most, False
    place = torch.arange(positions, device=order.device)
    padding = positions - real
    after = torch.where(place < count + padding, place - count + real, place - padding)
    order = order.gather(1, torch.where(place < count, place, after))
    runs = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, place < count)
    return order, torch.where(runs, torch.where(count == real, 1, weight), 0), most, True


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
    x: Tensor,
    order: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    block: Block,
    groups: Sequence[_Group],
    padded: bool,
) -> Tensor:
    n, positions, size = x.shape
    flat = x.flatten(0, 1)  # a view, or a copy if positions are not evenly spaced in memory
    places, results = [], []
    for c, rows in groups:
        count = counts[c]
        mine = torch.arange(n, device=x.device) if rows is None else rows
        which = None
        # If all positions run, they keep their order, so that neighbours are moved together.
        if count < positions:
            which = (order if rows is None else order.index_select(0, rows))[:, :count]
        at = torch.arange(positions, device=x.device) if which is None else which
        at = (mine.unsqueeze(1) * positions + at).flatten()
        part, weighed = flat.index_select(0, at), which is not None or padded
        # A block that overwrites its input must not change what its result is weighed with.
        given = part.clone() if weighed else part
        done = block(given.view(-1, count, size), rows, which).to(x.dtype).flatten(0, 1)
        if weighed:
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
    x: Tensor,
    order: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    block: Block,
    groups: Sequence[_Group],
    padded: bool,
) -> Tensor:
    from dynrl.ops.kernels.positions import put_positions, take_positions

    before = x
    x, order, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, order, weight))
    for c, rows in groups:
        count = counts[c]
        mine = torch.arange(len(x), device=x.device) if rows is None else rows.contiguous()
        places = (order if rows is None else order.index_select(0, mine))[:, :count]
        done = block(take_positions(x, mine, order, count), rows, places).to(x.dtype).contiguous()
        put_positions(done, mine, order, weight if count < x.shape[1] or padded else None, x)
    return x if x is before else before.copy_(x)
