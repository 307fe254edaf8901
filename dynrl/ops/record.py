"""`record`: one decision of all rows of a walk, written into its books."""

from __future__ import annotations

from torch import Tensor

from dynrl.ops.backend import counts_on_device, use_triton


def record_ref(action: Tensor, costs: Tensor, route: Tensor, steps: Tensor, last: Tensor, macs: Tensor) -> None:
    """The definition; in place.

    Args:
        action: [n] int64, each row's choice.
        costs: [choices] int64, MACs of each.
        route: [n, max_steps] int64: `action` is written at each row's step.
        steps: [n] int64: counted up.
        last: [n] int64: set to `action` + 1.
        macs: [n] int64: `costs` of the choice are added.
    """
    route.scatter_(1, steps.unsqueeze(1), action.unsqueeze(1))
    steps += 1
    last.copy_(action).add_(1)
    macs += costs.index_select(0, action)


def record(action: Tensor, costs: Tensor, route: Tensor, steps: Tensor, last: Tensor, macs: Tensor) -> None:
    """`record_ref`; under `device_counts` one kernel instead of six. MACs: 0."""
    if counts_on_device() and use_triton(action):
        from dynrl.ops.kernels.decide import record as kernel

        kernel(action.contiguous(), costs, route, steps, last, macs)
    else:
        record_ref(action, costs, route, steps, last, macs)
