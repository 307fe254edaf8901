"""Your own pairs of tensors, or any torch `Dataset` of pairs, become a data set with three splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset, TensorDataset

from dynrl.data.base import Augmentation, Dataset, Split
from dynrl.files import fingerprint
from dynrl.inputs import Inputs, Named, as_inputs, parts, placed
from dynrl.tasks import CLASSIFICATION, Regression, Task

SHARE = 0.1  # the share of the pairs for validation, and the same share for the test


def own_dataset(data: Any, seed: int = 0) -> Dataset:
    """Make a data set of your own pairs (input, target); a tenth each is drawn for validation and test.

    Inputs become float32, with uint8 as 255ths, and are standardised by the mean and deviation of the training part.
    Inputs of several tensors by name are left as they are: integers such as token ids keep their type.
    Integer targets [n] are classes, whose names are the `classes` of a torch `Dataset` that has some; floating-point
    targets [n] or [n, outputs] make a regression.

    Args:
        data: a pair of tensors (inputs [n, ...], targets [n, ...]), or a torch `Dataset` of pairs. Inputs may also be
            a dict of tensors by name. All pairs are held in memory.
        seed: the seed of the draw.

    Returns:
        a data set whose name, "own-" and part of a hash, depends on its content and the seed.

    Raises:
        ValueError: there are no or too few pairs, they differ in shape, inputs or targets are not finite, or targets
            are neither classes nor floating-point numbers.
    """
    names, (inputs, targets) = _names(data), _pairs(data)
    flat = isinstance(inputs, Tensor) and inputs.dim() < 2
    if inputs.shape[0] != targets.shape[0] or len(inputs) < 10 or flat:
        raise ValueError(
            f"expected at least 10 inputs [n, ...] and as many targets, got {list(inputs.shape)} and "
            f"{list(targets.shape)}"
        )
    given = {f"inputs{name and f'.{name}'}": x for name, x in parts(inputs).items()}
    name = "own-" + fingerprint({**given, "targets": targets}, seed)[:12]
    dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in parts(inputs).items()}
    if isinstance(inputs, Named):
        inputs = placed(inputs, "cpu", torch.float32)
    else:
        inputs = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float()
    if targets.is_floating_point():
        targets = targets.float().view(len(targets), -1)
    elif targets.dim() != 1 or targets.dtype == torch.bool or int(targets.min()) < 0:
        raise ValueError(
            "expected integer classes [n] from 0 on, or floating-point numbers; got targets "
            f"{targets.dtype} {list(targets.shape)}, the least of them {targets.min()}"
        )
    else:
        targets = targets.long()
    if not all(x.isfinite().all() for x in (*parts(inputs).values(), targets)):
        raise ValueError("the inputs or targets hold NaN or infinity; clean them first")
    order, few = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)), int(SHARE * len(inputs))
    drawn = order[2 * few :], order[few : 2 * few], order[:few]
    mean, deviation = 0.0, 1.0
    if isinstance(inputs, Tensor):
        mean, deviation = float(inputs[drawn[0]].mean()), float(inputs[drawn[0]].std()) or 1.0
        inputs = (inputs - mean) / deviation
    numbers = targets.is_floating_point()
    task: Task = Regression.of(targets[drawn[0]]) if numbers else CLASSIFICATION
    classes = targets.shape[1] if numbers else max(int(targets.max()) + 1, len(names))
    if classes < 2 and not numbers:
        raise ValueError(
            "expected two classes or more, but all targets are 0; a regression needs floating-point targets"
        )
    train, validation, test = (Split(inputs[part], targets[part], task) for part in drawn)
    names = names if len(names) == classes and not numbers else ()
    dtype = dtypes if isinstance(inputs, Named) else dtypes[""]
    return Dataset(name, classes, train, validation, test, Augmentation(), mean, deviation, names=names, dtype=dtype)


def _names(data: Any) -> tuple[str, ...]:
    """Return the names of the classes where a torch `Dataset` knows them as `classes`, as those of torchvision do."""
    while isinstance(data, Subset):
        data = data.dataset
    named = getattr(data, "classes", None)
    return tuple(map(str, named)) if isinstance(named, list | tuple) else ()


def _pairs(data: Any) -> tuple[Inputs, Tensor]:
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        inputs = as_inputs(data[0])
        if isinstance(inputs, Inputs):
            return placed(inputs, "cpu"), data[1].detach().cpu()
    if not isinstance(data, TorchDataset) or not hasattr(data, "__len__"):
        raise ValueError(
            "expected a data set's name, a folder of images, a dynrl.data.Dataset, a torch Dataset of (input, target) "
            f"pairs with a length, or a pair of tensors; got {type(data).__name__}"
        )
    pairs = [data[i] for i in range(len(data))]  # by index: iterating over a torch Dataset may never end
    if not pairs or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"expected {type(data).__name__} to hold pairs (input, target)")
    inputs, targets = [pair[0] for pair in pairs], _stacked(pair[1] for pair in pairs)
    if not isinstance(inputs[0], Mapping):
        return _stacked(inputs), targets
    if any(not isinstance(each, Mapping) or set(each) != set(inputs[0]) for each in inputs):
        raise ValueError(f"expected inputs by the same names, those of the first: {sorted(inputs[0])}")
    return Named({name: _stacked(each[name] for each in inputs) for name in inputs[0]}), targets


def _stacked(values: Iterable[Any]) -> Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ValueError(f"expected inputs of one shape and targets of one shape, got {shapes[:3]}")
    return torch.stack(tensors).cpu()


def is_own(name: str) -> bool:
    """Tell whether a data set's name is one that `own_dataset` gives."""
    return name.startswith("own-") and not Path(name).exists()
