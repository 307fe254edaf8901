"""In residual networks, each input chooses which share of its map's cells runs a block (DynConv, SACT)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.channel import normalised
from dynrl.backbones.positions import SHARES, Positions
from dynrl.backbones.resnet import Block, ResNet
from dynrl.backbones.walk import State
from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.gated_cells import CellBlock, Layer, gated_cells
from dynrl.ops.gated_residual import ResidualBlock
from dynrl.ops.pooled import summary
from dynrl.schema import MOST_ROWS, check_count


@dataclass(frozen=True)
class Trained:
    """A residual block that can be trained, as `gated_cells` takes it."""

    block: Block

    @property
    def layers(self) -> list[Layer]:
        """Each convolution, without a border of zeros, with its batch norm; and with ReLU, but for the last."""
        pairs = self.block.layers()
        return [
            (int(convolution.padding[0]), partial(self._layer, convolution, norm, norm is not pairs[-1][1]))
            for convolution, norm in pairs
        ]

    @staticmethod
    def _layer(convolution: nn.Conv2d, norm: Any, relu: bool, x: Tensor) -> Tensor:
        y = normalised(F.conv2d(x, convolution.weight), norm)
        return F.relu(y, inplace=True) if relu else y

    def __call__(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, C, H, W]."""
        return self.block(x)


class Folded(nn.Module):
    """A residual block for inference only, as `gated_cells` takes it."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.block = block
        convolutions: Any = block.convolutions
        self.bare = nn.ModuleList(FoldedConv2d.holding(layer.weight, layer.bias) for layer in convolutions)

    @property
    def layers(self) -> list[Layer]:
        """Each convolution, without a border of zeros; with ReLU, but for the last."""
        last, convolutions = len(self.bare) - 1, self.block._chain
        return [
            (int(convolution.padding[0]), partial(bare, relu=k != last))
            for k, (convolution, bare) in enumerate(zip(convolutions, self.bare, strict=True))
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, C, H, W]; the result overwrites `x`."""
        return self.block(x)


class CellResNet(Positions, ResNet):
    """A ResNet in which each input chooses, block by block, which share of its map's cells runs the block.

    Identity blocks are decision points. All maps are cut into `grid` x `grid` cells. In front of each block, a scorer
    gives each cell a score, from the mean of each channel over the cell, and the cells with the highest scores run. A
    cell that runs sees all of the map around it, but what the block's first convolutions make is 0 outside of the cells
    that run. Blocks that change the shape always run whole.

    Args:
        input_shape: (channels, height, width) of one image.
        grid: the number of cells along each side, which divides both sides of every map in front of a decision point.
        shares: the shares of the cells, one for each choice, rising to 1.
        network: the other arguments of `ResNet`.
    """

    family = "cell_resnet"

    def __init__(
        self, input_shape: tuple[int, int, int], grid: int = 4, shares: tuple[float, ...] = SHARES, **network: Any
    ) -> None:
        super().__init__(input_shape, **network)
        check_count("grid", grid, 1, MOST_ROWS)
        self._blocks[0].check_plain()
        self.config = {**self.config, "grid": grid, "shares": list(shares)}
        self._grid, cells = grid, grid * grid
        shapes, block_macs, fixed_macs = self._identities()
        uneven = [shape[1:] for shape in shapes if shape[1] % grid or shape[2] % grid]
        if uneven:
            raise ValueError(f"expected a grid that divides both sides of all maps, got {grid} and maps of {uneven}")
        self._set_points(
            [self._names[i] for i in self._skippable],
            tuple(shares),
            cells,
            [shape[0] for shape in shapes],
            lambda point, count: block_macs[point] * count // cells,
            fixed_macs,
        )

    def _lead(self, inputs: Tensor) -> tuple[Tensor, None]:
        return self._between(-1, inputs), None

    def _follow(self, state: State, x: Tensor) -> tuple[Tensor, None]:
        return self._between(state.point, x), None

    def _cell_block(self, point: int) -> CellBlock:
        block = self._blocks[self._skippable[point]]
        return Trained(block) if isinstance(block, Block) else block

    def _scores(self, point: int, x: Tensor, real: Tensor | None) -> Tensor:
        means = F.avg_pool2d(x, (x.shape[2] // self._grid, x.shape[3] // self._grid))
        return self.scorers[point](means.flatten(2).transpose(1, 2))

    def _at(self, state: State, action: Tensor) -> Tensor:
        x, scores, order = state.features
        counts = torch.tensor(self._counts, device=x.device)[action]
        place = order.argsort(1)  # the rank of each cell
        run, grid = place < counts.unsqueeze(1), (self._grid, self._grid)
        weight = 2 * scores.sigmoid()
        return gated_cells(x, run.unflatten(1, grid), weight.unflatten(1, grid), self._cell_block(state.point))

    def observe(self, state: State) -> Tensor:
        """Return the mean weight of the cells that each choice adds, and each channel's mean over the map."""
        return torch.cat([*self._added(state), summary(state.features[0])], 1)

    def _down(self, tokens: int, height: int, width: int) -> int:
        return self._grid

    def whole(self, inputs: Tensor) -> Tensor:
        """Return the outputs of all blocks one after the other."""
        return ResNet.whole(self, inputs)

    @property
    def whole_macs(self) -> int:
        """The MACs of `whole` for one row: no cell is scored."""
        weights = sum(scorer.score.in_features for scorer in self.scorers)  # type: ignore[union-attr, misc]
        return self.dense_macs - self._counts[-1] * weights

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each block runs on the first rows of the batch, which have as many cells in all.

        Cells that fill no row run as a map of their own.
        """
        cells: list[int] = torch.tensor(self._counts, device=route.device)[route].sum(0).tolist()

        def run() -> Tensor:
            x = self._between(-1, inputs)
            for point, count in enumerate(cells):
                rows, rest = divmod(count, self._counts[-1])
                for maps in ([x[:rows]] if rows else []) + ([self._strip(x, rest)] if rest else []):
                    self._cell_block(point)(maps)
                x = self._between(point, x)
            return x

        return run

    def _strip(self, x: Tensor, count: int) -> Tensor:
        """Return as many pixels of the first map of `x` [n, C, H, W] as `count` cells have, as one map of their height.

        In channels_last, they are a view: which pixels lie where does not matter.
        """
        high, wide = x.shape[2] // self._grid, count * (x.shape[3] // self._grid)
        pixels = x[0].permute(1, 2, 0).flatten(0, 1)[: high * wide]
        return pixels.view(1, high, wide, -1).permute(0, 3, 1, 2)

    def for_inference(self) -> Self:
        """Return a frozen copy with batch norm and ReLU folded into the convolutions, and maps in channels_last."""
        twin = super().for_inference()
        for i in twin._skippable:
            if isinstance(twin._blocks[i], ResidualBlock):  # a copy of a copy is folded already
                twin._blocks[i] = Folded(twin._blocks[i])
                twin.set_submodule(twin._names[i], twin._blocks[i])
        return twin
