"""Which path an op takes: `DYNRL_OPS=auto|ref|triton`, read once.

`ref` is the definition in plain torch. `triton` launches the kernels, and raises where it cannot; it never falls back
in silence. `auto` takes compaction on the CPU; on CUDA the kernels, and the vendor's convolution on compacted rows
where the host may know their count.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from torch import Tensor
from torch.compiler import is_compiling

MODES = ("auto", "ref", "triton")
MODE = os.environ.get("DYNRL_OPS", "auto")
if MODE not in MODES:
    raise ValueError(f"expected DYNRL_OPS to be one of {', '.join(MODES)}, got {MODE!r}")


_device_counts: ContextVar[bool] = ContextVar("device_counts", default=False)


@contextmanager
def device_counts() -> Iterator[None]:
    """Inside, no op asks the host how many rows made a choice: kernels read it from device memory, for CUDA graphs.

    Raises:
        ValueError: in the ops, where the kernels cannot run.
    """
    token = _device_counts.set(True)
    try:
        yield
    finally:
        _device_counts.reset(token)


def counts_on_device() -> bool:
    """Whether this runs inside `device_counts`."""
    return not is_compiling() and _device_counts.get()  # a tracer cannot look at context variables


def small_steps_by_kernels(x: Tensor) -> bool:
    """Whether what is small beside the layers is worth a kernel, too: in graphs (launching one takes Python longer than
    the steps it replaces), or where Triton was asked for.

    Raises:
        ValueError: as `use_triton`.
    """
    return (counts_on_device() or (MODE == "triton" and not is_compiling())) and use_triton(x)


def on_host(x: Tensor) -> bool:
    """Whether the CPU path is to be run on tensors like `x`: the common case, told in one step."""
    return not x.is_cuda and MODE == "auto" and not is_compiling() and not _device_counts.get()


def use_ref() -> bool:
    """Whether definitions are to be run."""
    return MODE == "ref"


def use_triton(x: Tensor, vendor: bool = False) -> bool:
    """Whether the kernels are to be run on tensors like `x`.

    Args:
        x: an argument of the op.
        vendor: the host path of this op on CUDA leads to the vendor's kernels, which are taken where the host may know
            the counts.

    Raises:
        ValueError: Triton was asked for and cannot run: not installed, or CPU tensors without its interpreter.
    """
    if MODE == "ref":
        return False
    if MODE == "auto" and not _device_counts.get():
        return x.is_cuda and not vendor and _installed()
    why = f"DYNRL_OPS={MODE}" if MODE == "triton" else "counts on the device are asked for"
    if not _installed():
        raise ValueError(f"{why}, but triton is not installed; install it")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{why}, but the tensors are on {x.device}; move them to a CUDA device, or use DYNRL_OPS=auto "
            "(tests on a CPU set TRITON_INTERPRET=1 before the start)"
        )
    return True


@cache  # looking for a package takes longer than many a kernel
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
