"""`route`: from each row's choice to the rows sorted by choice."""

from __future__ import annotations

from bisect import bisect_left
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dynrl.ops.backend import on_host, use_triton


class Routing:
    """Rows sorted by choice; made by `route` and shared by all products of one decision.

    Attributes:
        order: [n] int64, row numbers; those of one choice stand together, in rising order.
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
        """[num_choices + 1] int32, on the device: `order[offsets[e]:offsets[e + 1]]` chose e."""
        return torch.tensor(self.ends, dtype=torch.int32)

    @cached_property
    def ends(self) -> list[int]:
        """`offsets` on the host; on CUDA this waits for the device."""
        if self._sorted is None:
            return self.offsets.tolist()
        # A tensor op costs some 30 us here, where the product before has swept the caches: count in Python.
        choices = self._sorted.tolist()
        return [bisect_left(choices, e) for e in range(self.num_choices)] + [len(choices)]

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows made each choice; on CUDA this waits for the device."""
        return [end - start for start, end in pairwise(self.ends)]

    def repeated(self, times: int) -> Routing:
        """The routing of items of which `times` neighbours make up a row and share its choice."""
        if times == 1:
            return self
        steps = torch.arange(times, device=self.order.device)
        order = (self.order.unsqueeze(1) * times + steps).flatten()
        return Routing(order, self.num_choices, sorted_choice=None, offsets=self.offsets * times)


def route_ref(choice: Tensor, num_choices: int) -> Routing:
    """The definition.

    Args:
        choice: [n] integers in 0 ... num_choices-1.
        num_choices: how many there are.
    """
    counts = (choice.unsqueeze(0) == torch.arange(num_choices, device=choice.device).unsqueeze(1)).sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return Routing(torch.argsort(choice, stable=True), num_choices, sorted_choice=None, offsets=offsets)


def route(choice: Tensor, num_choices: int) -> Routing:
    """`route_ref` in few steps: on CUDA one kernel, and no wait for the host. MACs: 0."""
    if not on_host(choice):
        if is_compiling() or not use_triton(choice):
            return route_ref(choice, num_choices)
        from dynrl.ops.kernels.route import route as kernel

        order, offsets = kernel(choice, num_choices)
        return Routing(order, num_choices, sorted_choice=None, offsets=offsets)
    values, order = torch.sort(choice, stable=True)
    return Routing(order, num_choices, sorted_choice=values, offsets=None)
