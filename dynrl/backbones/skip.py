"""Layer skipping: a residual network whose identity blocks may be left out, row by row (SkipNet, BlockDrop)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import END, Backbone, Point, State, Walk
from dynrl.cost import count_macs
from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.gated_residual import ResidualBlock, gated_residual
from dynrl.ops.pooled import pooled


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class _Block(nn.Module):
    """What basic blocks and bottlenecks share: a branch of convolutions beside an identity or a projection."""

    expansion: ClassVar[int]

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        width_out = width * self.expansion
        self.downsample: nn.Sequential | None = None
        if stride != 1 or width_in != width_out:
            self.downsample = nn.Sequential(_conv(width_in, width_out, 1, stride), nn.BatchNorm2d(width_out))

    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """The branch's convolutions, each with its batch norm."""
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in (1, 2, 3) if hasattr(self, f"conv{i}")]

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the identity: the convolutions with batch norm, and ReLU after each but the last."""
        *first, (convolution, norm) = self.layers()
        for inner, inner_norm in first:
            x = F.relu(inner_norm(inner(x)), inplace=True)
        return norm(convolution(x))

    def folded(self) -> ResidualBlock:
        """A frozen copy for inference."""
        projection = None
        if self.downsample is not None:
            projection = FoldedConv2d.of(*self.downsample.children())  # type: ignore[arg-type]
        return ResidualBlock([FoldedConv2d.of(*layer) for layer in self.layers()], projection)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(self.branch(x).add_(identity), inplace=True)


class BasicBlock(_Block):
    """Two 3x3 convolutions (He et al. 2016, CVPR, figure 5 left), under torchvision's parameter names."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__(width_in, width, stride)
        self.conv1, self.bn1 = _conv(width_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)


class Bottleneck(_Block):
    """1x1, 3x3 (with the stride, as torchvision has it), 1x1 (He et al. 2016, figure 5 right)."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__(width_in, width, stride)
        self.conv1, self.bn1 = _conv(width_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)


BLOCKS: dict[str, type[_Block]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class GatedResNet(Backbone):
    """A ResNet whose identity blocks are decision points: action 1 runs the block, 0 hands the row through.

    Blocks that change the shape have no identity to fall back on: they always run and are the floor of the cost.
    Parameters carry torchvision's names, so the state_dict of a torchvision ResNet of the same shape loads
    unchanged, and the full route is that network.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: outputs of the last layer.
        block: "basic" or "bottleneck".
        layers: blocks a stage; every stage but the first halves height and width.
        widths: channels a stage (before a bottleneck's expansion by 4).
        stem: "cifar" (3x3) or "imagenet" (7x7 of stride 2, then max pooling of stride 2).
        stem_stride: stride of the "cifar" stem.

    Example: torchvision's ResNet-50 is `GatedResNet((3, 224, 224), 1000, "bottleneck", (3, 4, 6, 3),
    (64, 128, 256, 512), stem="imagenet")`.
    """

    family = "gated_resnet"
    decision = "skip"

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        block: str = "basic",
        layers: tuple[int, ...] = (3, 4, 4),
        widths: tuple[int, ...] = (16, 32, 64),
        stem: str = "cifar",
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"unknown block {block!r}; expected one of {sorted(BLOCKS)}")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"unknown stem {stem!r}; expected 'cifar' or 'imagenet'")
        if len(layers) != len(widths):
            raise ValueError(f"expected one width a stage, got {len(layers)} stages and {len(widths)} widths")
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "block": block, "layers": list(layers),
            "widths": list(widths), "stem": stem, "stem_stride": stem_stride,
        }  # fmt: skip
        kernel, stride = (3, stem_stride) if stem == "cifar" else (7, 2)
        self.conv1 = _conv(input_shape[0], widths[0], kernel, stride)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        make, width = BLOCKS[block], widths[0]
        for stage, (depth, planes) in enumerate(zip(layers, widths, strict=True), start=1):
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(make(width, planes, stride=2 if stage > 1 and i == 0 else 1))
                width = planes * make.expansion
            self.add_module(f"layer{stage}", blocks)
        self.fc = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._measure()

    def _stages(self) -> list[tuple[str, _Block]]:
        """All blocks with their names, in order."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, _Block)]

    def _measure(self) -> None:
        """Split the blocks into gated ones and the fixed ones after each, and count what each costs."""
        cost, shape = count_macs(nn.Sequential(self.conv1, self.bn1, self.maxpool), self.input_shape)
        self._lead: list[nn.Module] = []  # the fixed blocks before the first point
        self._gates: list[nn.Module] = []
        self._fixed: list[list[nn.Module]] = []  # the fixed blocks after each point
        names, gate_macs, fixed_macs = [], [], [cost]
        self.feature_width = 1
        for name, block in self._stages():
            macs, shape_out = count_macs(block, shape)
            if block.downsample is None:
                names.append(name)
                self._gates.append(block)
                self._fixed.append([])
                gate_macs.append(macs)
                fixed_macs.append(0)
                self.feature_width = max(self.feature_width, shape[0])
            else:
                (self._fixed[-1] if self._fixed else self._lead).append(block)
                fixed_macs[-1] += macs
            shape = shape_out
        if not names:
            raise ValueError("no block of this network has an identity to fall back on; add blocks to a stage")
        fixed_macs[-1] += count_macs(self.fc, (shape[0],))[0]
        self.points = tuple(Point(name, 2) for name in names)
        self.max_steps = len(names)
        self.full_route = (1,) * len(names)
        self._set_costs(
            fixed_macs[0], [[fixed, gate + fixed] for gate, fixed in zip(gate_macs, fixed_macs[1:], strict=True)]
        )

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, self._stem(inputs))

    def _stem(self, x: Tensor) -> Tensor:
        if isinstance(self.conv1, FoldedConv2d):
            x = self.maxpool(self.conv1(x, relu=True))
        else:
            x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for block in self._lead:
            x = block(x)
        return x

    def _run(self, state: State, action: Tensor) -> list[State]:
        assert state.features is not None
        return [self._go_on(state, gated_residual(state.features, action, self._gates[state.point]))]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        x, block = state.features, self._gates[state.point]
        assert x is not None
        keep, run = (gates[:, choice].view(-1, 1, 1, 1) for choice in (0, 1))
        # A folded block overwrites what it is given.
        return self._go_on(state, run * block(x.clone() if isinstance(block, ResidualBlock) else x) + keep * x)

    def _go_on(self, state: State, x: Tensor) -> State:
        """From behind the gated block to the next point or the end."""
        for block in self._fixed[state.point]:
            x = block(x)
        if state.point + 1 < len(self.points):
            return State(state.walk, state.point + 1, state.rows, x)
        state.walk.put_output(state.rows, self._head(x))
        return State(state.walk, END, state.rows, None)

    def _head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def observe(self, state: State) -> Tensor:
        """Each channel's mean over the map."""
        assert state.features is not None
        return pooled(state.features)

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Each gated block on the first rows of the batch, as many as chose it; see `Backbone.ideal`."""
        counts = (route == 1).sum(0).tolist()

        def run() -> Tensor:
            x = self._stem(inputs)
            for count, block, fixed in zip(counts, self._gates, self._fixed, strict=True):
                if count:
                    block(x[:count])
                for after in fixed:
                    x = after(x)
            return self._head(x)

        return run

    def for_inference(self) -> GatedResNet:
        """A frozen copy with batch norm, ReLU and residual folded into the convolutions, its maps in channels_last:
        here the faster memory format, dense and routed (measured on a CPU: 1.0 to 1.15 times).
        """
        twin = copy.deepcopy(self).eval().requires_grad_(False)
        twin.conv1 = FoldedConv2d.of(twin.conv1, twin.bn1)
        twin.bn1 = nn.Identity()  # type: ignore[assignment]
        folded: dict[nn.Module, nn.Module] = {}
        for name, block in twin._stages():
            folded[block] = block.folded()
            twin.set_submodule(name, folded[block])
        twin._lead = [folded[block] for block in twin._lead]
        twin._gates = [folded[block] for block in twin._gates]
        twin._fixed = [[folded[block] for block in blocks] for blocks in twin._fixed]
        return twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
