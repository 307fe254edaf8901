"""Rows go through a network on routes of their own, so its answer to an input must not depend on those beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynrl.inputs import parts

ROUNDED = 0.01  # outputs that change by more than this share of the largest one are not just rounded
REPEATED = 1e-4  # the same where a batch of the same size is computed anew, which rounds alike, but on CUDA


def close(got: Tensor, expected: Tensor, by: float = 1e-2) -> bool:
    """Tell whether two tensors agree up to this share, or up to this share of the largest number expected."""
    # Tokens that see padding only may be NaN.
    close = {"rtol": by, "atol": by * float(expected.nan_to_num().abs().max())}
    return got.shape == expected.shape and torch.allclose(got, expected, equal_nan=True, **close)


def same(got: Tensor, expected: Tensor) -> bool:
    """Tell whether two tensors differ by no more than rounding in their number type."""
    return close(got, expected, max(ROUNDED, _digits(expected)))


def repeated(got: Tensor, expected: Tensor) -> bool:
    """Tell whether rows are the same in two batches of one size, where even the rounding is mostly the same."""
    return close(got, expected, max(ROUNDED if expected.is_cuda else REPEATED, _digits(expected)))


def _digits(x: Tensor) -> float:
    """Return the share by which numbers of a type of few digits may be off."""
    return torch.finfo(x.dtype).eps ** 0.5 if x.dtype.itemsize < 4 else 0.0


@torch.no_grad()
def check_rows(kind: str, run: Callable[[Any], Tensor], examples: Any) -> None:
    """Refuse, with a ValueError, a network whose answer to an input depends on those beside it.

    Args:
        kind: what to call the network.
        run: the network, from inputs to outputs.
        examples: three inputs, unlike one another (`Form.example`).
    """
    both = examples[:2]
    given = both.clone()
    alone, together = run(examples[:1].clone()), run(given)
    if any(not torch.equal(x, parts(both)[name]) for name, x in parts(given).items()):
        raise ValueError(
            f"{kind} writes into its inputs, which are needed again where rows go on apart; write into a copy there"
        )
    if not alone.dim() or (alone.shape[0], *together.shape) != (1, 2, *alone.shape[1:]):
        shapes = f"{tuple(alone.shape)} for one input and {tuple(together.shape)} for two"
        raise ValueError(f"expected {kind} to return a row for each input, got {shapes}")
    for row, said in enumerate((alone, run(examples[1:2].clone()))):
        beside = both.clone()
        beside[1 - row : 2 - row] = examples[2:]
        mine = slice(row, row + 1)
        if not (same(together[mine], said) and repeated(run(beside)[mine], together[mine])):
            raise ValueError(
                f"expected what {kind} returns for an input to depend on that input only, but it changes with the "
                "inputs beside it (or by chance); a network that mixes the rows of a batch cannot be routed row by row"
            )
