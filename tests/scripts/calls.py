"""The commands as a shell calls them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dynrl.backbones import load_backbone
from dynrl.deploy import SHIPPED
from dynrl.files import read_json, write_json
from dynrl.scripts.cli import main

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


def untuned(folder):
    """Give `folder` the network of skip-digits as one that was never tuned: what it was tuned from is not shipped."""
    load_backbone(SHIPPED / "skip-digits" / "backbone.safetensors")[0].save(folder / "backbone.safetensors")
    return folder


def refusal(words, folder, capsys):
    """What a command says that ends with exit code 2 and writes nothing; in this process, as a start takes seconds."""
    (folder / "junk.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert [p.name for p in folder.iterdir()] == ["junk.safetensors"]
    said = capsys.readouterr()
    return " ".join((said.err + said.out).replace("│", " ").split())
