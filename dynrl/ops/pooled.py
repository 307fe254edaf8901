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


def summary(x: Tensor, channels_last: bool = False) -> Tensor:
    """Summarise features of any kind, for routers to see: each channel's mean over all places.

    Args:
        x: vectors [n, C]; maps [n, C, ...] of any number of dimensions; or, with `channels_last`, tokens [n, T, C] and
            maps [n, ..., C].
        channels_last: whether the channels are the last dimension. The shape alone does not tell.

    Returns:
        a new tensor [n, C] float32.
    """
    if x.dim() == 2:
        return x.to(torch.float32, copy=True)
    if channels_last:
        return x.flatten(1, -2).mean(1).float()
    return pooled(x) if x.dim() == 4 else x.flatten(2).mean(2).float()
