"""Layers whose numbers depend on each row: all cost the same, so nothing is decided, but each row differs.

All of them look at the mean of each channel of a map [n, C, H, W], but `GivenConv2d` at a factor that comes with it. A
row's result depends on that row only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.cost import FORMULAS
from dynrl.schema import check_known

PREDICTING = 32  # units between the two linear layers that predict weights from a given factor
LEAST = 4  # units between two linear layers: with one or two, all of them may never be above 0


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Make a convolution without bias, padded so that the map keeps its size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class SqueezeExcitation(nn.Module):
    """Each channel is weighed by a number between 0 and 1, which two linear layers make of all channels' means.

    Args:
        channels: the channels of the map; a quarter of them are between the two layers, at least 4.

    Source: Squeeze-and-Excitation Networks (Hu et al. 2018, CVPR, section 3).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(LEAST, channels // 4)
        self.first, self.second = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, C, H, W]."""
        weight = torch.sigmoid(self.second(F.relu(self.first(x.mean((2, 3))))))
        return x * weight.unsqueeze(2).unsqueeze(3)


class DynamicReLU(nn.Module):
    """Each channel x becomes the larger of two lines, a x + b, whose numbers two linear layers make of all means.

    Untrained, the lines lie around those of ReLU, x and 0: a may differ from theirs by 1, and b by 1/2.

    Args:
        channels: the channels of the map; an eighth of them are between the two layers, at least 4.

    Source: Dynamic ReLU (Chen et al. 2020, ECCV, section 3, DY-ReLU-B with K = 2).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(LEAST, channels // 8)
        self.first, self.second = nn.Linear(channels, inner), nn.Linear(inner, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, C, H, W]."""
        shift = 2 * torch.sigmoid(self.second(F.relu(self.first(x.mean((2, 3)))))) - 1
        rise, other, lift, second = shift.view(len(shift), 4, -1, 1, 1).unbind(1)
        return torch.maximum((1 + rise) * x + lift / 2, other * x + second / 2)


class _RowConv2d(nn.Module):
    """A convolution without bias whose weights are mixed of some kernels for each row.

    It is padded so that the map keeps its size at stride 1.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, kernels: int) -> None:
        super().__init__()
        self.out_channels, self.kernel, self.stride = outputs, kernel, stride
        # A kernel is a row: four dimensions would be a map to torch, whose memory format may change.
        made = [torch.empty(outputs, inputs, kernel, kernel) for _ in range(kernels)]
        for each in made:
            nn.init.kaiming_normal_(each, mode="fan_out", nonlinearity="relu")
        self.weight = nn.Parameter(torch.stack(made).flatten(1))

    def mixed(self, means: Tensor) -> Tensor:
        """Mix the kernels for rows whose channels have `means` [n, C]: [n, K * C * R * R]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, K, P, Q]."""
        return _by_rows(x, self.mixed(x.mean((2, 3))), self.out_channels, self.kernel, self.stride)


def _by_rows(x: Tensor, weight: Tensor, outputs: int, kernel: int, stride: int) -> Tensor:
    """Convolve each row of `x` by its own `weight` [n, K * C * R * R]: one convolution whose groups are the rows."""
    rows, channels = x.shape[:2]
    # The rows' channels lie one behind the other, as if they were those of one image.
    image, weight = x.reshape(1, -1, *x.shape[2:]), weight.view(rows * outputs, channels, kernel, kernel)
    y = F.conv2d(image, weight, None, stride, kernel // 2, groups=rows)
    return y.view(rows, outputs, *y.shape[2:])


class MixedConv2d(_RowConv2d):
    """A convolution whose weights are a sum of some kernels; how much each counts, a linear layer says for each row.

    Args:
        inputs, outputs, kernel, stride: the shape of the convolution.
        kernels: the number of kernels.

    Source: CondConv (Yang et al. 2019, NeurIPS, section 3).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, kernels: int = 4) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernels)
        self.router = nn.Linear(inputs, kernels)

    def mixed(self, means: Tensor) -> Tensor:
        """Mix the kernels by the sigmoids of the router's numbers."""
        return torch.sigmoid(self.router(means)) @ self.weight


class PredictedConv2d(_RowConv2d):
    """A convolution whose every filter is a sum of two kernels by numbers of its own, predicted for each row.

    Two linear layers and a sigmoid make these numbers, two for each filter.

    Args:
        inputs, outputs, kernel, stride: the shape of the convolution.

    Source: WeightNet (Ma et al. 2020, ECCV, section 3, with M = 2 and G = 1).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernels=2)
        inner = max(16, inputs // 16)
        self.first, self.second = nn.Linear(inputs, inner), nn.Linear(inner, 2 * outputs)

    def mixed(self, means: Tensor) -> Tensor:
        """Mix each filter's two kernels: a linear layer in groups, one a filter."""
        numbers = torch.sigmoid(self.second(self.first(means))).unsqueeze(2)
        return F.conv1d(numbers, self.weight.t().unsqueeze(2), groups=self.out_channels).squeeze(2)


class GivenConv2d(nn.Module):
    """A convolution whose weights two linear layers predict for each row from a factor that comes with the input.

    The factor (a scale, a task, a style) is in the last channels of the input. Each of them holds one number in all
    places. Convolved are the channels before them. Untrained, the weights differ little from factor to factor.

    Args:
        inputs, outputs, kernel, stride: the shape of the convolution; `inputs` counts the factor's channels, too.
        factors: the number of the factor's channels.

    Sources: Meta-SR (Hu et al. 2019, CVPR, section 3.2: two linear layers with ReLU between them predict the weights
    from the scale); TAFE-Net (Wang et al. 2019, CVPR), where a task's embedding is the factor.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, factors: int) -> None:
        super().__init__()
        self.out_channels, self.kernel, self.stride, self.factors = outputs, kernel, stride, factors
        first = convolution(inputs - factors, outputs, kernel).weight
        nn.init.kaiming_normal_(first, mode="fan_out", nonlinearity="relu")
        self.first, self.second = nn.Linear(factors, PREDICTING), nn.Linear(PREDICTING, first.numel())
        with torch.no_grad():
            self.second.bias.copy_(first.flatten())
            self.second.weight.mul_(first.std())

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C + factors, H, W] to [n, K, P, Q]."""
        channels = x.shape[1] - self.factors
        weight = self.second(F.relu(self.first(x[:, channels:, 0, 0])))
        return _by_rows(x[:, :channels], weight, self.out_channels, self.kernel, self.stride)


def _given_convolution(layer: nn.Module, output: Tensor) -> int:
    """Count the MACs of a row's convolution; the linear layers count their own."""
    assert isinstance(layer, GivenConv2d)
    return output[0].numel() * layer.second.out_features // layer.out_channels


def _row_convolution(layer: nn.Module, output: Tensor) -> int:
    """Count the MACs of a row's convolution and of mixing its weights."""
    assert isinstance(layer, _RowConv2d)
    return output[0].numel() * layer.weight[0].numel() // layer.out_channels + layer.weight.numel()


FORMULAS |= {
    MixedConv2d: _row_convolution, PredictedConv2d: _row_convolution, GivenConv2d: _given_convolution,
}  # fmt: skip

# The layers that blocks of residual networks are made of, by their names in settings. A plugin may add rows.
ATTENTIONS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(), "squeeze": SqueezeExcitation,
}  # fmt: skip
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda channels: nn.ReLU(inplace=True), "dynamic": DynamicReLU,
}  # fmt: skip
KERNELS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "fixed": convolution, "mixed": MixedConv2d, "predicted": PredictedConv2d,
}  # fmt: skip


@dataclass(frozen=True)
class Kinds:
    """The kinds of layers in the branch of a residual block.

    Attributes:
        attention: a name in `ATTENTIONS`, of what weighs the branch's result.
        activation: a name in `ACTIVATIONS`, of what is between convolutions.
        kernels: a name in `KERNELS`, of the convolutions.

    Raises:
        ValueError: a name is unknown.
    """

    attention: str = "none"
    activation: str = "relu"
    kernels: str = "fixed"

    def __post_init__(self) -> None:
        check_known("attention", self.attention, ATTENTIONS)
        check_known("activation", self.activation, ACTIVATIONS)
        check_known("kernels", self.kernels, KERNELS)

    @property
    def changed(self) -> dict[str, str]:
        """What differs from a plain block's kinds, by name."""
        return {name: kind for name, kind in vars(self).items() if kind != getattr(PLAIN, name)}


PLAIN = Kinds()
