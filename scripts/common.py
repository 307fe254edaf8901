"""What the scripts share: run folders and the report's inputs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from dynrl.files import read_json, write_json


def available_cores() -> int:
    """Cores this process may use. More threads than cores slow training down 4 to 5 times (measured)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def new_folder(out: Path | None, *parts: str) -> Path:
    """Make the folder `out`, or `runs/<parts>-<time>`; one that exists is refused."""
    folder = out or Path("runs") / "-".join([*parts, time.strftime("%Y%m%d-%H%M%S")])
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another --out, or go on with it by --resume {folder}")
    folder.mkdir(parents=True)
    return folder


def read_config(run: Path) -> dict[str, Any]:
    """The settings a run folder was made with."""
    if not run.is_dir() or not (run / "config.json").is_file():
        raise ValueError(f"{run} is no run folder: it has no config.json")
    config = read_json(run / "config.json")
    if not isinstance(config, dict) or not {"decision", "data", "seed"} <= set(config):
        raise ValueError(f"{run}/config.json is not what dynrl train writes")
    return config


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Write the settings of a run folder."""
    write_json(run / "config.json", config)
