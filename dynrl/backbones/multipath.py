"""In a multi-path network, residual blocks are split along their width into paths, each of which runs or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.early import SCORES, SeenEnd
from dynrl.backbones.resnet import Normed, folded
from dynrl.backbones.skip import Skipping
from dynrl.backbones.walk import State
from dynrl.cost import count_macs
from dynrl.ops.move import add_rows, keep_rows
from dynrl.ops.pooled import summary
from dynrl.schema import MOST_ROWS, check_count, check_counts

RUN = 1
MOST_PATHS = 4

Features = tuple[Tensor, Tensor]  # a block's input, and its sum so far


class MultiPath(nn.Module):
    """A residual block whose two 3x3 convolutions are split along the width between them.

    Args:
        width_in, width_out: the channels of what comes in and of what goes out.
        stride: of each path's first convolution.
        paths: the number of paths.

    Attributes:
        shortcut: what the sum of the paths begins with; None for the input itself.
        paths: each maps [n, width_in, H, W] to [n, width_out, P, Q].
    """

    def __init__(self, width_in: int, width_out: int, stride: int, paths: int) -> None:
        super().__init__()
        changes, inner = stride != 1 or width_in != width_out, width_out // paths
        self.shortcut = Normed(width_in, width_out, 1, stride, relu=False) if changes else None
        self.paths = nn.ModuleList(
            nn.Sequential(Normed(width_in, inner, 3, stride), Normed(inner, width_out, 3, relu=False))
            for _ in range(paths)
        )


class MultiPathResNet(SeenEnd, Skipping):
    """A ResNet whose blocks are split along their width into paths; each path of each block is a decision point.

    A path sees the block's input, and its result is added to the block's sum. The sum begins with the shortcut, which
    always runs. So blocks that change the shape are points, too. A route that leaves a block's paths out leaves its
    shortcut. Each path has its own batch norms. All paths together cost what the plain block does.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs.
        layers: the number of blocks of each stage; every stage but the first halves height and width.
        widths: the number of channels of each stage.
        paths: the number of paths of a block, 2 to 4, which divides all widths.
        stem_stride: the stride of the first convolution.

    Source: Dynamic Multi-path Neural Network (Su et al. 2019).
    """

    family = "multi_path_resnet"
    captures: ClassVar[tuple[str, ...]] = ()  # the rows of a path are added to a sum, which must not happen twice

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        layers: tuple[int, ...] = (3, 4, 4),
        widths: tuple[int, ...] = (16, 32, 64),
        paths: int = 2,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        check_counts("layers", layers)
        check_counts("widths", widths)
        for name, count, least, limit in (
            ("classes", classes, 1, MOST_ROWS), ("stem_stride", stem_stride, 1, MOST_ROWS),
            ("paths", paths, 2, MOST_PATHS + 1),
        ):  # fmt: skip
            check_count(name, count, least, limit)
        if len(input_shape) != 3 or len(layers) != len(widths) or any(width % paths for width in widths):
            raise ValueError(
                f"expected images (channels, height, width) and a width that {paths} paths divide for each of "
                f"{len(layers)} stages, got inputs of {tuple(input_shape)} and widths {tuple(widths)}"
            )
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "layers": list(layers), "widths": list(widths),
            "paths": paths, "stem_stride": stem_stride,
        }  # fmt: skip
        self._paths = paths
        self.stem, self.blocks = Normed(input_shape[0], widths[0], 3, stem_stride), nn.ModuleList()
        cost, size = count_macs(self.stem, self.input_shape)
        names, path_macs, fixed_macs = list[str](), list[int](), [cost]
        for stage, (depth, width) in enumerate(zip(layers, widths, strict=True), start=1):
            for i in range(depth):
                block = MultiPath(size[0], width, 2 if stage > 1 and i == 0 else 1, paths)
                self.blocks.append(block)
                if block.shortcut is not None:
                    fixed_macs[-1] += count_macs(block.shortcut, size)[0]
                names += [f"layer{stage}.{i}.path{k}" for k in range(paths)]
                path_macs += [count_macs(path, size)[0] for path in block.paths]
                fixed_macs += [0] * paths
                size = count_macs(block.paths[0], size)[1]
        self.fc = nn.Linear(size[0], classes)
        fixed_macs[-1] += count_macs(self.fc, (size[0],))[0]
        self._set_points(names, path_macs, self._see_end(fixed_macs), paths - 1 + SCORES + max(widths))

    def _enter(self, block: int, x: Tensor) -> Features:
        """Return the features in front of the first path of a block whose input is `x`."""
        shortcut: Any = self.blocks[block].shortcut
        return x, x.clone() if shortcut is None else shortcut(x)  # the sum is overwritten, the input is not

    def _path(self, point: int) -> Callable[[Tensor], Tensor]:
        block, path = divmod(point, self._paths)
        paths: Any = self.blocks[block].paths
        return paths[path]

    def _lead(self, inputs: Tensor) -> Features:
        return self._enter(0, self.stem(inputs))

    def _block(self, point: int) -> Callable[[Features], Features]:
        def add(features: Features) -> Features:
            x, total = features
            return x, total + self._path(point)(x)

        return add

    def _follow(self, point: int, features: Features) -> Features | Tensor:
        block, path = divmod(point, self._paths)
        if path + 1 < self._paths:
            return features
        x = F.relu(features[1])
        return self._enter(block + 1, x) if block + 1 < len(self.blocks) else self.fc(x.mean((2, 3)))

    def _run(self, state: State, action: Tensor) -> list[State]:
        x, total = state.features
        kept = keep_rows(action == RUN, torch.arange(x.shape[0], device=x.device), x)
        if kept is not None:
            index, rows = kept
            total = add_rows(total, index, self._path(state.point)(rows))
        return [self._go_on(state, (x, total))]

    def observe(self, state: State) -> Tensor:
        """Return which of the block's other paths ran so far, how sure the last layer is, and each channel's mean.

        Means are taken over what the block would return if none of its paths were to run from here on.
        """
        path = state.point % self._paths
        ran = state.get(state.walk.route)[:, state.point - path : state.point] == RUN
        sure = self._with_end(state.point, summary(F.relu(state.features[1])))
        return torch.cat([F.pad(ran.float(), (0, self._paths - 1 - path)), sure], 1)

    def for_inference(self) -> Self:
        """Return a frozen copy with batch norm and ReLU folded into the convolutions, and maps in channels_last."""
        return folded(super().for_inference())
