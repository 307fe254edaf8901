"""`pooled`: each channel's mean over its map, the cheap summary that most routers see."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.ops.backend import small_steps_by_kernels


def pooled_ref(x: Tensor) -> Tensor:
    """The definition.

    Args:
        x: [n, C, H, W].

    Returns:
        [n, C] float32.
    """
    return x.mean((2, 3)).float()


def pooled(x: Tensor) -> Tensor:
    """`pooled_ref`; in CUDA graphs one kernel, which adds in float32. MACs: 0."""
    if small_steps_by_kernels(x) and not (torch.is_grad_enabled() and x.requires_grad):
        from dynrl.ops.kernels.decide import pool

        last = x.contiguous(memory_format=torch.channels_last)
        return pool(last, torch.empty(x.shape[:2], dtype=torch.float32, device=x.device))
    return pooled_ref(x)


def summary(x: Tensor) -> Tensor:
    """What routers see of features of any kind, as float32: `pooled` maps [n, C, H, W], tokens [n, T, C] averaged, and
    vectors [n, C] as they are.
    """
    if x.dim() == 4:
        return pooled(x)
    return x.mean(1).float() if x.dim() == 3 else x.to(torch.float32, copy=True)


def noted(x: Tensor, seen: Tensor | None) -> Tensor:
    """`x`, its `summary` written to `seen`, if that is given."""
    if seen is not None:
        seen.copy_(summary(x.detach()))
    return x
