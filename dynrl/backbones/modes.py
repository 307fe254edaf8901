"""A user's forward may turn gradients and autocast on and off; `Modes` says which of these hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch

_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Modes:
    """These are torch's modes in this thread.

    Attributes:
        grad: whether gradients are recorded.
        autocast: for the CPU and for CUDA, whether autocast is on, and its number type.
        cached: whether autocast keeps the weights that it has converted.
    """

    grad: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    cached: bool

    @classmethod
    def now(cls) -> Self:
        """Return the modes that hold now."""
        kinds = tuple((torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in _DEVICES)
        return cls(torch.is_grad_enabled(), kinds, torch.is_autocast_cache_enabled())

    def set(self) -> None:
        """Let these modes hold from now on."""
        if self == Modes.now():
            return
        torch.set_grad_enabled(self.grad)
        for device, (on, dtype) in zip(_DEVICES, self.autocast, strict=True):
            torch.set_autocast_enabled(device, on)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cached)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let these modes hold within the block; those that hold now are back behind it, whatever happens inside."""
        with kept():
            self.set()
            yield

    def since(self, begun: Modes) -> Modes:
        """Return the modes that differ here from those `begun` with, and for the rest the modes that hold now."""
        now = Modes.now()
        return Modes(
            now.grad if self.grad == begun.grad else self.grad,
            now.autocast if self.autocast == begun.autocast else self.autocast,
            now.cached if self.cached == begun.cached else self.cached,
        )


@contextmanager
def kept() -> Iterator[None]:
    """Behind the block, the modes are those before it, whatever was begun and not ended inside."""
    before = Modes.now()
    try:
        yield
    finally:
        before.set()
