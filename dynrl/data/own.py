"""Your own pairs of tensors, or any torch `Dataset` of pairs, become a data set with three splits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset, TensorDataset

from dynrl.data.base import Augmentation, Dataset, Split, pieces, scaled
from dynrl.data.checks import CLASSES
from dynrl.data.stored import Stored, blurs, read_all, statistics, store, too_large
from dynrl.files import fingerprint
from dynrl.inputs import Inputs, Named, as_inputs, parts, placed
from dynrl.provenance import Numbers, standardised
from dynrl.tasks import CLASSIFICATION, Regression, Segmentation, Task

UNCLEAN = "the inputs or targets hold NaN or infinity; clean them first"
BLURRED = 0.01  # the share of a deviation by which rounding may change a target
MOST_CLASSES = 10_000  # of targets that are fewer; more would be ids, whose names alone fill the memory
SHARE = 0.1  # the share of the pairs for validation, and the same share for the test


def own_dataset(data: Any, seed: int = 0) -> Dataset:
    """Make a data set of your own pairs (input, target); a tenth each is drawn for validation and test.

    Inputs become float32, with uint8 as 255ths, and are standardised by the mean and deviation of the training part,
    each channel of an image by its own.
    Inputs of several tensors by name are left as they are: integers such as token ids keep their type.
    Integer targets [n] are classes, whose names are the `classes` of a torch `Dataset` that has some; floating-point
    targets [n] or [n, outputs] make a regression. Integer targets [n, height, width] beside images of that size are the
    classes of their pixels.

    Args:
        data: a pair of tensors (inputs [n, ...], targets [n, ...]), or a torch `Dataset` of pairs. Inputs may also be
            a dict of tensors by name. Each pair is read once, so what a transform draws is drawn once. Inputs of a
            torch `Dataset` that take more than 512 MB are read by `DataLoader` workers into a temporary file
            (`dynrl.data.stored`); others are held in memory.
        seed: the seed of the draw.

    Returns:
        a data set whose name, "own-" and part of a hash, depends on its content and the seed.

    Raises:
        ValueError: there are no or too few pairs, they differ in shape, some inputs are uint8 and others not, inputs or
            targets are not finite, or targets are neither classes numbered from 0 on nor floating-point numbers, or do
            not differ.
    """
    names, (inputs, targets) = _names(data), _pairs(data)
    flat = not isinstance(inputs, Named) and (inputs.dim() < 2 or 0 in inputs.shape[1:])
    if inputs.shape[0] != targets.shape[0] or len(inputs) < 10 or flat:
        raise ValueError(
            "expected at least 10 inputs [n, ...] that are not empty, and as many targets, since a tenth each is for "
            "validation and test, "
            f"got {list(inputs.shape)} and {list(targets.shape)}"
        )
    maps = (
        targets.dim() == 3 and tuple(inputs.shape[2:]) == tuple(targets.shape[1:]) and not targets.is_floating_point()
    )
    given: Any = inputs.given if isinstance(inputs, Stored) else inputs
    inputs, dtype, content = _ready(inputs)
    name = "own-" + fingerprint({**content, "targets": targets}, seed)[:12]
    if targets.is_floating_point():
        targets = _numbers(targets.view(len(targets), -1))
        if targets.shape[1] > 1 and ((targets == 0) | (targets == 1)).all() and (targets.sum(1) == 1).all():
            raise ValueError(
                f"expected classes as integers [n], got targets {list(targets.shape)} of zeros with a 1 in each row; "
                "give targets.argmax(1)"
            )
    elif not (targets.dim() == 1 or maps) or targets.dtype not in CLASSES or int(targets.min()) < 0:
        least = f", the least of them {targets.min()}" if targets.dtype in CLASSES else "; targets.long() makes classes"
        raise ValueError(
            "expected integer classes [n] from 0 on (or [n, height, width], for each pixel of images [n, channels, "
            "height, width]), or floating-point numbers; got targets "
            f"{targets.dtype} {list(targets.shape)}{least}"
        )
    else:
        targets = targets.long()
    tensors = {} if isinstance(inputs, Stored) else parts(inputs)  # what is stored was looked at when it was read
    if not all(x.isfinite().all() for x in (*tensors.values(), targets)):
        raise ValueError(UNCLEAN)
    order, few = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)), int(SHARE * len(inputs))
    drawn = order[2 * few :], order[few : 2 * few], order[:few]
    mean: Numbers = 0.0
    deviation: Numbers = 1.0
    raw = pieces(inputs)
    if not isinstance(inputs, Named):
        raw, inputs, mean, deviation = _standardised(raw, given, inputs, drawn[0])
    task, numbers = _task(targets[drawn[0]], maps), targets.is_floating_point()
    classes = targets.shape[1] if numbers else max(int(targets.max()) + 1, len(names))
    if names and not numbers and len(names) < classes:
        raise ValueError(
            f"expected a name in `classes` for each class, got {len(names)} names and targets up to {classes - 1}; "
            "name all of them, or give the pairs without the names"
        )
    if not numbers and classes > max(len(targets), MOST_CLASSES):
        raise ValueError(
            f"expected classes numbered from 0 on, got {classes - 1:,} in {len(targets):,} targets, of which "
            f"{len(targets.unique()):,} differ; targets.unique(return_inverse=True)[1] numbers them"
        )
    train, validation, test = (Split(_rows(inputs, part), targets[part], task) for part in drawn)
    names = () if numbers else names
    made = Dataset(name, classes, train, validation, test, Augmentation(), mean, deviation, names=names, dtype=dtype)
    # Rounding blurs what is standardised already, so the content is told by the numbers that were given.
    vars(made)["content"] = fingerprint({"targets": targets}, [raw, seed, dtype, made.names])
    return made


def _standardised(raw: list[str], given: Any, inputs: Any, train: Tensor) -> tuple[list[str], Any, Numbers, Numbers]:
    """Return what tells the content, and inputs standardised by their rows `train`, with the mean and the deviation.

    Both are of the numbers as they were `given` where float32 (`inputs`, of which `raw` tells) would blur these.
    """
    mean, deviation = statistics(_rows(inputs, train))
    if not blurs(given.dtype, mean, deviation):
        return raw, scaled(inputs, mean, deviation), mean, deviation
    raw = pieces(given)
    if isinstance(given, Stored):
        mean, deviation = statistics(_rows(given, train))
        return raw, scaled(inputs, mean, deviation), mean, deviation
    exact = given.double()
    mean, deviation = statistics(exact[train])
    return raw, standardised(exact, mean, deviation), mean, deviation


def _numbers(targets: Tensor) -> Tensor:
    """Return targets [n, outputs] as float32; refuse, with a ValueError, what that would blur."""
    exact, rounded = targets.double(), targets.float()
    blur, deviation = (exact - rounded).abs().amax(0), exact.std(0)
    if ((blur > BLURRED * deviation) & (deviation > 0)).any():
        raise ValueError(
            f"expected targets whose differences float32 can hold, got numbers from {exact.min():.10g} to "
            f"{exact.max():.10g}; subtract their mean"
        )
    return rounded


def _task(targets: Tensor, maps: bool) -> Task:
    """Return what is learned from training targets; refuse, with a ValueError, those with nothing to learn."""
    if not targets.is_floating_point():
        if len(found := targets.unique()) < 2:
            raise ValueError(
                f"expected two classes or more to learn, but all targets of the training inputs are {int(found)}; a "
                "regression needs floating-point targets"
            )
        return Segmentation() if maps else CLASSIFICATION
    task = Regression.of(targets)
    if not 0 < task.variance < math.inf:
        raise ValueError(
            f"expected targets that differ, with a variance that float32 can hold, got {task.variance} for targets "
            f"from {targets.min():.7g} to {targets.max():.7g}; there is nothing to learn, or they want another unit"
        )
    return task


def _ready(inputs: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """Return inputs as float32 that are not standardised yet, their raw type, and what tells their content."""
    if isinstance(inputs, Stored):
        digest = torch.frombuffer(bytearray.fromhex(inputs.digest()), dtype=torch.uint8)
        return inputs, str(inputs.raw).removeprefix("torch."), {"inputs": digest}
    _check_real(parts(inputs).values())
    content = {f"inputs{name and f'.{name}'}": x for name, x in parts(inputs).items()}
    dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in parts(inputs).items()}
    if isinstance(inputs, Named):
        return placed(inputs, "cpu", torch.float32), dtypes, content
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float(), dtypes[""], content


def _check_real(tensors: Iterable[Tensor]) -> None:
    if any(x.is_complex() for x in tensors):
        raise ValueError("expected real inputs, got complex ones; torch.view_as_real makes two numbers of each")


def _rows(inputs: Any, rows: Tensor) -> Any:
    return inputs.part(rows.numpy()) if isinstance(inputs, Stored) else inputs[rows]


def _names(data: Any) -> tuple[str, ...]:
    """Return the names of the classes where a torch `Dataset` knows them as `classes`, as those of torchvision do."""
    while isinstance(data, Subset):
        data = data.dataset
    named = getattr(data, "classes", None)
    return tuple(map(str, named)) if isinstance(named, list | tuple) else ()


def _pairs(data: Any) -> tuple[Inputs | Stored, Tensor]:
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        inputs = as_inputs(data[0])
        if isinstance(inputs, Inputs):
            tensors = {name: x.detach().cpu() for name, x in parts(inputs).items()}
            return Named(tensors) if isinstance(inputs, Named) else tensors[""], data[1].detach().cpu()
    if not isinstance(data, TorchDataset) or not hasattr(data, "__len__"):
        what = type(data).__name__
        if isinstance(data, tuple | list):
            what += f" of {len(data)}, the first of them {', '.join(type(each).__name__ for each in data[:2])}"
        raise ValueError(
            "expected a data set's name, a folder of images or texts, a dynrl.data.Dataset, a torch Dataset of pairs "
            f"(input, target) with a length, or a pair of tensors; got {what}. torch.as_tensor makes tensors of arrays "
            "and lists"
        )
    given = _Pairs(data)
    first = given[0] if len(given) else ((), ())
    if not isinstance(first[0], Mapping) and too_large(len(given), _tensor(first[0]).shape):
        return _stored_pairs(given, _tensor(first[0]))
    pairs = [given[i] for i in range(len(given))]  # by index: iterating over a torch Dataset may never end
    if not pairs:
        raise ValueError(f"expected {type(data).__name__} to hold pairs (input, target), got none")
    inputs, targets = [pair[0] for pair in pairs], _stacked(pair[1] for pair in pairs)
    if not isinstance(inputs[0], Mapping):
        return _stacked(inputs, one_type=True), targets
    if any(not isinstance(each, Mapping) or set(each) != set(inputs[0]) for each in inputs):
        raise ValueError(f"expected inputs by the same names, those of the first: {sorted(inputs[0])}")
    return Named({name: _stacked(each[name] for each in inputs) for name in inputs[0]}), targets


def _tensor(value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected tensors, or arrays or numbers of which torch makes them, got {type(value).__name__} ({error}); "
            "give the Dataset a transform that makes tensors, such as torchvision's PILToTensor; of an array that "
            "torch does not take, np.ascontiguousarray(array, np.float32) makes one"
        ) from None


class _Pairs(TorchDataset[Any]):
    """The pairs of a user's data set; one that is no pair or cannot be read is told by its number."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Any:
        kind = type(self._data).__name__
        try:
            item = self._data[i]
        except Exception as error:  # a user's data set may raise anything
            raise ValueError(
                f"pair {i} of {kind} cannot be read ({type(error).__name__}: {error}); repair it or leave it out"
            ) from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            got = f"{type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
            raise ValueError(
                f"expected {kind} to hold pairs (input, target), got a {got} at {i}; give a Dataset of such pairs (an "
                "input may be a dict of tensors by name)"
            )
        return item


def _stored_pairs(data: _Pairs, first: Tensor) -> tuple[Stored, Tensor]:
    """Read all pairs once; inputs go into a file, in the type that they have."""
    _check_real([first])
    targets = list[Any]()

    def rows() -> Iterable[Tensor]:
        for given, target in read_all(data):
            row = _tensor(given)
            _check_shapes({tuple(first.shape), tuple(row.shape)})
            _check_types({first.dtype, row.dtype})
            _check_real([row])
            if not row.float().isfinite().all():
                raise ValueError(UNCLEAN)
            targets.append(target)
            yield row.detach().cpu()

    inputs = store(rows(), tuple(first.shape), first.dtype)
    return inputs, _stacked(targets)


def _check_types(types: set[torch.dtype]) -> None:
    if len(types) > 1 and torch.uint8 in types:  # which counts in 255ths, and all others do not
        raise ValueError(
            f"expected inputs of one shape and type, got {', '.join(sorted(map(str, types)))}; give all as "
            "torch.uint8, or as numbers of one type"
        )


def _check_shapes(shapes: set[tuple[int, ...]]) -> None:
    if len(shapes) > 1:
        raise ValueError(
            f"expected inputs of one shape and targets of one shape, got {sorted(shapes)[:3]}; resize or pad them "
            "before"
        )


def _stacked(values: Iterable[Any], one_type: bool = False) -> Tensor:
    tensors = [_tensor(value) for value in values]
    if one_type:
        _check_types({tensor.dtype for tensor in tensors})
    _check_shapes({tuple(tensor.shape) for tensor in tensors})
    return torch.stack(tensors).detach().cpu()


def is_own(name: str) -> bool:
    """Tell whether a data set's name is one that `own_dataset` gives."""
    return name.startswith("own-") and not Path(name).exists()
