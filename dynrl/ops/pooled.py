"""`pooled`: each channel's mean over its map, the cheap summary that most routers see."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.ops.backend import counts_on_device, use_triton


def pooled_ref(x: Tensor) -> Tensor:
    """The definition.

    Args:
        x: [n, C, H, W].

    Returns:
        [n, C] float32.
    """
    return x.mean((2, 3)).float()


def pooled(x: Tensor) -> Tensor:
    """`pooled_ref`; under `device_counts` one kernel that adds in float32. MACs: 0."""
    if counts_on_device() and use_triton(x) and not x.requires_grad:
        from dynrl.ops.kernels.decide import pool

        last = x.contiguous(memory_format=torch.channels_last)
        return pool(last, torch.empty(x.shape[:2], dtype=torch.float32, device=x.device))
    return pooled_ref(x)
