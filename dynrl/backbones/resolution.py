"""In a network of resolutions, small sub-networks see coarse maps first, and later ones start at finer maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.exit import SEES
from dynrl.backbones.multiscale import Counted, Maps, Scales, Size, grow
from dynrl.backbones.resnet import Normed
from dynrl.schema import MOST_ROWS, check_count

INNER = 2  # inner channels of a layer for each that it adds, at most
LENT = 4  # one of so many maps that a layer adds comes from the sub-network before


class Layer(nn.Module):
    """A layer adds maps to a scale, from what the scale has; what there was stays the first channels of the result."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.same = grow(channels, growth, INNER * growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, C + growth, H, W]."""
        return torch.cat([x, self.same(x)], 1)


class FusingLayer(nn.Module):
    """A layer adds maps to a scale, and makes a quarter of them from what the sub-network before had at this layer.

    Args:
        channels: of the scale before the layer.
        coarser: the channels of what the sub-network before had, at the next coarser scale.
        growth: the channels that the layer adds.
    """

    def __init__(self, channels: int, coarser: int, growth: int) -> None:
        super().__init__()
        lent = max(1, growth // LENT)
        self.coarser = coarser
        self.same = grow(channels, growth - lent, INNER * (growth - lent))
        self.up = grow(coarser, lent, INNER * lent)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, C + growth, H, W]; of what came before, take the maps of this layer."""
        lent = F.interpolate(self.up(before[:, : self.coarser]), size=x.shape[2:], mode="bilinear")
        return torch.cat([x, lent, self.same(x)], 1)


class Block(Counted):
    """The layers in front of an exit add maps to the coarsest scale.

    Args:
        sizes: of each scale's maps before the block, from the finest to the coarsest.
        growth: the channels that a layer adds.
        depth: the number of layers.
    """

    def __init__(self, sizes: list[Size], growth: int, depth: int) -> None:
        super().__init__()
        *finer, size = sizes
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(Layer(size[0], growth))
            size = self._count(self.layers[-1], size)
        self.sizes = [*finer, size]

    def forward(self, maps: Maps) -> Maps:
        """Run the block."""
        *finer, x = maps
        for layer in self.layers:
            x = layer(x)
        return (*finer, x)


class Fusion(Counted):
    """The layers of a sub-network at a scale take in what the one before had at the next coarser scale, and lead there.

    Behind the layers, the means of 2x2 cells are taken. A 1x1 convolution reduces them, together with what the
    sub-network before had, to half as many channels.

    Args:
        size: of the scale's maps before the layers.
        before: the size of what the sub-network before had.
        growth: the channels that a layer adds to this scale, and those that one added to what was before.
        depth: the number of layers, which the sub-network before had, too.

    Attributes:
        sizes: of the maps behind the layers, and of those at the next coarser scale.
    """

    def __init__(self, size: Size, before: Size, growth: Sequence[int], depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(depth):
            self.layers.append(FusingLayer(size[0], before[0] - (depth - i) * growth[1], growth[0]))
            size = self._count(self.layers[-1], size, before)
        both = size[0] + before[0]
        self.squeeze = Normed(both, both // 2, 1)
        self.sizes = [size, self._count(self.squeeze, (both, *before[1:]))]

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps of the scale, and those at the next coarser one."""
        for layer in self.layers:
            x = layer(x, before)
        return x, self.squeeze(torch.cat([F.avg_pool2d(x, 2, ceil_mode=True), before], 1))


class SubNetwork(Counted):
    """The stage in front of a sub-network's first exit goes from the scale where it starts to the coarsest.

    At each scale on the way there is a `Fusion` with the sub-network before. At the coarsest, a `Block` leads to the
    exit.

    Args:
        sizes: of each scale's maps before the stage: of scales up to `start`, those of the stem; of coarser ones, what
            the sub-network before had.
        start: the scale where the sub-network starts, counted from the finest.
        growth: the channels that a layer adds to each scale.
        depth: the number of layers in front of an exit.
        exits: the number of exits of each sub-network.
    """

    def __init__(self, sizes: list[Size], start: int, growth: list[int], depth: int, exits: int) -> None:
        super().__init__()
        self._start, made, size = start, sizes[:start], sizes[start]
        self.fusions = nn.ModuleList()
        for scale in range(start, len(sizes) - 1):
            fusion = Fusion(size, sizes[scale + 1], growth[scale : scale + 2], depth * exits)
            kept, size = fusion.sizes
            made.append(kept)
            self.fusions.append(fusion)
            self.macs += fusion.macs
        self.block = Block([*made, size], growth[-1], depth)
        self.macs += self.block.macs
        self.sizes = self.block.sizes if start else self.block.sizes[-1:]

    def forward(self, maps: Maps) -> Maps:
        """Run the stage; where no sub-network follows, keep the coarsest maps only."""
        made, x = list(maps[: self._start]), maps[self._start]
        for fusion, before in zip(self.fusions, maps[self._start + 1 :], strict=True):
            kept, x = fusion(x, before)
            made.append(kept)
        maps = self.block((*made, x))
        return maps if self._start else maps[-1:]


class ResolutionNet(Scales):
    """A network of sub-networks, one for each scale: the first sees the coarsest maps, later ones start at finer maps.

    Each sub-network has exits. It goes from the scale where it starts to the coarsest, and takes in what the
    sub-network before had. A row that stops saves all finer scales but for their stem.

    Args:
        input_shape, classes, scales, width, stem_stride: see `Scales`. There are as many sub-networks as scales.
        exits: the number of exits of each sub-network; the last one is the network's own output.
        layers: the number of layers in front of each exit. A sub-network has `exits` times as many at each scale.
        growth: how many channels a layer adds to the finest scale; each coarser one gets twice as many.
        sees: see `ExitResNet`.

    Source: Resolution Adaptive Networks for Efficient Inference (Yang et al. 2020, CVPR). There, the maps of a
    sub-network are made smaller by the last layer of a scale. Here a mean does it, which costs nothing.
    """

    family = "resolution_net"

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        exits: int = 2,
        layers: int = 2,
        scales: int = 3,
        width: int = 16,
        growth: int = 8,
        stem_stride: int = 1,
        sees: str = SEES[0],
    ) -> None:
        for name, count, least in (("exits", exits, 1), ("layers", layers, 1), ("growth", growth, 2)):
            check_count(name, count, least, MOST_ROWS)
        super().__init__(input_shape, classes, scales, width, stem_stride, exits=exits, layers=layers, growth=growth)
        self._pose_exits(self._make_stages(exits, layers, [growth << scale for scale in range(scales)]), sees)

    def _make_stages(self, exits: int, layers: int, growth: list[int]) -> Iterator[Counted]:
        sizes = self._stem_sizes
        for start in reversed(range(len(growth))):
            stage: Counted = SubNetwork(sizes, start, growth, layers, exits)
            yield stage
            for _ in range(exits - 1):
                stage = Block(stage.sizes, growth[-1], layers)
                yield stage
            sizes = stage.sizes
