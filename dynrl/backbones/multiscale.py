"""In a multi-scale network, coarse maps of the whole image are there from the start, for early classifiers to see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from dynrl.backbones.early import CELLS, early_classifier, early_inputs
from dynrl.backbones.exit import SEES, Exits
from dynrl.backbones.resnet import Normed, folded
from dynrl.cost import count_macs
from dynrl.ops.pooled import summary
from dynrl.schema import MOST_ROWS, check_count, check_counts

MOST_SCALES = 8

Maps = tuple[Tensor, ...]  # one for each scale, from the finest to the coarsest: [n, C, H, W]
Size = tuple[int, ...]  # (channels, height, width) of one of them


def grow(inputs: int, outputs: int, inner: int, stride: int = 1) -> nn.Sequential:
    """Make what adds maps to a scale: a 1x1 convolution to at most `inner` channels, then a 3x3 convolution."""
    inner = min(inputs, inner)
    return nn.Sequential(Normed(inputs, inner, 1), Normed(inner, outputs, 3, stride))


class Layer(nn.Module):
    """A layer adds maps to each scale, from what the scale has and from what the next finer scale has by now.

    A layer goes from the finest scale to the coarsest. So all that runs before a classifier, which sees the coarsest,
    is of use to it (Huang et al. 2018, section 4, "lazy evaluation").

    Args:
        channels: of each scale before the layer, from the finest to the coarsest.
        growth: the channels that the layer adds to each scale.
        inner: how many inner channels there are at most at each scale for a channel that is added.
    """

    def __init__(self, channels: list[int], growth: list[int], inner: list[int]) -> None:
        super().__init__()
        self.same, self.down = nn.ModuleList(), nn.ModuleList()
        for i, (own, new, wide) in enumerate(zip(channels, growth, inner, strict=True)):
            half = new // 2 if i else 0
            self.same.append(grow(own, new - half, wide * (new - half)))
            if i:
                self.down.append(grow(channels[i - 1] + growth[i - 1], half, wide * half, stride=2))

    def forward(self, maps: Maps) -> Maps:
        """Return the maps of each scale with those that the layer adds behind them."""
        grown: list[Tensor] = []
        for i, x in enumerate(maps):
            finer = [self.down[i - 1](grown[-1])] if i else []
            grown.append(torch.cat([x, *finer, self.same[i](x)], 1))
        return tuple(grown)


class Counted(nn.Module):
    """A stage of a network counts its MACs while it is built.

    Attributes:
        macs: the MACs of the stage for one row.
        sizes: of each scale's maps behind the stage.
    """

    sizes: list[Size]

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def _count(self, unit: nn.Module, *sizes: Size) -> Size:
        """Add the MACs of `unit` on maps of `sizes`, and return the size of what comes out."""
        macs, size = count_macs(unit, *sizes)
        self.macs += macs
        return size


class Stage(Counted):
    """A stage is the layers in front of an exit. If it drops a scale, the other scales first lose half of their maps.

    A layer's 1x1 convolutions have at most 2**i channels for each channel that is added, where i counts the scales from
    the finest one that the stage is given, dropped or not. So they are at most 1, 2 and 4 times as wide where three
    scales are kept, 2 and 4 times in a stage that drops the finest, and 1 and 2 times in the stage after it.

    Args:
        sizes: of each scale's maps before the stage, from the finest to the coarsest.
        growth: the channels that a layer adds to each of these scales.
        depth: the number of layers.
        scales: how many scales the stage keeps, the coarsest ones.
    """

    def __init__(self, sizes: list[Size], growth: list[int], depth: int, scales: int) -> None:
        super().__init__()
        self._scales = scales
        dropped = len(sizes) - scales
        sizes, growth, inner = sizes[dropped:], growth[dropped:], [2**i for i in range(len(growth))][dropped:]
        self.squeeze, self.layers = nn.ModuleList(), nn.ModuleList()
        if dropped:
            self.squeeze.extend(Normed(size[0], -(-size[0] // 2), 1) for size in sizes)
            sizes = [self._count(squeeze, size) for squeeze, size in zip(self.squeeze, sizes, strict=True)]
        for _ in range(depth):
            layer, grown = Layer([size[0] for size in sizes], growth, inner), list[Size]()
            self.layers.append(layer)
            for i, size in enumerate(sizes):
                finer = self._count(layer.down[i - 1], grown[-1])[0] if i else 0
                channels, *places = self._count(layer.same[i], size)
                grown.append((size[0] + finer + channels, *places))
            sizes = grown
        self.sizes = sizes

    def forward(self, maps: Maps) -> Maps:
        """Run the stage."""
        maps = maps[len(maps) - self._scales :]
        if len(self.squeeze):
            maps = tuple(squeeze(x) for squeeze, x in zip(self.squeeze, maps, strict=True))
        for layer in self.layers:
            maps = layer(maps)
        return maps


class Scales(Exits):
    """This is the base class of networks with exits that keep maps of several scales, from the finest to the coarsest.

    The stem makes the first maps: each scale is half as large as the next finer one and has twice as many channels. An
    exit sees the coarsest maps: a convolution, of stride 2 on maps of more than 4x4, and one linear layer on 4x4 means.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs.
        scales: how many scales there are at first.
        width: the number of channels of the finest scale before the first layer.
        stem_stride: the stride of the first convolution.
        own: the family's own settings.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], classes: int, scales: int, width: int, stem_stride: int, **own: Any
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        check_count("scales", scales, 2, MOST_SCALES)
        for name, count in (("classes", classes), ("width", width), ("stem_stride", stem_stride)):
            check_count(name, count, 1, MOST_ROWS)
        if len(input_shape) != 3:
            raise ValueError(f"expected images (channels, height, width), got inputs of {tuple(input_shape)}")
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "scales": scales, "width": width,
            "stem_stride": stem_stride, **own,
        }  # fmt: skip
        self.stem, self.stages, self.heads, self.fcs = (nn.ModuleList() for _ in range(4))
        self._stem_macs, size, self._stem_sizes = 0, self.input_shape, list[Size]()
        for scale in range(scales):
            self.stem.append(Normed(size[0], width << scale, 3, 2 if scale else stem_stride))
            macs, size = count_macs(self.stem[-1], size)
            self._stem_macs += macs
            self._stem_sizes.append(size)

    def _pose_exits(self, stages: Iterable[Counted], sees: str) -> None:
        """Set an exit behind each stage; the last is the network's own output."""
        cost, stage_macs, widths = self._stem_macs, list[int](), list[int]()
        for stage in stages:
            coarsest = stage.sizes[-1]
            head = Normed(coarsest[0], self._stem_sizes[-1][0], 3, 2 if max(coarsest[1:]) > CELLS else 1)
            macs, size = count_macs(head, coarsest)
            fc = early_classifier(size, self.config["classes"])
            stage_macs.append(cost + stage.macs + macs + count_macs(fc, (fc.in_features,))[0])
            widths.append(coarsest[0])
            for parts, part in ((self.stages, stage), (self.heads, head), (self.fcs, fc)):
                parts.append(part)
            cost = 0
        self._set_points([f"exit{k}" for k in range(len(widths) - 1)], stage_macs, widths[:-1], sees)

    def _advance_to(self, k: int, x: Tensor | Maps) -> Maps:
        if k:
            return self.stages[k](x)
        maps = [self.stem[0](x)]
        for coarser in self.stem[1:]:
            maps.append(coarser(maps[-1]))
        return self.stages[0](tuple(maps))

    def _exit(self, k: int, x: Maps) -> Tensor:
        return self.fcs[k](early_inputs(self.heads[k](x[-1])))

    def _summary(self, k: int, x: Maps) -> Tensor:
        return summary(x[-1])

    def for_inference(self) -> Self:
        """Return a frozen copy with batch norm and ReLU folded into the convolutions, and maps in channels_last."""
        return folded(super().for_inference())


class MultiScaleNet(Scales):
    """A network that keeps maps of several scales from its first layer on, each half as large as the next finer one.

    An exit sees the coarsest maps, so that an early one has seen the whole image, too: in a ResNet, the first blocks
    have only fine maps. Layers add maps to what there is already. In equal parts of its stages, the network drops its
    finest scale.

    Args:
        input_shape, classes, scales, width, stem_stride: see `Scales`.
        layers: the number of layers in front of each exit; the last exit is the network's own output.
        growth: how many channels a layer adds to the finest scale; each coarser one gets twice as many.
        sees: see `ExitResNet`.

    Source: Multi-Scale Dense Networks for Resource Efficient Image Classification (Huang et al. 2018, ICLR). There, the
    1x1 convolutions of a scale are as wide in all stages, for each channel that is added. Here they become half as wide
    in the stage after one that drops a scale (see `Stage`), and networks that are trained have these widths.
    """

    family = "multi_scale"

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        layers: tuple[int, ...] = (1, 1, 2, 3, 3, 4),
        scales: int = 3,
        width: int = 16,
        growth: int = 8,
        stem_stride: int = 1,
        sees: str = SEES[0],
    ) -> None:
        check_counts("layers", layers)
        check_count("growth", growth, 1, MOST_ROWS)
        super().__init__(input_shape, classes, scales, width, stem_stride, layers=list(layers), growth=growth)
        if len(layers) < scales:
            raise ValueError(f"expected an exit for each of {scales} scales at least, got {len(layers)} exits")
        self._pose_exits(self._make_stages(layers, growth), sees)

    def _make_stages(self, layers: tuple[int, ...], growth: int) -> Iterator[Stage]:
        sizes = self._stem_sizes
        scales = len(sizes)
        for k, depth in enumerate(layers):
            grown = [growth << scale for scale in range(scales - len(sizes), scales)]
            stage = Stage(sizes, grown, depth, scales - k * scales // len(layers))
            sizes = stage.sizes
            yield stage
