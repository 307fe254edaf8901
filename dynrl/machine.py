"""Measured figures depend on the machine and on the sources, which are described here."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any, get_args

import torch

from dynrl.schema import Dtype, check_one_of

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}


def hardware() -> dict[str, Any]:
    """Return the processor, the number of threads and the versions."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str:
    """Return the commit of the running sources, with `+` if they were changed; it is empty outside dynrl's checkout.

    A virtual environment or a copy of dynrl may lie inside another repository, whose commit would say nothing.
    """
    root = Path(__file__).resolve().parents[1]
    about = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as git's hooks set

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, env=about).stdout.strip()
        except OSError:  # no git on this machine
            return ""

    if Path(git("rev-parse", "--show-toplevel") or "/") != root or not git("ls-files", "dynrl/machine.py"):
        return ""
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def check_device(name: str | torch.device) -> torch.device:
    """Return the device of that name, the CPU or one of CUDA; raise a ValueError if it is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # builds without CUDA assert
        raise ValueError(
            f"no device '{name}' here: {str(error).splitlines()[0]}; expected cpu, or cuda on a machine that has a GPU"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected the device cpu or cuda, got '{name}'")
    return device


def check_dtype(name: str) -> torch.dtype:
    """Return the dtype of that name, or raise a ValueError that lists the names."""
    check_one_of("dtype", name, DTYPES)
    return DTYPES[name]
