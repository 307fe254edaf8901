"""`gated_residual` runs a block on the rows that chose it, and passes the other rows through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting

from dynrl.ops.backend import Path, may_look, path, selects
from dynrl.ops.convolution import FoldedConv2d, fusible
from dynrl.ops.costs import COSTS
from dynrl.ops.move import as_rows, beside, compute_copies, compute_rows, moves_nothing, replace_some
from dynrl.ops.partition import partition
from dynrl.ops.pooled import MapSums


class ResidualBlock(nn.Module):
    """A residual block for inference only: relu(shortcut(x) + branch(x)).

    Args:
        convolutions: the branch, a chain of convolutions with ReLU between them.
        projection: the shortcut; None for the identity, where the result overwrites `x`. Its biases become part of the
            branch's last ones, because without ReLU, biases take a pass of their own on CUDA.
    """

    def __init__(self, convolutions: Sequence[FoldedConv2d], projection: FoldedConv2d | None = None) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.projection = projection
        if projection is not None and projection.bias is not None:
            convolutions[-1].add_bias(projection.bias)
            projection.bias = None
        self.weight_bytes = sum(c.weight.numel() * c.weight.element_size() for c in convolutions)

    def macs(self, x: Tensor) -> int:
        """Return the MACs of the branch for one row of `x` [n, C, H, W], if the branch keeps the map's size."""
        return self.weight_bytes // x.element_size() * x.shape[2] * x.shape[3]

    @property
    def _chain(self) -> list[FoldedConv2d]:
        return list(self.convolutions)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, K, P, Q]; without a projection, the result overwrites `x`."""
        *first, last = self._chain
        if not fusible(x):
            y = x
            for convolution in first:
                y = convolution(y, relu=True)
            return last(y, relu=True, residual=x if self.projection is None else self.projection(x))
        out = x if self.projection is None else self.projection.like_output(x)
        size = COSTS.piece_rows(len(x), x.stride(0) * x.element_size(), self.weight_bytes)
        parts = zip(x.split(size), out.split(size), strict=True) if size < len(x) else ((x, out),)
        for part, into in parts:
            if self.projection is not None:
                into.copy_(self.projection.fused(part, False))
            y = part
            for convolution in first:
                y = convolution.fused(y, True)
            last.fused(y, True, into)
        return out


def gated_residual_ref(
    x: Tensor, run: Tensor, block: Callable[[Tensor], Tensor], sums: MapSums | None = None
) -> Tensor:
    """Compute the definition of `gated_residual`: it computes every row and then selects, so it saves nothing.

    Args:
        x: [n, ...].
        run: [n] bool (or 0/1), the rows to run.
        block: a function of rows that keeps their shape, each row's result depending on that row only.
        sums: what is known of the sums of `x`; here, they stay as they are, like `x` itself.

    Returns:
        [n, ...], `block(x)` where `run`, else `x`.

    Source: the skipped residual block of SkipNet (Wang et al. 2018, ECCV) and BlockDrop (Wu et al. 2018, CVPR).
    """
    return torch.where(beside(run.bool(), x), block(x.clone()), x)


def gated_residual(x: Tensor, run: Tensor, block: Callable[[Tensor], Tensor], sums: MapSums | None = None) -> Tensor:
    """Do `gated_residual_ref`, computing only the rows that run. Differentiable if `block` is.

    If no gradient is recorded, `x` may be overwritten. Then `block` may overwrite its input, but not keep it. `sums`
    hold for the result then, or are not known: only the kernels bring them along.

    The MACs are those of `block` for each row that runs.

    Raises:
        ValueError: inside `device_counts`, if `block` is no `ResidualBlock`: the kernels run no other block.
    """
    known = None if sums is None else sums.take(x)
    if selects():
        return gated_residual_ref(x, run, block)
    match path(x, vendor=True):
        case Path.REF:
            return gated_residual_ref(x, run, block)
        case Path.TRACED if is_exporting():
            return replace_some(run != 0, lambda rows: [block(rows)], x, x)[0]
        case Path.TRACED:
            return compute_rows(x, run.nonzero().squeeze(1), block)
        case Path.TRITON if isinstance(block, ResidualBlock):
            done = _on_triton(x, run, block, known)
            if sums is not None:
                sums.keep(done, known)
            return done
        case _:
            if not may_look():
                raise ValueError(
                    f"a {type(block).__name__} cannot run without asking how many rows run it, which a CUDA graph must "
                    "not; only blocks of convolutions (`ResidualBlock`) can"
                )
            return _on_host(x, run, block)


def run_rows(x: Tensor, index: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
    """Do `gated_residual` where the host knows how many rows run, in steps that do not depend on which these are.

    So a CUDA graph can hold them. No gradient is recorded, and `x` may be overwritten.

    Args:
        x: [n, ...].
        index: [k] int64, the rows to run. A row may be there more than once; it runs once all the same. If k is n,
            all rows are computed, and some of them are selected.
        block: see `gated_residual`.
    """
    if index.shape[0] == x.shape[0]:
        return gated_residual_ref(x, torch.zeros_like(index, dtype=torch.bool).index_fill_(0, index, True), block)
    return compute_copies(x, index, ((block, 0, index.shape[0]),))


def _on_host(x: Tensor, run: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
    n = x.shape[0]
    if n == 1:  # finding the index would take longer
        return block(x).to(x.dtype) if run.item() else x
    index = run.nonzero().squeeze(1)
    spared = n - index.shape[0]
    if spared == n:
        return x
    if spared == 0:
        return block(x).to(x.dtype)
    saved = COSTS.mac_time(spared * block.macs(x)) if isinstance(block, ResidualBlock) else math.inf
    worth = COSTS.worth_compacting(saved, COSTS.moving, spared / n)
    if worth or torch.is_grad_enabled() or moves_nothing(x, block):
        return compute_rows(x, index, block)
    rest = (run == 0).nonzero().squeeze(1)
    flat = as_rows(x)
    kept = flat.index_select(0, rest)
    done = block(x)
    if done is not x:
        x.copy_(done)
    flat.index_copy_(0, rest, kept)
    return x


def _on_triton(x: Tensor, run: Tensor, block: ResidualBlock, sums: Tensor | None) -> Tensor:
    from dynrl.ops.kernels.conv import conv_rows

    before, x = x, x.contiguous(memory_format=torch.channels_last)
    rows_by_choice = partition(run.long(), 2)
    order, offsets = rows_by_choice.order, rows_by_choice.offsets[1:]  # the rows that run are the second part
    y, convolutions = x, block._chain
    rows: Tensor | None = order
    for convolution in convolutions:
        last = convolution is convolutions[-1]
        weight, bias = convolution.weight, convolution.bias
        out = x if last else convolution.like_output(y)
        conv_rows(
            y, weight, out, offsets, in_rows=rows, out_rows=order if last else None,
            shift=None if bias is None else bias.unsqueeze(0), residual=x if last else None, relu=True,
            stride=convolution.stride[0], padding=int(convolution.padding[0]), sums=sums if last else None,
        )  # fmt: skip
        y, rows = out, None
    return x if x is before else before.copy_(x)
