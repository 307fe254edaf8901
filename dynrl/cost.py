"""What compute costs: multiply-accumulates (MACs), as torch's FLOP counter sees them executed."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(module: nn.Module, *shapes: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Count the MACs of `module` on one row, without running it on real data.

    Args:
        module: any module of plain torch operators; it is copied to the meta device, never changed.
        shapes: the shape of each input of one row, without the batch dimension.

    Returns:
        The MACs of one row (1 MAC = 2 FLOPs of torch's counter; batch norm, activations and pooling
        count 0), and the shape of the output of one row.

    Example:
        >>> count_macs(nn.Linear(8, 4), (8,))
        (32, (4,))
    """
    twin = copy.deepcopy(module).to("meta").eval()
    inputs = [torch.empty(1, *shape, device="meta") for shape in shapes]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = twin(*inputs)
    return counter.get_total_flops() // 2, tuple(output.shape[1:])
