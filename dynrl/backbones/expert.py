"""Each layer of this residual network has experts of unequal size, and each image takes one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Backbone
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.cost import count_macs
from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.routed_experts import ExpertLayer, routed_experts_macs
from dynrl.schema import MOST_ROWS, check_count, check_counts


class Convolution(nn.Module):
    """This is a convolution with batch norm and, if `relu`, ReLU; its padding keeps the size of the map."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, relu: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.norm: nn.BatchNorm2d | None = nn.BatchNorm2d(outputs)
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def fold(self) -> None:
        """Fold the batch norm into the weights."""
        self.conv, self.norm = FoldedConv2d.of(self.conv, self.norm), None

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, H, W] to [n, outputs, P, Q]."""
        if isinstance(self.conv, FoldedConv2d):
            return self.conv(x, relu=self.relu)
        assert self.norm is not None
        x = self.norm(self.conv(x))
        return F.relu(x, inplace=True) if self.relu else x


class _Layer(ExpertLayer):
    """A layer has a depthwise convolution that all images run, and experts, of which each image takes one."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        mix = Convolution(channels, channels, groups=channels)  # made first, or seeds would give other weights
        mix.conv.weight.data[:, :, 1, 1] += 1  # it starts near the identity
        super().__init__(channels, widths)
        self.mix = mix


class ExpertNet(Backbone):
    """A convolutional network whose pointwise layers have several experts: action e takes expert e.

    The network begins with two convolutions of stride 2. Each layer has a depthwise convolution over the map, which all
    images run, and experts. An expert is two products with ReLU between them at each position of the map, and its
    result is added to its input. The mean over the map and a linear layer end the network. Batch norm follows every
    convolution, so that experts get inputs of one scale, whatever ran before. An expert of width 0 passes the image
    through.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs of the last layer.
        stem: the number of channels of the first convolution.
        channels: the number of channels of the map behind the stem and behind each layer.
        layers: the number of layers.
        widths: the hidden units of a layer's experts, from narrow to wide. The full route always takes the last one.

    Raises:
        ValueError: there is no layer, there are fewer than two experts, or widths fall or are negative.

    The sources are mixtures of experts (Shazeer et al. 2017, ICLR) with one choice a layer and row (Switch, Fedus et
    al. 2022, JMLR), taken for the whole image (Kudugunta et al. 2021, EMNLP Findings, take one for a whole task). The
    blocks of a depthwise convolution and a pointwise network are those of ConvNeXt (Liu et al. 2022, CVPR).
    """

    family = "expert_net"
    decision = "expert"
    captures: ClassVar[tuple[str, ...]] = ("kernels",)

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        stem: int = 32,
        channels: int = 128,
        layers: int = 4,
        widths: tuple[int, ...] = (0, 64, 128, 128, 256, 512),
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"expected at least one layer, got {layers}")
        if len(widths) < 2 or min(widths) < 0 or list(widths) != sorted(widths):
            raise ValueError(f"expected the widths of at least two experts, from narrow to wide, got {tuple(widths)}")
        check_counts("input_shape", input_shape)
        check_counts("widths", widths, least=0)
        for name, count in (("classes", classes), ("stem", stem), ("channels", channels), ("layers", layers)):
            check_count(name, count, 1, MOST_ROWS)
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "stem": stem, "channels": channels,
            "layers": layers, "widths": list(widths),
        }  # fmt: skip
        self.widths = tuple(widths)
        self.stem = nn.Sequential(
            Convolution(input_shape[0], stem, stride=2, relu=True),
            Convolution(stem, channels, stride=2, relu=True),
        )
        self.layers = nn.ModuleList(_Layer(channels, self.widths) for _ in range(layers))
        self.fc = nn.Linear(channels, classes)
        start, shape = count_macs(self.stem, self.input_shape)
        experts = [routed_experts_macs(shape[1] * shape[2], channels, width) for width in widths]
        mix, head = count_macs(self._layers[0].mix, shape)[0], count_macs(self.fc, (channels,))[0]
        after = [mix] * (layers - 1) + [head]
        self._pose(
            [Point(f"layer{i}", len(widths)) for i in range(1, layers + 1)],
            costs=[[macs + fixed for macs in experts] for fixed in after],
            start_macs=start + mix,
            full_route=(len(widths) - 1,) * layers,
            feature_width=channels,
        )

    @property
    def _layers(self) -> list[_Layer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, self._layers[0].mix(self.stem(inputs)))

    def _run(self, state: State, action: Tensor) -> list[State]:
        x = self.layers[state.point](state.features.permute(0, 2, 3, 1), action)
        return [self._go_on(state, x.permute(0, 3, 1, 2))]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        x = self._layers[state.point].weighted(state.features.permute(0, 2, 3, 1), gates)
        return self._go_on(state, x.permute(0, 3, 1, 2))

    def _go_on(self, state: State, x: Tensor) -> State:
        """Continue from behind the experts to the next point or the end."""
        following = state.point + 1
        if following < len(self.points):
            return State(state.walk, following, state.rows, self._layers[following].mix(x))
        state.walk.put_output(state.rows, self._head(x))
        return State(state.walk, END, state.rows)

    def _head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def observe(self, state: State) -> Tensor:
        """Return the mean of each channel over the map."""
        return state.features.mean((2, 3)).float()

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each expert runs on neighbouring rows of the batch, as many as chose it."""
        counts = [torch.bincount(chosen, minlength=self.num_choices).tolist() for chosen in route.t()]

        def run() -> Tensor:
            x = self.stem(inputs)
            for layer, sizes in zip(self._layers, counts, strict=True):
                x = layer.mix(x)
                parts = x.permute(0, 2, 3, 1).split(sizes)
                for expert, width, part in zip(layer.experts(), self.widths, parts, strict=True):
                    if width and len(part):
                        expert(part)
            return self._head(x)

        return run

    def for_inference(self) -> Self:
        """Return a frozen copy with batch norm and ReLU folded into the convolutions, its maps in channels_last."""
        twin = super().for_inference()
        for module in twin.modules():
            if isinstance(module, Convolution):
                module.fold()
            elif isinstance(module, _Layer):
                module.freeze()
        return twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
