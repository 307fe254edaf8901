"""`FoldedConv2d` is what inference runs: a frozen convolution with batch norm, ReLU and residual folded in."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from dynrl.ops.costs import COSTS

FUSED_CHANNELS = 8  # cuDNN's fused convolutions are known to take channels in a multiple of this


def fusible(x: Tensor) -> bool:
    """Tell whether `FoldedConv2d` may run oneDNN's fused convolution on `x`."""
    return (
        not is_compiling()  # packed weights mean nothing to a tracer
        and not x.is_cuda
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _runs_bf16()))  # few CPUs have fp16
        and not torch.is_grad_enabled()
        and x.is_contiguous(memory_format=torch.channels_last)
        and (x.shape[0] > 1 or x.numel() >= COSTS.small_map)
        and torch.backends.mkldnn.is_available()
        and x.device.type == "cpu"
    )


@cache
def _runs_bf16() -> bool:
    # If the CPU neither has bfloat16 nor emulates it, oneDNN refuses to lay out weights.
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def _vendor_fuses(x: Tensor, outputs: int) -> bool:
    """Tell whether cuDNN's convolutions with bias, residual and ReLU in one pass can run, for images that fit."""
    return (
        x.is_cuda
        and outputs % FUSED_CHANNELS == 0
        and not is_compiling()
        and not torch.is_grad_enabled()
        and torch.backends.cudnn.is_available()
        and torch.version.hip is None
    )


def _fits_vendor(x: Tensor) -> bool:
    return x.shape[1] % FUSED_CHANNELS == 0 and x.is_contiguous(memory_format=torch.channels_last)


def fold(norm: nn.Module | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift, [K] each, that a batch norm (or none) and a bias apply to a convolution.

    Raises:
        ValueError: the norm is another one, or has no running statistics, so that it depends on its batch.
    """
    scale, shift = weight.new_ones(len(weight)), weight.new_zeros(len(weight))
    if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
        scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight.detach())
        shift = (0 if norm.bias is None else norm.bias.detach()) - norm.running_mean * scale
    elif not (norm is None or isinstance(norm, nn.Identity)):
        raise ValueError(f"expected a batch norm with running statistics behind a convolution, got {norm}")
    return scale, shift if bias is None else shift + bias.detach() * scale


def _padded(x: Tensor) -> Tensor:
    """Return `x` [n, C, H, W] with channels of zeros behind its own, in channels_last."""
    size = (x.shape[0], FUSED_CHANNELS, *x.shape[2:])
    wide = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).zero_()
    wide[:, : x.shape[1]].copy_(x)
    return wide


class FoldedConv2d(nn.Conv2d):
    """A convolution for inference only. Batch norm is folded into its weights; ReLU and residual come as it writes.

    On the CPU, it runs oneDNN's fused convolution on weights that are laid out once, like torch's Inductor with frozen
    models. Elsewhere, it runs plain torch or cuDNN's fused convolution.
    """

    _packed: dict[bool, tuple[tuple[int, int], Tensor]]

    @classmethod
    def of(cls, convolution: nn.Conv2d, norm: nn.Module | None = None) -> FoldedConv2d:
        """Return a frozen copy of `convolution` followed by `norm`, a batch norm or an identity.

        Raises:
            ValueError: the norm is another one, or the convolution's padding is not zeros.
        """
        if convolution.padding_mode != "zeros":
            raise ValueError(f"expected a convolution with zero padding, got padding_mode={convolution.padding_mode!r}")
        weight, bias = convolution.weight.detach().clone(), convolution.bias
        if not (norm is None or isinstance(norm, nn.Identity)) or bias is not None:
            scale, bias = fold(norm, weight, bias)
            weight = (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        layout = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        return cls.holding(weight, bias, *layout)

    @classmethod
    def holding(
        cls, weight: Tensor, bias: Tensor | None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> FoldedConv2d:
        """Return the convolution with these weights [K, C / groups, R, S] and biases [K]."""
        outputs, inputs, *kernel = weight.shape
        made = cls(
            inputs * groups, outputs, tuple(kernel), stride, padding, dilation, groups, bias is not None, device="meta"  # type: ignore[arg-type]
        )  # fmt: skip
        # A single image is convolved faster if weights have the same memory format as inputs.
        made.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        if bias is not None:
            # The biases are copied, since cuDNN needs an aligned address, which part of a table need not have.
            made.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
        made._packed = {}
        return made.eval()

    def add_bias(self, bias: Tensor) -> None:
        """Add `bias` [K] to the biases, in place."""
        whole = bias.detach().clone() if self.bias is None else self.bias + bias
        self.bias = nn.Parameter(whole, requires_grad=False)

    def like_output(self, x: Tensor) -> Tensor:
        """Return an uninitialised tensor for the result of `x`: [n, K, P, Q] in channels_last."""
        sides = []
        for i, side in enumerate(x.shape[2:]):
            reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
            sides.append((side + 2 * int(self.padding[i]) - reach) // self.stride[i] + 1)
        size = (len(x), self.out_channels, *sides)
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def forward(self, x: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """Map [n, C, H, W] to [n, K, P, Q]; `residual` [n, K, P, Q] is added and may be overwritten; ReLU is last."""
        if fusible(x) and (residual is None or fusible(residual)):
            return self.fused(x, relu, residual)
        if relu and _vendor_fuses(x, self.out_channels):
            layout: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.groups)
            weight = self.weight
            if residual is None and self._pads(x):
                # A wide weight that were kept would stay as it is when other weights are loaded.
                x, weight = _padded(x), _padded(weight)
            if _fits_vendor(x):
                if residual is None:
                    return torch.cudnn_convolution_relu(x, weight, self.bias, *layout)
                return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, self.bias, *layout)
        y = super().forward(x)
        y = y if residual is None else residual.add_(y)
        return y.relu_() if relu else y

    def _pads(self, x: Tensor) -> bool:
        """Tell whether `x` gets channels of zeros. cuDNN itself would give it them, but not fuse what comes behind."""
        return self.groups == 1 and x.shape[1] < FUSED_CHANNELS and x.dtype in (torch.bfloat16, torch.float16)

    def fused(self, x: Tensor, relu: bool, residual: Tensor | None = None) -> Tensor:
        """Do `forward` where `fusible(x)` is known to hold."""
        layout = (self.padding, self.stride, self.dilation, self.groups)
        many = len(x) > 1  # oneDNN needs another layout for one row than for several, and is far slower without
        weight = self.weight
        state = weight.data_ptr(), -1 if weight.is_inference() else weight._version  # weights may be edited in place
        kept, packed = self._packed.get(many, (None, None))
        if packed is None or kept != state:
            size = [64 if many else 1, *x.shape[1:]]
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *layout, size)
            self._packed[many] = state, packed
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise.default(
                x, packed, self.bias, *layout, "relu" if relu else "none", [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, packed, self.bias, *layout, "add", 1.0, "relu" if relu else None, [], ""
        )

    # The packed weights are a cache for these weights, device and type, so whatever changes or copies them drops the
    # cache.
    def _load_from_state_dict(self, *args: Any) -> None:
        self._packed = {}
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv2d:
        self._packed = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}
