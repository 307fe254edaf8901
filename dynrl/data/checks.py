"""What is made a data set is checked once, so that a mistake is told where it was made and not where it fails later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynrl.data.stored import Stored
from dynrl.inputs import Form, Named, as_inputs, parts, placed
from dynrl.tasks import Classification, Regression, Segmentation

if TYPE_CHECKING:
    from dynrl.data.base import Split

CLASSES = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64  # the types that classes may have


def checked(where: str, split: Split, classes: int) -> Split:
    """Return a split with inputs and targets of the types that networks take: float32, and int64 for classes.

    Args:
        where: the names of the data set and the split, for messages.
        split: as it was made.
        classes: the number of outputs of a network for it.

    Raises:
        ValueError: inputs are no tensors, are not as many as the targets, or are not finite; or the targets are not
            what the task takes.
    """
    inputs, targets = as_inputs(split.inputs), split.targets
    if not isinstance(inputs, Tensor | Named | Stored) or not isinstance(targets, Tensor):
        got = f"{type(inputs).__name__} and {type(targets).__name__}"
        raise ValueError(f"expected tensors as inputs and targets in {where}, got {got}; torch.as_tensor makes tensors")
    counts = {"inputs": len(inputs) if inputs.shape else 0, "targets": len(targets) if targets.dim() else 0}
    counts |= {f"difficulty {name!r}": len(numbers) for name, numbers in split.difficulty.items()}
    counts |= {"texts": len(split.texts)} if split.texts else {}
    if len(set(counts.values())) > 1 or not counts["inputs"]:
        raise ValueError(f"expected one row of each for each input in {where}, and at least one, got {counts}")
    if not isinstance(inputs, Stored):  # what is stored was looked at when it was read
        inputs = placed(inputs, inputs.device, torch.float32)
        for name, x in parts(inputs).items():
            _check_finite(x, f"the inputs {name!r}" if name else "the inputs", where)
    targets = _targets(where, split.task, targets, classes)
    _check_finite(targets, "the targets", where)
    same = inputs is split.inputs and targets is split.targets
    return split if same else replace(split, inputs=inputs, targets=targets)


def _check_finite(x: Tensor, what: str, where: str) -> None:
    # A sum is NaN or infinite if any element is, and takes far less time than isfinite().all().
    if x.is_floating_point() and not x.sum(dtype=torch.float64).isfinite():
        raise ValueError(f"{what} of {where} hold NaN or infinity; clean them first")


def _targets(where: str, task: Any, targets: Tensor, classes: int) -> Tensor:
    """Return targets in the form of the task."""
    got = f"got {targets.dtype} {list(targets.shape)} in {where}"
    if isinstance(task, Classification):
        form = "[n, height, width]" if isinstance(task, Segmentation) else "[n]"
        if targets.dtype not in CLASSES or targets.dim() != form.count(",") + 1:
            raise ValueError(
                f"expected classes as integers {form}, {got}; targets.long() makes integers, squeeze(1) takes off a "
                "dimension, and numbers are targets of Split(..., task=Regression.of(targets))"
            )
        low, high = (int(each) for each in targets.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"expected classes from 0 to {classes - 1}, got {low} to {high} in {where}")
        return targets.long()
    if isinstance(task, Regression) and (not targets.is_floating_point() or targets.shape[1:2] != (classes,)):
        raise ValueError(
            f"expected floating-point targets [n, {classes}] (or [n, {classes}, ...]), as many numbers as the data set "
            f"has `classes`, {got}; unsqueeze(1) makes [n, 1] of [n]"
        )
    return targets.float() if targets.is_floating_point() else targets


def check_alike(name: str, splits: Mapping[str, Split]) -> None:
    """Refuse, with a ValueError, splits that differ in their task or in what one input is."""
    tasks: dict[str, Any] = {part: split.task for part, split in splits.items()}
    forms: dict[str, Any] = {part: Form.of(split.inputs[:1]) for part, split in splits.items()}
    for what, each in (("task", tasks), ("form of inputs", forms)):
        if any(of != each["train"] for of in each.values()):
            told = ", ".join(f"{of} in {part}" for part, of in each.items())
            raise ValueError(f"expected one {what} in all splits of {name}, got {told}")


def shared(splits: Mapping[str, Split]) -> str:
    """Return which splits have rows in common, as far as the memory tells in which they lie; "" if none have."""
    for (one, first), (other, second) in combinations(splits.items(), 2):
        (memory, rows), (others, again) = _lying(first.inputs), _lying(second.inputs)
        if memory == others and len(both := np.intersect1d(rows, again)):
            return f"{one} and {other} have {len(both)} rows in common"
    return ""


def _lying(inputs: Any) -> tuple[int, np.ndarray]:
    """Return in which memory or file inputs lie, and where in it each row begins."""
    if isinstance(inputs, Stored):
        return id(inputs.file), inputs.rows
    first = next(iter(parts(as_inputs(inputs)).values()))
    if not isinstance(first, Tensor) or not first.dim() or not first.stride(0):  # rows of one memory do not tell
        return id(inputs), np.arange(0)
    begins = int(first.storage_offset()) + int(first.stride(0)) * np.arange(len(first))
    return first.untyped_storage().data_ptr(), begins
