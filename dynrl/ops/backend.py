"""`path` decides how an op runs. Each op is a `match` on its answer.

The environment variable `DYNRL_OPS=auto|ref|triton` is read once. `ref` runs the definitions in plain torch. `triton`
launches the kernels, and raises an error where they cannot run: it never falls back silently. `auto` compacts rows on
the CPU. On CUDA, it runs the kernels, or the vendor's own on compacted rows where these are as good.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import cache

import torch
from torch import Tensor
from torch.compiler import is_compiling

MODES = ("auto", "ref", "triton")


class Path(Enum):
    """A way to run an op."""

    REF = "the definition, in plain torch"
    TRACED = "what torch.compile and torch.export can carry: no value decides anything in Python"
    HOST = "compaction: the host knows how many rows made each choice"
    TRITON = "the kernels, which read these counts from the device's memory"


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"expected DYNRL_OPS to be one of {', '.join(MODES)}, got {mode!r}")
    return mode


_mode = _checked(os.environ.get("DYNRL_OPS", "auto"))
_device_counts: ContextVar[bool] = ContextVar("device_counts", default=False)
_selects: ContextVar[bool] = ContextVar("selects", default=False)


@contextmanager
def ops_mode(mode: str) -> Iterator[None]:
    """Inside this context, the ops of all threads run by `DYNRL_OPS=mode`.

    Raises:
        ValueError: there is no such mode.
    """
    global _mode
    before, _mode = _mode, _checked(mode)
    try:
        yield
    finally:
        _mode = before


@contextmanager
def device_counts(select: bool = False) -> Iterator[None]:
    """Inside this context, no op asks the host how many rows made a choice, as CUDA graphs require.

    Args:
        select: whether blocks run on all rows, of which those that chose them are then selected (`gated_residual`), and
            slices at full width (`sliced_conv`). This suits blocks that are no kernels of ours, and all that takes no
            longer than its parts.

    Raises:
        ValueError: in the ops, where the kernels cannot run.
    """
    counts, selecting = _device_counts.set(True), _selects.set(select)
    try:
        yield
    finally:
        _device_counts.reset(counts)
        _selects.reset(selecting)


@contextmanager
def float32() -> Iterator[None]:
    """Inside this context, new tensors are float32, whatever type the program has made torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def may_look() -> bool:
    """Tell whether the host may look at values of tensors: neither in traced code nor inside `device_counts`."""
    return not is_compiling() and not _device_counts.get()  # in this order, as a tracer cannot read context variables


def selects() -> bool:
    """Tell whether blocks run on all rows (`device_counts`)."""
    return not is_compiling() and _selects.get()


def path(x: Tensor, *, vendor: bool = False) -> Path:
    """Return the path for tensors like `x`.

    Args:
        x: an argument of the op.
        vendor: whether this op's host path is good on CUDA, too. If so, the kernels run only in mode `triton` and
            inside `device_counts`.

    Raises:
        ValueError: the kernels are asked for and cannot run. Either Triton is not installed, or these are CPU tensors
            and Triton does not interpret.
    """
    auto = _mode == "auto"
    if auto and not x.is_cuda and may_look():  # this is the common case, decided in one step
        return Path.HOST
    if _mode == "ref":
        return Path.REF
    if is_compiling():
        return Path.TRACED
    if auto and not _device_counts.get():
        return Path.HOST if vendor or not installed() else Path.TRITON
    why = "counts on the device are asked for" if auto else f"DYNRL_OPS={_mode}"
    if not installed():
        raise ValueError(f"{why}, but triton is not installed; install it")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{why}, but the tensors are on {x.device}; move them to a CUDA device, or use DYNRL_OPS=auto "
            "(tests on a CPU set TRITON_INTERPRET=1 before the start)"
        )
    return Path.TRITON


@cache  # looking for a package takes longer than many kernels
def installed() -> bool:
    """Tell whether there is Triton, which the kernels need."""
    return importlib.util.find_spec("triton") is not None
