"""What the command lines share: threads, devices, and names of new folders."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def use_threads(count: int | None) -> None:
    """Let torch use `count` threads; None: one a core. More threads than cores slow training down several times."""
    import torch

    if count is not None and count < 1:
        raise ValueError(f"expected --threads of at least 1, got {count}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(count or cores)


def check_device(name: str) -> torch.device:
    """Return the device of that name, "cpu" or one of CUDA; a ValueError where it is not there."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # builds without CUDA assert
        raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected the device cpu or cuda, got {name!r}")
    return device


def check_batch_size(count: int) -> None:
    """Refuse a batch of no inputs."""
    if count < 1:
        raise ValueError(f"expected --batch-size of at least 1, got {count}")


def folder_name(data: str) -> str:
    """What a data set is called in the names of folders: a folder of images goes by the last part of its path."""
    return Path(data).name


def new_folder(out: Path | None, *parts: str) -> Path:
    """Make the folder `out`, or `runs/<parts>-<time>`, data sets by `folder_name`; one that exists is refused."""
    folder = out or Path("runs") / "-".join([*map(folder_name, parts), time.strftime("%Y%m%d-%H%M%S")])
    if folder.exists():
        raise ValueError(
            f"{folder} exists; choose another --out, or, if it is a run, go on with it by dynrl train --resume {folder}"
        )
    folder.mkdir(parents=True)
    return folder
