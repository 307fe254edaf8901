"""What the scripts share: run folders and the report's inputs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrl.files import read_json
from dynrl.runs import flat

if TYPE_CHECKING:
    import torch

PRETRAINED = "backbone-pretrained.safetensors"  # in a run that fine-tuned its backbone: what that was before


def pretrained_file(run: Path) -> Path:
    """The backbone of a run (or of `dynrl pretrain`) as it was before any fine-tuning."""
    kept = run / PRETRAINED
    return kept if kept.is_file() else run / "backbone.safetensors"


def use_threads(count: int | None) -> None:
    """Let torch use `count` threads; None: one a core. More than cores slow training down 4 to 5 times (measured)."""
    import torch

    if count is not None and count < 1:
        raise ValueError(f"expected --threads of at least 1, got {count}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(count or cores)


def check_device(name: str) -> torch.device:
    """The device of that name, "cpu" or one of CUDA; a ValueError where it is not there."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # builds without CUDA assert
        raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected the device cpu or cuda, got {name!r}")
    return device


def folder_name(data: str) -> str:
    """What a data set is called in the names of folders: images of one's own by the last part of their path."""
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


def drop_half_made(run: Path) -> None:
    """Remove a run folder that a kill left without its settings, which are written before anything is trained."""
    if run.is_dir() and not (run / "config.json").is_file():
        shutil.rmtree(run)


def read_config(run: Path) -> dict[str, Any]:
    """The settings a run folder was made with."""
    if not run.is_dir() or not (run / "config.json").is_file():
        raise ValueError(f"{run} is no run folder: it has no config.json")
    config = flat(read_json(run / "config.json"))
    if not {"decision", "data", "seed"} <= set(config):
        raise ValueError(f"{run}/config.json is not what dynrl train writes")
    if "agent" not in config and not (run / "policy.safetensors").is_file():
        raise ValueError(
            f"{run} is from dynrl pretrain, it holds no policy; train one: "
            f"dynrl train {config['decision']} --backbone {run}"
        )
    return config


def save_picture(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, all or nothing, and close it."""
    from matplotlib import pyplot

    from dynrl.files import write_aside

    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    pyplot.close(figure)


def commit() -> str:
    """The commit of the sources this runs from, with `+` if they were changed; empty outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:  # no git on this machine
            return ""

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
