"""Residual networks without decisions have a stem and stages of blocks, under torchvision's parameter names."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Backbone
from dynrl.backbones.layers import ACTIVATIONS, ATTENTIONS, KERNELS, PLAIN, GivenConv2d, Kinds, convolution
from dynrl.cost import count_macs
from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.gated_residual import ResidualBlock
from dynrl.schema import MOST_ROWS, check_count, check_counts, check_one_of

M = TypeVar("M", bound=nn.Module)


class Normed(nn.Module):
    """A convolution with batch norm behind it, and with ReLU unless it is left out."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv, self.relu = convolution(inputs, outputs, kernel, stride), relu
        self.bn: nn.Module = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, K, P, Q]."""
        if isinstance(self.conv, FoldedConv2d):
            return self.conv(x, relu=self.relu)
        x = self.bn(self.conv(x))
        return F.relu(x, inplace=True) if self.relu else x


def folded(network: M) -> M:
    """Fold the batch norm of each `Normed` of a network into its convolution, and return it in channels_last."""
    for layer in network.modules():
        if isinstance(layer, Normed):
            layer.conv, layer.bn = FoldedConv2d.of(layer.conv, layer.bn), nn.Identity()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Block(nn.Module):
    """A block has a branch of convolutions and a shortcut, which is an identity or a projection.

    Attributes:
        kinds: the kinds of layers in the branch.
    """

    expansion: ClassVar[int]

    def __init__(self, width_in: int, width: int, stride: int, kinds: Kinds = PLAIN) -> None:
        super().__init__()
        self.kinds = kinds
        width_out = width * self.expansion
        self.downsample: nn.Sequential | None = None
        if stride != 1 or width_in != width_out:
            self.downsample = nn.Sequential(convolution(width_in, width_out, 1, stride), nn.BatchNorm2d(width_out))

    def _set_branch(self, *shapes: tuple[int, int, int, int]) -> None:
        """Make the branch of convolutions, each of (inputs, outputs, kernel, stride)."""
        for i, shape in enumerate(shapes, start=1):
            self.add_module(f"conv{i}", KERNELS[self.kinds.kernels](*shape))
            self.add_module(f"bn{i}", nn.BatchNorm2d(shape[1]))
        self.activations = nn.ModuleList(ACTIVATIONS[self.kinds.activation](outputs) for _, outputs, *_ in shapes[:-1])
        self.attention = ATTENTIONS[self.kinds.attention](shapes[-1][1])

    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """Return the branch's convolutions, each with its batch norm."""
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in (1, 2, 3) if hasattr(self, f"conv{i}")]

    def check_plain(self) -> None:
        """Refuse, with a ValueError, a block that is not plain, for families that run blocks in parts."""
        if self.kinds.changed:
            raise ValueError(f"expected plain blocks, which run in parts, too; got {self.kinds.changed}")

    def branch(self, x: Tensor) -> Tensor:
        """Run the branch: convolutions with batch norm, an activation after all but the last, and attention."""
        *first, (last, last_norm) = self.layers()
        for (inner, inner_norm), activation in zip(first, self.activations, strict=True):
            x = activation(inner_norm(inner(x)))
        weighed: Tensor = self.attention(last_norm(last(x)))
        return weighed

    def folded(self) -> nn.Module:
        """Return a frozen copy for inference; a block that is not plain is returned as it is."""
        if self.kinds != PLAIN:
            return self
        projection = None
        if self.downsample is not None:
            projection = FoldedConv2d.of(*self.downsample.children())  # type: ignore[arg-type]
        return ResidualBlock([FoldedConv2d.of(*layer) for layer in self.layers()], projection)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        if not torch.is_grad_enabled():
            return self.downsample(x)
        # oneDNN's backward of a strided 1x1 convolution writes beyond its buffers for few rows, odd in number (torch
        # 2.13), and crashes after some hundred calls. So the map is sliced, and the convolution has stride 1.
        convolution, norm = self.downsample.children()
        assert isinstance(convolution, nn.Conv2d)
        stride = convolution.stride[0]
        return norm(F.conv2d(x[:, :, ::stride, ::stride], convolution.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block, [n, C, H, W] to [n, K, P, Q]."""
        return F.relu(self.branch(x).add_(self._shortcut(x)), inplace=True)


class BasicBlock(Block):
    """A basic block has two 3x3 convolutions (He et al. 2016, CVPR, figure 5 left), under torchvision's names."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int = 1, kinds: Kinds = PLAIN) -> None:
        super().__init__(width_in, width, stride, kinds)
        self._set_branch((width_in, width, 3, stride), (width, width, 3, 1))


class Bottleneck(Block):
    """A bottleneck has 1x1, 3x3 and 1x1 convolutions (He et al. 2016, figure 5 right); the 3x3 has the stride."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int = 1, kinds: Kinds = PLAIN) -> None:
        super().__init__(width_in, width, stride, kinds)
        self._set_branch((width_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))


BLOCKS: dict[str, type[Block]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(Backbone):
    """A residual network without decisions; a family adds them.

    Parameters have torchvision's names, so the state_dict of a torchvision ResNet of the same shape fits.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs of the last layer.
        block: "basic" or "bottleneck".
        layers: the number of blocks of each stage; every stage but the first halves height and width.
        widths: the number of channels of each stage, before a bottleneck's expansion by 4.
        stem: "cifar" (3x3) or "imagenet" (7x7 of stride 2, then max pooling of stride 2).
        stem_stride: the stride of the "cifar" stem.
        attention: what weighs the channels of a block's result: "none", or "squeeze" (`SqueezeExcitation`).
        activation: what is between a block's convolutions: "relu", or "dynamic" (`DynamicReLU`).
        kernels: a block's convolutions: "fixed"; or for each row its own, "mixed" (`MixedConv2d`) or "predicted"
            (`PredictedConv2d`).
        factors: the number of the input's last channels that hold a factor (a scale, a task, a style), each the same
            number in all places. The weights of the first convolution are predicted from it (`GivenConv2d`). 0 if all
            channels are the image's.

    Example: the shape of torchvision's ResNet-50 is `(3, 224, 224), 1000, "bottleneck", (3, 4, 6, 3),
    (64, 128, 256, 512), stem="imagenet"`.
    """

    _skippable: list[int]  # the places of the blocks that are decision points, once `_identities` has found them

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        block: str = "basic",
        layers: tuple[int, ...] = (3, 4, 4),
        widths: tuple[int, ...] = (16, 32, 64),
        stem: str = "cifar",
        stem_stride: int = 1,
        attention: str = "none",
        activation: str = "relu",
        kernels: str = "fixed",
        factors: int = 0,
    ) -> None:
        super().__init__()
        kinds = Kinds(attention, activation, kernels)
        check_one_of("block", block, BLOCKS)
        check_one_of("stem", stem, ("cifar", "imagenet"))
        check_counts("input_shape", input_shape)
        check_count("classes", classes, 1, MOST_ROWS)
        check_counts("layers", layers)
        check_counts("widths", widths)
        check_count("stem_stride", stem_stride, 1, MOST_ROWS)
        check_count("factors", factors, 0, input_shape[0])
        if len(layers) != len(widths):
            raise ValueError(f"expected one width a stage, got {len(layers)} stages and {len(widths)} widths")
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "block": block, "layers": list(layers),
            "widths": list(widths), "stem": stem, "stem_stride": stem_stride, **kinds.changed,
            **({"factors": factors} if factors else {}),
        }  # fmt: skip
        if kinds != PLAIN or factors:  # kernels of dynrl do not run such blocks
            self.captures = tuple(way for way in self.captures if way != "kernels")  # type: ignore[misc]
        if kinds.kernels != PLAIN.kernels or factors:  # the number of rows is that of a convolution's groups
            self.exports = False  # type: ignore[misc]
        kernel, stride = (3, stem_stride) if stem == "cifar" else (7, 2)
        first = (input_shape[0], widths[0], kernel, stride)
        self.conv1: nn.Module = GivenConv2d(*first, factors) if factors else convolution(*first)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        make, width = BLOCKS[block], widths[0]
        for stage, (depth, planes) in enumerate(zip(layers, widths, strict=True), start=1):
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(make(width, planes, 2 if stage > 1 and i == 0 else 1, kinds))
                width = planes * make.expansion
            self.add_module(f"layer{stage}", blocks)
        self.fc = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._names = [f"layer{s}.{i}" for s, depth in enumerate(layers, start=1) for i in range(depth)]
        self._blocks: list[Any] = [self.get_submodule(name) for name in self._names]  # for speed

    @classmethod
    def from_module(cls, module: nn.Module, input_shape: tuple[int, int, int], **settings: Any) -> Self:
        """Build the backbone from a ResNet of torchvision or timm, or from another one with torchvision's names.

        The full route computes the same as `module` in eval mode. This is checked on random inputs.

        Args:
            module: the ResNet; it is copied.
            input_shape: the shape of one input.
            settings: the arguments of the family other than a ResNet's shape (`exits`, `shares`, `grid`).

        Raises:
            ValueError: the layers, names or outputs are not those of a ResNet.
        """
        kind, state = type(module).__name__, module.state_dict()
        try:
            stages = [stage for name, stage in module.named_children() if name.startswith("layer")]
            first: Any = [stage[0] for stage in stages]  # type: ignore[index]
            stem: Any = module.conv1
            settings = {
                "block": "bottleneck" if hasattr(first[0], "conv3") else "basic",
                "layers": tuple(len(stage) for stage in stages),  # type: ignore[arg-type]
                "widths": tuple(block.conv1.out_channels for block in first),
                "stem": "imagenet" if stem.kernel_size == (7, 7) else "cifar",
                "stem_stride": 1 if stem.kernel_size == (7, 7) else stem.stride[0],
                "classes": len(state["fc.bias"]),
                **settings,
            }
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{kind} is no ResNet with torchvision's names ({error}); see SkipModule") from None
        backbone = cls(input_shape, **settings)
        try:
            left_out, unknown = backbone.load_state_dict(backbone._renamed(state), strict=False)
        except RuntimeError as error:
            raise ValueError(f"{kind} has other shapes than a ResNet of {settings}: {error}; see SkipModule") from None
        left_out = [name for name in left_out if not name.startswith(("heads.", "scorers."))]
        if left_out or unknown:
            raise ValueError(f"{kind} is no plain ResNet: it lacks {left_out} and has {unknown}; see SkipModule")
        backbone.eval().to(next(module.parameters()))
        twin, inputs = copy.deepcopy(module).eval(), torch.randn(2, *input_shape).to(next(module.parameters()))
        with torch.no_grad():
            expected, got = twin(inputs), backbone(inputs)
        if expected.shape != got.shape or not torch.allclose(
            expected, got, rtol=1e-3, atol=1e-3 * expected.abs().max()
        ):
            raise ValueError(f"{kind} has a ResNet's weights, but computes something else with them; see SkipModule")
        return backbone

    def _renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the `state` of a plain ResNet under this family's names."""
        return state

    def _identities(self) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
        """Find the blocks with an identity for a shortcut, which are decision points.

        Returns:
            the shape of what each of them is given, the MACs of each, and the MACs before the first and behind each.

        Raises:
            ValueError: there is none.
        """
        self._skippable = [i for i, block in enumerate(self._blocks) if block.downsample is None]
        if not self._skippable:
            raise ValueError("no block of this network has an identity to fall back on; add blocks to a stage")
        cost, shape = count_macs(nn.Sequential(self.conv1, self.bn1, self.maxpool), self.input_shape)
        shapes, block_macs, fixed_macs = [], [], [cost]
        for block in self._blocks:
            macs, shape_out = count_macs(block, shape)
            if block.downsample is None:
                shapes.append(shape)
                block_macs.append(macs)
                fixed_macs.append(0)
            else:
                fixed_macs[-1] += macs
            shape = shape_out
        fixed_macs[-1] += count_macs(self.fc, (shape[0],))[0]
        return shapes, block_macs, fixed_macs

    def _between(self, point: int, x: Tensor) -> Tensor:
        """Run what lies behind the block of `point` (-1: all before the first one), up to the next or to the output."""
        x = self._stem(x) if point < 0 else x
        ends = [-1, *self._skippable, len(self._blocks)]
        for block in self._blocks[ends[point + 1] + 1 : ends[point + 2]]:
            x = block(x)
        return x if point + 1 < len(self.points) else self._head(x)

    def _stem(self, x: Tensor) -> Tensor:
        if isinstance(self.conv1, FoldedConv2d):
            return self.maxpool(self.conv1(x, relu=True))
        return self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))

    def _head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def whole(self, inputs: Tensor) -> Tensor:
        """Return the outputs of all blocks one after the other."""
        x = self._stem(inputs)
        for block in self._blocks:
            x = block(x)
        return self._head(x)

    def for_inference(self) -> Self:
        """Return a frozen copy with batch norm, ReLU and residual folded into the convolutions.

        Its maps are in channels_last, which is the faster memory format here, for dense and routed walks.
        """
        twin = super().for_inference()
        if isinstance(twin.conv1, nn.Conv2d):  # weights that are predicted cannot be folded
            twin.conv1 = FoldedConv2d.of(twin.conv1, twin.bn1)
            twin.bn1 = nn.Identity()  # type: ignore[assignment]
        for i, (name, block) in enumerate(zip(twin._names, twin._blocks, strict=True)):
            if isinstance(block, Block):  # other blocks are already folded
                twin._blocks[i] = block.folded()
                twin.set_submodule(name, twin._blocks[i])
        return twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
