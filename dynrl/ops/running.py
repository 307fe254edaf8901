"""`running` lists the rows that run, for graphs that compute a fixed number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.ops.backend import Path, path


def running_ref(action: Tensor, rows: Tensor, index: Tensor, count: Tensor, arrived: Tensor | None = None) -> None:
    """Compute the definition of `running`, which writes everything in place.

    Args:
        action: [n] int64; the rows of choice 1 run.
        rows: [n] int64, their numbers.
        index: [B] int64, set to the numbers of the rows that run, in their order, and the last of them again and again;
            to the first row's if none runs, and to 0 without rows.
        count: [1] int64, set to how many rows run.
        arrived: [1] int64, how many of these rows are there; the others do not run. By default, all are.
    """
    if not len(action):
        index.zero_()
        count.zero_()
        return
    going = action == 1
    if arrived is not None:
        going &= torch.arange(len(action), device=action.device) < arrived
    order = rows.index_select(0, torch.argsort(~going, stable=True))
    count.copy_(going.sum(0, keepdim=True))
    places = torch.arange(len(index), device=action.device)
    index.copy_(order[torch.minimum(places, (count - 1).clamp_min(0))])


def running(action: Tensor, rows: Tensor, index: Tensor, count: Tensor, arrived: Tensor | None = None) -> None:
    """Do `running_ref`, in one kernel if kernels are asked for."""
    if path(action, vendor=True) is not Path.TRITON or not len(action):
        return running_ref(action, rows, index, count, arrived)
    from dynrl.ops.kernels.partition import running as kernel

    return kernel(action.contiguous(), rows, index, count, arrived)
