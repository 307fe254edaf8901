"""`gated_cells` runs a residual block of convolutions on some cells of each map, and passes the others through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from dynrl.ops.backend import Path, may_look, path
from dynrl.ops.gated_residual import gated_residual

# How many pixels a layer's result needs around it, and a function from maps with that border to maps without it.
Layer = tuple[int, Callable[[Tensor], Tensor]]
# Maps are computed in pieces of so many bytes, which stay in a cache while they are gathered, convolved and put back.
PIECE_BYTES = 2**23

_Index = tuple[Tensor, ...]  # the rows of some cells, and their places from above and from the left


class CellBlock(Protocol):
    """A residual block relu(x + branch(x)) that keeps the size of its map; its branch is a chain of layers."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers of the branch, which add no border of zeros themselves."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map [m, C, H, W] to [m, C, H, W], each row by itself."""


def gated_cells_ref(x: Tensor, run: Tensor, weight: Tensor, block: CellBlock) -> Tensor:
    """Compute the definition of `gated_cells`: it computes all cells and hides those that do not run.

    A cell that runs sees all of `x` around it. Of what a layer of the branch made, it sees the part of cells that run,
    and zeros elsewhere. It changes by its weight times what the block changes. Where all cells of a row run, there is
    nothing to weigh, and the result is the block's own.

    Args:
        x: [n, C, H, W].
        run: [n, h, w] bool, the cells that run, where h and w divide H and W: cells are H/h x W/w pixels.
        weight: [n, h, w], each cell's weight.
        block: see `CellBlock`.

    Returns:
        [n, C, H, W].

    Source: dynamic convolutions (Verelst and Tuytelaars 2020, CVPR, section 3), where pixels are chosen.
    """
    high, wide = x.shape[2] // run.shape[1], x.shape[3] // run.shape[2]
    shown, weights = (
        cells.unsqueeze(1).repeat_interleave(high, 2).repeat_interleave(wide, 3) for cells in (run, weight.to(x.dtype))
    )
    y = x
    for k, (border, layer) in enumerate(block.layers):
        y = layer(F.pad(y if k == 0 else torch.where(shown, y, 0), (border,) * 4))
    some = torch.where(shown, torch.lerp(x, F.relu(x + y), weights), x)
    return torch.where(run.flatten(1).all(1).view(-1, 1, 1, 1), block(x.clone()), some)


def gated_cells(x: Tensor, run: Tensor, weight: Tensor, block: CellBlock) -> Tensor:
    """Do `gated_cells_ref`, computing only the cells that run. Differentiable if the block is.

    Cells are gathered with a border, so that no layer computes a pixel that does not run. The op is plain torch on any
    device. If no gradient is recorded, `x` may be overwritten. Then `block` may overwrite its input, but not keep it.

    The MACs are those of the block on as many pixels as run.

    Raises:
        ValueError: inside `device_counts`, since the layers need to know how many cells run.
    """
    if path(x, vendor=True) is Path.REF or is_compiling():
        return gated_cells_ref(x, run, weight, block)
    if not may_look():
        raise ValueError("the host must know how many cells of a map run, so there is no capture")
    whole = run.flatten(1).all(1)
    x = gated_residual(x, whole, block)
    run = run & ~whole.view(-1, 1, 1)
    if torch.is_grad_enabled():
        index = run.nonzero(as_tuple=True)
        return _joined(_changed(x, index, weight, block.layers, run.shape), index, x, run.shape) if len(index[0]) else x
    rows = len(x) if x.is_cuda else PIECE_BYTES // (x.stride(0) * x.element_size())
    for part, chosen, weights in zip(*(all_rows.split(max(1, rows)) for all_rows in (x, run, weight)), strict=True):
        index = chosen.nonzero(as_tuple=True)
        if len(index[0]):
            _tiles(part, chosen.shape)[index] = _changed(part, index, weights, block.layers, chosen.shape)
    return x


def _changed(x: Tensor, index: _Index, weight: Tensor, layers: Sequence[Layer], grid: torch.Size) -> Tensor:
    """Return the cells at `index` as they are afterwards: [m, p, q, C], m cells of p x q pixels."""
    before = y = _tiles(x, grid)[index]
    for k, (border, layer) in enumerate(layers):
        if border:
            around = _bordered(x, border) if k == 0 else _placed(y, index, grid, border)
            y = _tiles(around, grid, border)[index]
        y = layer(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(x.dtype)
    weight = weight[index].to(x.dtype).view(-1, 1, 1, 1)
    if torch.is_grad_enabled():
        return torch.lerp(before, F.relu(before + y), weight)
    return before.lerp_(y.add_(before).relu_(), weight)


def _tiles(x: Tensor, grid: torch.Size, border: int = 0) -> Tensor:
    """Return the cells of maps [n, C, H, W], which may have a border all around, as a view [n, h, w, p, q, C]."""
    _, h, w = grid
    high, wide = ((x.shape[2] - 2 * border) // h, (x.shape[3] - 2 * border) // w)
    cells = x.unfold(2, high + 2 * border, high).unfold(3, wide + 2 * border, wide)
    return cells.permute(0, 2, 3, 4, 5, 1)


def _bordered(x: Tensor, border: int) -> Tensor:
    """Return maps with a border of zeros all around."""
    if torch.is_grad_enabled():
        return F.pad(x, (border,) * 4)
    n, channels, height, width = x.shape
    # In memory, channels come last, as in the cells.
    out = x.new_empty(n, height + 2 * border, width + 2 * border, channels).permute(0, 3, 1, 2)
    for side in (out[:, :, :border], out[:, :, -border:], out[..., :border], out[..., -border:]):
        side.zero_()
    _inside(out, border).copy_(x)
    return out


def _placed(cells: Tensor, index: _Index, grid: torch.Size, border: int) -> Tensor:
    """Return maps that have these cells, zeros elsewhere, and a border of zeros all around."""
    n, h, w = grid
    _, high, wide, channels = cells.shape
    out = cells.new_zeros(n, h * high + 2 * border, w * wide + 2 * border, channels).permute(0, 3, 1, 2)
    if torch.is_grad_enabled():
        return F.pad(_joined(cells, index, _inside(out, border), grid), (border,) * 4)
    _tiles(_inside(out, border), grid)[index] = cells
    return out


def _inside(x: Tensor, border: int) -> Tensor:
    return x[:, :, border:-border, border:-border]


def _joined(cells: Tensor, index: _Index, x: Tensor, grid: torch.Size) -> Tensor:
    """Return maps `x` with these cells in place of their own; differentiable."""
    tiles = _tiles(x, grid).index_put(index, cells)
    n, h, w, high, wide, channels = tiles.shape
    return tiles.transpose(2, 3).reshape(n, h * high, w * wide, channels).permute(0, 3, 1, 2)
