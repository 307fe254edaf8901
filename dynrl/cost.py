"""Compute is counted in multiply-accumulates (MACs).

Formulas count them, not torch's FLOP counter, which imports torch's compiler and would slow down the start of a
deployed model. Tests compare the formulas with what the counter sees executed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    dtype = next((weight.dtype for weight in twin.parameters()), None)
    output = twin(*(torch.zeros(1, *shape, dtype=dtype, device=device) for shape in shapes))
    return total, tuple(output.shape[1:])


def _grouped(x: Tensor, weight: Tensor, *rest: Any, out_val: Tensor, **options: Any) -> int:
    """Return the FLOPs of a product whose rows are in groups, one weight for each, as in a mixture of experts."""
    inner = x.shape[-1]
    # Two matrices make one product for each group, of some columns of the first and as many rows of the second.
    return 2 * (x.numel() * weight.shape[-1] if x.dim() == weight.dim() == 2 else out_val.numel() * inner)


# What torch's FLOP counter does not know, by the name of the op: its FLOPs, from its arguments and `out_val`.
MORE_FORMULAS: dict[str, Callable[..., int]] = {
    "aten._grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
}


def macs_of(ops: Sequence[Executed]) -> int:
    """Return the MACs of executed ops, by the formulas of torch's FLOP counter and by `MORE_FORMULAS`.

    Raises:
        ValueError: an op that multiplies has no formula, so that it would silently count 0.
    """
    from torch.utils.flop_counter import flop_registry

    flops, unknown = 0, set()
    for op in ops:
        packet = op.func._overloadpacket
        formula = flop_registry.get(packet) or MORE_FORMULAS.get(str(packet))
        if formula is not None:
            flops += formula(*op.given, **op.options, out_val=op.result)
        elif multiplies(op):
            unknown.add(str(op.func))
    if unknown:
        raise ValueError(
            f"expected ops whose compute torch's FLOP counter knows, got {', '.join(sorted(unknown))}, which would "
            "count 0; compute the same by matrix products or convolutions, or add a formula by "
            "torch.utils.flop_counter.register_flop_formula"
        )
    return flops // 2


R = TypeVar("R")


def executed(function: Callable[[], R]) -> tuple[list[Executed], R]:
    """Call `function` and return the ops that it executed (see `watched`) and its result."""
    with watched() as ops:
        result = function()
    return ops, result


@dataclass(frozen=True)
class Executed:
    """An op that was executed: its overload, what it was given, by position and by name, and what it returned."""

    func: Any
    given: tuple[Any, ...]
    options: dict[str, Any]
    result: Any


class _Watch(TorchDispatchMode):
    def __init__(self, seen: list[Executed]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            result = func.decompose(*args, **(kwargs or {}))  # in inference mode, torch has not taken it apart yet
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        self.seen.append(Executed(func, args, kwargs or {}, result))
        return result


@contextmanager
def watched() -> Iterator[list[Executed]]:
    """Inside this context, attention runs in plain steps; the list gets each op that is executed.

    Torch fuses attention in kernels whose compute cannot be counted. It takes more of them if no weight needs a
    gradient, so the context asks for gradients and turns these kernels off.
    """
    seen: list[Executed] = []
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _Watch(seen):
            yield seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# Ops of several tensors that only move numbers, or count 0 by convention; ops of one tensor that multiply nevertheless.
_MOVES = ("norm", "cat", "stack", "copy", "index", "scatter", "grid_sampler", "prelu", "rrelu", "lstm_cell", "gru_cell")
_MULTIPLIES = ("fft", "linalg", "rnn", "mm", "matmul", "matrix", "cholesky", "pdist")


def multiplies(op: Executed) -> bool:
    """Tell whether an executed op may do more than one product for each number that it returns."""
    name = op.func._overloadpacket.__name__
    if op.func.is_view or torch.Tag.pointwise in op.func.tags or any(word in name for word in _MOVES):
        return False
    tensors = [x for x in tree_leaves(op.given) if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]
    return len(tensors) > 1 or any(word in name for word in _MULTIPLIES) or op.func.namespace not in ("aten", "prim")
