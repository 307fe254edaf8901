"""`record` writes a decision of all rows into the books of their walk."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.ops.backend import Path, path


def record_ref(action: Tensor, costs: Tensor, column: Tensor, steps: Tensor, last: Tensor, macs: Tensor) -> None:
    """The definition. Everything is written in place.

    Args:
        action: [n] int64, what was chosen.
        costs: [choices] int64, what each choice costs.
        column: [n] int64, becomes `action`; a view into the walk's route.
        steps: [n] int64, goes up by 1.
        last: [n] int64, becomes `action` + 1.
        macs: [n] int64, goes up by the costs of what was chosen.
    """
    column.copy_(action)
    steps += 1
    torch.add(action, 1, out=last)
    macs += costs.index_select(0, action)


def record(action: Tensor, costs: Tensor, column: Tensor, steps: Tensor, last: Tensor, macs: Tensor) -> None:
    """`record_ref`, in one kernel where kernels are asked for. MACs: 0."""
    if path(action, vendor=True) is not Path.TRITON:
        return record_ref(action, costs, column, steps, last, macs)
    from dynrl.ops.kernels.decide import record as kernel

    return kernel(action.contiguous(), costs, column, steps, last, macs)
