"""TensorBoard shows the same scalars whichever library trains. Its x-axis counts decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dynrl.backbones import Point, choice_rates
from dynrl.envs.core import Info, RoutingVectorEnv
from dynrl.files import told_here

SHOWN_CLASSES = 20  # nobody reads a thousand curves, and writing them takes longer than learning does


def ended_episodes(env: RoutingVectorEnv, info: Info, returns: Tensor) -> dict[str, Tensor]:
    """Return what is logged of the episodes that ended with a step: [n] each, but routes [n, columns], and targets.

    Args:
        env: the environment that stepped.
        info: what `step_tensors` returned with the step.
        returns: [N], the return of each row's episode so far.
    """
    ended = info["ended"]
    found = {name: info[name][ended] for name in (env.task.metric, "macs_fraction", "price", "route", "target")}
    return {**found, "return": returns[ended]}


def episode_scalars(over: Mapping[str, Tensor], points: Sequence[Point]) -> dict[str, float]:
    """Return means over the episodes of `ended_episodes`, by the tags of `TrainingLog`."""
    target, not_means = over["target"], ("route", "return", "length", "target")
    scalars = {name: float(values.mean()) for name, values in over.items() if name not in not_means}
    scalars |= {"reward": float(over["return"].mean()), "routes/distinct": float(len(over["route"].unique(dim=0)))}
    if target.dim() == 1 and not target.is_floating_point():  # each input has one class
        few = target < SHOWN_CLASSES
        spent, met = (torch.bincount(target[few], weights) for weights in (over["macs_fraction"][few], None))
        for label, mean in enumerate((spent / met).tolist()):
            if not math.isnan(mean):  # NaN: no input of this class was met
                scalars[f"macs_by_class/{label}"] = mean
    return scalars | {f"rate/{tag}": rate for tag, rate in choice_rates(points, over["route"]).items()}


class TrainingLog:
    """A training log writes the scalars of one run into `folder`, for TensorBoard.

    The tags are `reward`, the task's metric (`accuracy` or `mse`), `macs_fraction`, `price`, `routes/distinct` (if
    there are few, the policy has collapsed), `rate/<point>` (the share of the decisions there that were choice 1; at
    points of more than two choices, `rate/<point>/<choice>`), `macs_by_class/<class>` (what inputs of that class spend,
    for the first 20 classes), `loss/...`, `entropy` and `throughput/steps_per_s`. After each round of fine-tuning,
    there is `finetuning/...` with means over its batches.

    Args:
        folder: the folder for TensorBoard's files.
        begins_after: the step that training continues from; what a killed run wrote after this step is hidden.
    """

    def __init__(self, folder: Path, begins_after: int = 0) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=begins_after + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the finite values among `scalars` at `step`."""
        for tag, value in scalars.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, step)

    def __enter__(self) -> TrainingLog:
        self._held = ExitStack()
        self._held.enter_context(told_here())
        self._held.callback(self._writer.close)
        return self

    def __exit__(self, *raised: object) -> None:
        self._held.close()
