"""Inputs that need not fit into memory lie in a temporary file, from which batches are read as they are asked for.

The file has no name in any folder: it is gone when the process ends, however it ends.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynrl.progress import progress
from dynrl.provenance import Numbers, along, far, standardised

IN_MEMORY = 512 << 20  # [bytes] inputs that take more than this as float32 lie in a file
PIECE = 256  # the rows that are read at a time where all are looked at


@dataclass(frozen=True, eq=False)
class Stored:
    """Stored inputs behave like a tensor [n, ...] of standardised numbers, as far as they are indexed by rows.

    Attributes:
        file: holds the raw rows, one after the other.
        form: the shape of one row.
        raw: the type of raw rows; uint8 are pixels, which count in 255ths.
        rows: [n], which rows of the file these are.
        mean, deviation: rows are raw rows less `mean`, divided by `deviation`.
        device, dtype: where rows are brought when they are read, and their type there.
        untouched: whether rows are read as they are in the file.
    """

    file: BinaryIO
    form: tuple[int, ...]
    raw: torch.dtype
    rows: np.ndarray
    mean: Numbers = 0.0
    deviation: Numbers = 1.0
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    untouched: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __deepcopy__(self, memo: Any) -> Stored:
        return self  # nothing in it changes, and an open file has no copies

    @property
    def shape(self) -> torch.Size:
        """The shape that the tensor would have."""
        return torch.Size([len(self), *self.form])

    @property
    def is_cuda(self) -> bool:
        """Whether rows are brought to a CUDA device."""
        return torch.device(self.device).type == "cuda"

    def is_floating_point(self) -> bool:
        """Rows are floating-point numbers, whatever they are in the file."""
        return True

    def dim(self) -> int:
        """The number of dimensions."""
        return 1 + len(self.form)

    def __getitem__(self, key: Any) -> Tensor:
        """Return the rows at `key` (a number, a slice or an index) as a new tensor."""
        chosen = self.rows[key.cpu().numpy() if isinstance(key, Tensor) else key]
        each = np.atleast_1d(chosen)
        raw = torch.empty(len(each), *self.form, dtype=self.raw)
        size = raw[:1].numel() * raw.element_size() if len(each) else 0
        into = _bytes(raw)
        for i, row in enumerate(each.tolist()):  # read, not mapped: mapped pages would count as memory of the process
            os.preadv(self.file.fileno(), [into[i * size : (i + 1) * size]], row * size)
        read = raw if self.untouched else self._standardised(raw).to(self.device, self.dtype)
        return read if np.ndim(chosen) else read[0]

    def _standardised(self, raw: Tensor) -> Tensor:
        if blurs(self.raw, self.mean, self.deviation):
            return standardised(raw, self.mean, self.deviation)
        read = raw.float() / 255 if self.raw == torch.uint8 else raw.float()
        return (read - along(self.mean, read)).div_(along(self.deviation, read))

    @property
    def given(self) -> Stored:
        """The same inputs, which are read as they are in the file."""
        return replace(self, dtype=self.raw, untouched=True)

    def part(self, rows: Any) -> Stored:
        """Return these rows as inputs that are stored; nothing is read."""
        return replace(self, rows=self.rows[rows])

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield pieces of `size` rows."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Stored:
        """Return the same inputs, to be brought to `device` as `dtype` when they are read."""
        return replace(self, device=torch.device(device), dtype=dtype or self.dtype)

    def standardised(self, mean: Numbers, deviation: Numbers) -> Stored:
        """Return the same raw inputs, to be standardised otherwise when they are read."""
        return replace(self, mean=mean, deviation=deviation)

    def digest(self) -> str:
        """Return a hash of the raw rows."""
        found = hashlib.sha256(f"{self.raw}{self.form}".encode())
        for piece in self.given.split(PIECE):
            found.update(_bytes(piece.float() / 255 if self.raw == torch.uint8 else piece))
        return found.hexdigest()


def too_large(count: int, shape: tuple[int, ...]) -> bool:
    """Tell whether so many inputs of a shape are stored in a file rather than held in memory."""
    return 4 * count * int(np.prod(shape)) > IN_MEMORY


def store(rows: Iterable[Any], shape: tuple[int, ...], raw: torch.dtype) -> Stored:
    """Write raw rows into a temporary file (in the folder that the variable TMPDIR names) and return them, stored.

    Rows of other types than `raw` make all of a type that holds both, as `torch.stack` does.
    """
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the inputs)
    count = 0
    for row in map(torch.as_tensor, rows):
        if (both := torch.promote_types(raw, row.dtype)) != raw:
            file.flush()
            before = Stored(file, shape, raw, np.arange(count)).given
            file = store((each.to(both) for piece in before.split(PIECE) for each in piece), shape, both).file
            raw = both
        file.write(_bytes(row.to(raw)))
        count += 1
    file.flush()
    return Stored(file, shape, raw, np.arange(count))


def _bytes(numbers: Tensor) -> memoryview:
    """Return the memory of numbers of any type; NumPy does not have all types of torch."""
    return numbers.contiguous().view(-1).view(torch.uint8).numpy().data


def blurs(raw: torch.dtype, mean: Numbers, deviation: Numbers) -> bool:
    """Tell whether float32 would blur raw numbers of a type: they are far from 0, and have more digits."""
    return raw not in (torch.uint8, torch.float32) and far(mean, deviation)


class _Caught(Dataset[Any]):
    """A data set whose items are those of another, or what was raised there: workers would wrap it in their own."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        try:
            return self.items[i]
        except Exception as error:
            return error


def _first(batch: list[Any]) -> Any:
    return batch[0]


def read_all(items: Any) -> Iterator[Any]:
    """Yield the items of a data set that has a length, read in their order by a process for each free core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loader = DataLoader(_Caught(items), batch_size=1, num_workers=cores, collate_fn=_first)
    for item in progress(loader, total=len(items), desc="reading inputs", unit="input"):
        if isinstance(item, Exception):
            raise item
        yield item


def statistics(inputs: Any) -> tuple[Numbers, Numbers]:
    """Return the mean and the deviation of inputs [n, ...], for each channel where there are several.

    Inputs [n, channels, height, width] have channels. A deviation of 0 is given as 1. One thread adds up: other numbers
    of threads add in another order, and the last digit would tell the data from those that a network was trained on.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _statistics(inputs)
    finally:
        torch.set_num_threads(threads)


def _statistics(inputs: Any) -> tuple[Numbers, Numbers]:
    channels = inputs.shape[1] if inputs.dim() == 4 and inputs.shape[1] > 1 else None
    if isinstance(inputs, Tensor):
        over = (0, 2, 3) if channels else tuple(range(inputs.dim()))
        mean, deviation = inputs.mean(over), inputs.std(over)
    else:
        mean, deviation = _added(inputs, channels or 1, torch.zeros(1, dtype=torch.float64))
        if far(tuple(mean.tolist()), tuple(deviation.tolist())):  # squares of such numbers would lose how they differ
            mean, deviation = _added(inputs, channels or 1, mean)
        mean, deviation = (mean, deviation) if channels else (mean[0], deviation[0])
    if channels is None:
        return float(mean), float(deviation) or 1.0
    return tuple(mean.tolist()), tuple(each or 1.0 for each in deviation.tolist())


def _added(inputs: Any, channels: int, about: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation [channels] of inputs, added up piece by piece as differences from `about`."""
    sums = torch.zeros(3, channels, dtype=torch.float64)
    for piece in inputs.split(PIECE):
        of = piece.double().view(len(piece), channels, -1).transpose(0, 1).flatten(1) - about.unsqueeze(1)
        sums += torch.stack([torch.full((channels,), float(of.shape[1])), of.sum(1), of.square().sum(1)])
    mean = sums[1] / sums[0]
    deviation = ((sums[2] - sums[0] * mean.square()) / (sums[0] - 1)).clamp_min(0).sqrt()
    mean = about + mean
    same = deviation <= torch.finfo(torch.float64).eps * mean.abs()  # what rounding makes of equal numbers
    return mean, deviation.masked_fill(same, 0)
