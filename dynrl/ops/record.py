"""`record` writes a decision of all rows into the records of their walk."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.ops.backend import Path, path


def record_ref(action: Tensor, costs: Tensor, column: Tensor, steps: Tensor, last: Tensor, macs: Tensor) -> None:
    """Compute the definition of `record`, which writes everything in place.

    Args:
        action: [n] int64, the choices.
        costs: [choices] int64, the cost of each choice.
        column: [n] int64, a view into the walk's route, set to `action`.
        steps: [n] int64, increased by 1.
        last: [n] int64, set to `action` + 1.
        macs: [n] int64, increased by the cost of each row's choice.
    """
    column.copy_(action)
    steps += 1
    torch.add(action, 1, out=last)
    macs += costs.index_select(0, action)


def record(action: Tensor, costs: Tensor, column: Tensor, steps: Tensor, last: Tensor, macs: Tensor) -> None:
    """Do `record_ref`, in one kernel if kernels are asked for."""
    if path(action, vendor=True) is not Path.TRITON:
        return record_ref(action, costs, column, steps, last, macs)
    from dynrl.ops.kernels.decide import record as kernel

    return kernel(action.contiguous(), costs, column, steps, last, macs)
