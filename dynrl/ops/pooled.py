"""`pooled` is each channel's mean over its map, the cheap summary that most routers see."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.ops.backend import Path, path


def pooled_ref(x: Tensor) -> Tensor:
    """Compute the definition of `pooled`.

    Args:
        x: [n, C, H, W].

    Returns:
        [n, C] float32.
    """
    return x.mean((2, 3)).float()


def pooled(x: Tensor) -> Tensor:
    """Do `pooled_ref`, in one kernel that adds in float32 if kernels are asked for. Differentiable."""
    if path(x, vendor=True) is Path.TRITON and not (torch.is_grad_enabled() and x.requires_grad):
        from dynrl.ops.kernels.decide import pool

        last = x.contiguous(memory_format=torch.channels_last)
        return pool(last, torch.empty(x.shape[:2], dtype=torch.float32, device=x.device))
    return pooled_ref(x)


def summary(x: Tensor) -> Tensor:
    """Summarise features of any kind, for routers to see.

    Args:
        x: maps [n, C, H, W], which are `pooled`; tokens [n, T, C], which are averaged; or vectors [n, C].

    Returns:
        a new tensor [n, C] float32.
    """
    if x.dim() == 4:
        return pooled(x)
    return x.mean(1).float() if x.dim() == 3 else x.to(torch.float32, copy=True)
