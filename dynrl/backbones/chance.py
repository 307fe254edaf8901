"""A user's forward may draw random numbers in training: from Python's, NumPy's and torch's own generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def drawing(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether anything was drawn within the block; behind the block, nothing was.

    In it, draws on the CPU are always the same.
    """
    before = _states(device)
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    begun = _told(_states(device))
    try:
        yield lambda: _told(_states(device)) != begun
    finally:
        python, numpy, cpu, cuda = before
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def _states(device: torch.device) -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _told(states: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the states as values that can be compared."""
    python, numpy, cpu, cuda = states
    numbers = tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in numpy)
    return python, numbers, cpu.tolist(), None if cuda is None else cuda.tolist()
