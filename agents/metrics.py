"""What TensorBoard shows, whichever library trains. Its x-axis counts decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dynrl.backbones import Point, choice_rates
from dynrl.envs.core import Info, RoutingVectorEnv

SHOWN_CLASSES = 20  # a thousand curves are of use to nobody, and writing them takes longer than learning does


def ended_episodes(env: RoutingVectorEnv, info: Info, returns: Tensor) -> dict[str, Tensor]:
    """What is logged of the episodes that ended with a step: [n] each, routes [n, columns].

    Args:
        info: that step's.
        returns: [N], of each row's episode so far.
    """
    ended = info["ended"]
    found = {name: info[name][ended] for name in (env.task.metric, "macs_fraction", "price", "route", "target")}
    return {**found, "return": returns[ended]}


def episode_scalars(over: Mapping[str, Tensor], points: Sequence[Point]) -> dict[str, float]:
    """Means over episodes that ended (see `ended_episodes`), by the tags of `TrainingLog`."""
    target, not_means = over["target"], ("route", "return", "length", "target")
    scalars = {name: float(values.mean()) for name, values in over.items() if name not in not_means}
    scalars |= {"reward": float(over["return"].mean()), "routes/distinct": float(len(over["route"].unique(dim=0)))}
    if not target.is_floating_point():  # a regression's has no classes
        few = target < SHOWN_CLASSES
        spent, met = (torch.bincount(target[few], weights) for weights in (over["macs_fraction"][few], None))
        for label, mean in enumerate((spent / met).tolist()):
            if not math.isnan(mean):  # none of them was met
                scalars[f"macs_by_class/{label}"] = mean
    return scalars | {f"rate/{tag}": rate for tag, rate in choice_rates(points, over["route"]).items()}


class TrainingLog:
    """Writes scalars of one training run into `folder`, for TensorBoard.

    Tags: `reward`, the task's metric (`accuracy` or `mse`), `macs_fraction`, `price`, `routes/distinct` (few of them:
    the policy has collapsed), `rate/<point>` (share of the decisions there that were choice 1; `rate/<point>/<choice>`
    where there are more than two), `macs_by_class/<class>` (what inputs of that class spend; of the first 20),
    `loss/...`, `entropy`, `throughput/steps_per_s`; after each round of fine-tuning `finetuning/...`, means over its
    batches.

    Args:
        begins_after: the step training goes on from; what a killed run wrote after it is hidden.
    """

    def __init__(self, folder: Path, begins_after: int = 0) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=begins_after + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write those of `scalars` that are finite, at `step`."""
        for tag, value in scalars.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, step)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
