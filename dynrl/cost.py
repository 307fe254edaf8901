"""What compute costs: multiply-accumulates (MACs).

Formulas, not torch's FLOP counter: that one imports torch's compiler, a second of start-up for a deployed model. The
tests hold the formulas to what the counter sees executed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _convolution(layer: Any, output: Tensor) -> int:
    return output[0].numel() * layer.weight[0].numel()


def _linear(layer: Any, output: Tensor) -> int:
    return output[0].numel() * layer.in_features


# By convention normalisation counts 0, as activations and pooling do: it folds into the product before it.
FORMULAS: dict[type[nn.Module], Callable[[nn.Module, Tensor], int]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: lambda layer, output: 0,
    nn.GroupNorm: lambda layer, output: 0,
    nn.LayerNorm: lambda layer, output: 0,
}


@torch.no_grad()
def count_macs(module: nn.Module, *shapes: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Count the MACs of `module` on one row, by running a copy of it on one row of zeros.

    Args:
        module: a module whose parameters all belong to layers with a formula in `FORMULAS`.
        shapes: the shape of each input of one row, without the batch dimension.

    Returns:
        The MACs of one row, and the shape of the output of one row.

    Raises:
        ValueError: a layer has parameters but no formula: it would count 0 in silence.

    Example:
        >>> count_macs(nn.Linear(8, 4), (8,))
        (32, (4,))
    """
    twin, total = copy.deepcopy(module).to("cpu").eval(), 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += FORMULAS[type(layer)](layer, output)

    for name, layer in twin.named_modules():
        if type(layer) in FORMULAS:
            layer.register_forward_hook(count)
        elif any(True for _ in layer.parameters(recurse=False)):
            raise ValueError(
                f"no MAC formula for {type(layer).__name__} ({name or 'the module itself'}); add one to FORMULAS"
            )
    output = twin(*(torch.zeros(1, *shape) for shape in shapes))
    return total, tuple(output.shape[1:])


def executed_macs(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, Tensor]:
    """The MACs that torch's FLOP counter sees `function` execute on `x`, and what it returns; for modules of any kind.

    The counter does not know the products of `nn.LSTM` and its like: they count 0.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # With gradients and in plain steps: the counter does not know all fused ones of attention.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        y = function(x)
    return counter.get_total_flops() // 2, y.detach()
