"""Compute is counted in multiply-accumulates (MACs).

Formulas count them, not torch's FLOP counter, which imports torch's compiler and would slow down the start of a
deployed model. Tests compare the formulas with what the counter sees executed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SMALL, LARGE = 2**20, 2**28  # the numbers of a row that is quickly run, and of one that a machine can hold


def _convolution(layer: Any, output: Tensor) -> int:
    return output[0].numel() * layer.weight[0].numel()


def _linear(layer: Any, output: Tensor) -> int:
    return output[0].numel() * layer.in_features


# By convention, normalisation counts 0, like activations and pooling: it folds into the product before it.
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
        the MACs of one row, and the shape of the output of one row.

    Raises:
        ValueError: a layer has parameters but no formula, so that it would silently count 0.

    Example:
        >>> count_macs(nn.Linear(8, 4), (8,))
        (32, (4,))
    """
    size = sum(map(math.prod, shapes))
    if size > LARGE:
        raise ValueError(f"expected rows of at most {LARGE:,} numbers, got one of {size:,}: {shapes}")
    # A large row is not computed: torch's meta device knows its shapes. Small ones are, since that device takes long to
    # import.
    device = "cpu" if size <= SMALL else "meta"
    twin, total = copy.deepcopy(module).to(device).eval(), 0

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
    output = twin(*(torch.zeros(1, *shape, device=device) for shape in shapes))
    return total, tuple(output.shape[1:])


def executed_macs(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, Tensor]:
    """Return the MACs that torch's FLOP counter sees `function` execute on `x`, and the output of `function`.

    This works for modules of any kind, but the counter does not know the products of `nn.LSTM` and similar layers,
    which count 0.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Attention runs with gradients and in plain steps, because the counter does not know all fused kernels.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        y = function(x)
    return counter.get_total_flops() // 2, y.detach()
