"""`gated_residual`: run a block on the rows that chose it, hand the other rows through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from dynrl.ops.backend import counts_on_device, on_host, use_ref, use_triton
from dynrl.ops.convolution import FoldedConv2d, fusible
from dynrl.ops.pooled import noted
from dynrl.ops.route import route
from dynrl.ops.rows import as_rows, compute_rows, moves_nothing, piece_rows

# The occupancy rule: all rows are computed, and those that did not choose so put back, where these are few (one in 20),
# or where computing them (in MACs) takes no longer than the extra steps of compaction. Measured on 2 cores: of 256 rows
# of 16 channels, 32x32, 243 take 14.7 ms compacted and 14.4 this way, 236 take 14.6 and 15.2; of 64 rows of 64
# channels, 8x8, 61 take 2.68 and 2.74, 63 take 2.68 and 2.53; 7 of 8 rows of 16 channels take 0.69 and 0.55.
SPARE_ROWS = 20
SPARE_MACS = 6_000_000


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + branch(x)), the branch a chain of convolutions with ReLU between. For inference only.

    Args:
        convolutions: of the branch.
        projection: the shortcut; None for the identity, where the result overwrites `x`.
    """

    def __init__(self, convolutions: Sequence[FoldedConv2d], projection: FoldedConv2d | None = None) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.projection = projection
        self.weight_bytes = sum(c.weight.numel() * c.weight.element_size() for c in convolutions)

    def macs(self, x: Tensor) -> int:
        """MACs of one row of the branch, where it keeps the map's size."""
        return self.weight_bytes // x.element_size() * x.shape[2] * x.shape[3]

    @property
    def _chain(self) -> list[FoldedConv2d]:
        return list(self.convolutions)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W] to [n, K, P, Q]: to the same tensor, overwritten, if there is no projection."""
        *first, last = self._chain
        if not fusible(x):
            y = x
            for convolution in first:
                y = convolution(y, relu=True)
            return last(y, relu=True, residual=x if self.projection is None else self.projection(x))
        out = x if self.projection is None else self.projection.like_output(x)
        size = piece_rows(len(x), x.stride(0) * x.element_size(), self.weight_bytes)
        parts = zip(x.split(size), out.split(size), strict=True) if size < len(x) else ((x, out),)
        for part, into in parts:
            if self.projection is not None:
                into.copy_(self.projection.fused(part, False))
            y = part
            for convolution in first:
                y = convolution.fused(y, True)
            last.fused(y, True, into)
        return out


def gated_residual_ref(x: Tensor, run: Tensor, block: Callable[[Tensor], Tensor], seen: Tensor | None = None) -> Tensor:
    """The definition. Computes every row and selects: saves nothing.

    Args:
        x: [n, ...].
        run: [n] bool (or 0/1), the rows to run.
        block: a function of rows that keeps their shape, each row's result depending on that row only.
        seen: [n, C] float32, the `summary` of `x` or None; overwritten by that of the result, without gradients.

    Returns:
        [n, ...]: `block(x)` where `run`, else `x`.

    Source: the skipped residual block of SkipNet (Wang et al. 2018, ECCV) and BlockDrop (Wu et al. 2018, CVPR).
    """
    return noted(torch.where(run.bool().view(-1, *[1] * (x.dim() - 1)), block(x.clone()), x), seen)


def gated_residual(x: Tensor, run: Tensor, block: Callable[[Tensor], Tensor], seen: Tensor | None = None) -> Tensor:
    """`gated_residual_ref`, paying only for the rows that run. Differentiable where `block` is.

    Where no gradient is recorded, `x` may be overwritten, and `block` may overwrite what it is given, but not keep it.
    A `ResidualBlock` runs by the kernels where the host must not learn how many rows run (CUDA graphs).

    MACs: those of `block` for each row that runs, 0 for the others.
    """
    if not on_host(x):
        if use_ref():
            return gated_residual_ref(x, run, block, seen)
        if is_compiling():  # a count that is data must not decide on a branch
            return compute_rows(x, run.nonzero().squeeze(1), block, seen)
        if isinstance(block, ResidualBlock) and use_triton(x, vendor=True):
            return noted(_on_triton(x, run, block), seen)
        if counts_on_device():
            raise ValueError(
                f"a {type(block).__name__} cannot run without asking how many rows run it, which a CUDA graph must "
                "not; only blocks of convolutions (`ResidualBlock`) can"
            )
    if x.shape[0] == 1:  # to ask for an index takes 10 us, and 40 between blocks
        return noted(block(x).to(x.dtype), seen) if run.item() else x
    index = run.nonzero().squeeze(1)
    if len(index) == 0:
        return x
    if len(index) == len(x):
        return noted(block(x).to(x.dtype), seen)
    spare = len(x) - len(index)
    few = spare * SPARE_ROWS <= len(x) or (isinstance(block, ResidualBlock) and spare * block.macs(x) < SPARE_MACS)
    if few and not torch.is_grad_enabled() and not moves_nothing(x, block):
        rest = (run == 0).nonzero().squeeze(1)
        flat = as_rows(x)
        kept = flat.index_select(0, rest)
        done = block(x)
        if done is not x:
            x.copy_(done)
        flat.index_copy_(0, rest, kept)
        return noted(x, seen)
    return compute_rows(x, index, block, seen)


def _on_triton(x: Tensor, run: Tensor, block: ResidualBlock) -> Tensor:
    from dynrl.ops.kernels.conv import conv_rows

    before, x = x, x.contiguous(memory_format=torch.channels_last)
    routing = route(run.long(), 2)
    order, offsets = routing.order, routing.offsets
    offsets = offsets[1:]  # items offsets[1] ... n - 1 of `order` are the rows that run
    y, convolutions = x, block._chain
    rows: Tensor | None = order
    for convolution in convolutions:
        last = convolution is convolutions[-1]
        weight, bias = convolution.weight, convolution.bias
        out = x if last else convolution.like_output(y)
        conv_rows(
            y, weight, out, offsets, in_rows=rows, out_rows=order if last else None,
            shift=None if bias is None else bias.float().unsqueeze(0), residual=x if last else None, relu=True,
            stride=convolution.stride[0], padding=int(convolution.padding[0]),
        )  # fmt: skip
        y, rows = out, None
    return x if x is before else before.copy_(x)
