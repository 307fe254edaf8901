"""What TensorBoard shows, whichever library trains: one writer, environment steps on the x-axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter


class TrainingLog:
    """Writes scalars of one training run into `folder`, for TensorBoard.

    Tags: `reward`, the task's metric (`accuracy` or `mse`), `macs_fraction`, `price`, `routes/distinct` (few of them:
    the policy has collapsed), `rate/<point>` (share of the decisions there that were choice 1; `rate/<point>/<choice>`
    where there are more than two), `loss/...`, `entropy`, `throughput/steps_per_s`; after each round of fine-tuning
    `finetuning/...`, means over its batches.

    Args:
        begins_after: the step training goes on from; what a killed run wrote after it is hidden.
    """

    def __init__(self, folder: Path, begins_after: int = 0) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=begins_after + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the finite ones of `scalars` at environment step `step`."""
        for tag, value in scalars.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, step)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
