"""`partition` sorts rows by their choice."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from dynrl.ops.backend import Path, path
from dynrl.ops.move import take_rows


class Partition:
    """A partition is rows sorted by choice. `partition` makes one for all products of one decision.

    Attributes:
        order: [n] int64, the row numbers; those of one choice are neighbours, in rising order.
        num_choices: how many choices there are.
    """

    def __init__(
        self, order: Tensor, num_choices: int, *, sorted_choice: Tensor | None, offsets: Tensor | None
    ) -> None:
        self.order, self.num_choices = order, num_choices
        self._sorted = sorted_choice
        if offsets is not None:
            self.offsets = offsets

    @cached_property
    def offsets(self) -> Tensor:
        """The bounds of choices on the device, [num_choices + 1] int32: `order[offsets[e]:offsets[e + 1]]` chose e."""
        return torch.tensor(self.ends, dtype=torch.int32, device=self.order.device)

    @cached_property
    def ends(self) -> list[int]:
        """`offsets` on the host. On CUDA, this waits for the device."""
        if self._sorted is None:
            return self.offsets.tolist()
        # The product before has emptied the caches, so a tensor op takes longer here than counting in Python.
        choices = self._sorted.tolist()
        return [bisect_left(choices, e) for e in range(self.num_choices)] + [len(choices)]

    @cached_property
    def sizes(self) -> list[int]:
        """The number of rows that made each choice. On CUDA, this waits for the device."""
        return [end - start for start, end in pairwise(self.ends)]

    def repeated(self, times: int) -> Partition:
        """Return the partition of items, where each row is `times` neighbouring items that share its choice."""
        if times == 1:
            return self
        steps = torch.arange(times, device=self.order.device)
        order = (self.order.unsqueeze(1) * times + steps).flatten()
        return Partition(order, self.num_choices, sorted_choice=None, offsets=self.offsets * times)


def partition_ref(choice: Tensor, num_choices: int) -> Partition:
    """Compute the definition of `partition`.

    Args:
        choice: [n] integers in 0 ... num_choices-1.
        num_choices: how many choices there are.
    """
    counts = (choice.unsqueeze(0) == torch.arange(num_choices, device=choice.device).unsqueeze(1)).sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return Partition(torch.argsort(choice, stable=True), num_choices, sorted_choice=None, offsets=offsets)


def partition(choice: Tensor, num_choices: int) -> Partition:
    """Do `partition_ref` in fewer steps; on CUDA in one kernel, without waiting for the host."""
    match path(choice):
        case Path.REF | Path.TRACED:
            return partition_ref(choice, num_choices)
        case Path.TRITON:
            from dynrl.ops.kernels.partition import partition as kernel

            order, offsets = kernel(choice, num_choices)
            return Partition(order, num_choices, sorted_choice=None, offsets=offsets)
        case Path.HOST:
            values, order = torch.sort(choice, stable=True)
            return Partition(order, num_choices, sorted_choice=values, offsets=None)


def run_by_choice(modules: Sequence[Callable[[Tensor], Tensor]], choice: Tensor, x: Tensor) -> Tensor:
    """Return what each row's own module makes of it, the rows in their order. Differentiable.

    Args:
        modules: functions from rows [k, ...] to [k, ...], all of one form.
        choice: [n] int64, the number of each row's module.
        x: [n, ...], the rows.
    """
    part = partition(choice, len(modules))
    runs = zip(modules, pairwise(part.ends), strict=True)
    done = torch.cat(
        [module(take_rows(x, part.order[start:end])) for module, (start, end) in runs if end > start or not len(x)]
    )
    return torch.empty_like(done).index_copy(0, part.order, done)
