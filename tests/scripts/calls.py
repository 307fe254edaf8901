"""The commands as a shell calls them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from dynrl.files import read_json, write_json

COMMAND = [sys.executable, "-m", "dynrl.scripts.cli"]
ROOT = Path(__file__).parents[2]


def call(*words, cwd, timeout=240):
    return subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False
    )


def twin(run, folder, **changes):
    """A copy of a run that says it was trained otherwise."""
    shutil.copytree(run, folder)
    config = read_json(folder / "config.json")
    for group in config.values():
        group.update({name: value for name, value in changes.items() if name in group})
    write_json(folder / "config.json", config)
    return folder
