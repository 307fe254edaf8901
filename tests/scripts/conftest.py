from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace

import pytest

from dynrl.finetuning import Finetuning
from dynrl.recipes import DEFAULTS
from dynrl.scripts.cli import main


def once(tmp_path_factory, name, make):
    """The folder that `make(folder)` fills, made by whichever of pytest's processes asks first."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder, done = shared / name, shared / f"{name}.done"
    try:
        folder.mkdir()
    except FileExistsError:
        for _ in range(3000):
            if done.exists():
                assert done.read_text() == "made", f"{name} could not be made, see the other process"
                return folder
            time.sleep(0.2)
        raise
    state = "failed"
    try:
        make(folder)
        state = "made"
    finally:
        done.write_text(state)
    return folder


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory, small_backbone):
    def make(folder):
        for name in ("backbone", "plain"):
            shutil.copyfile(small_backbone, folder / f"{name}.safetensors")

    return once(tmp_path_factory, "given", make)


@pytest.fixture(scope="session")
def run(tmp_path_factory, backbone_folder, request):
    """A short training by the command, report included."""

    def make(folder):
        request.getfixturevalue("ray_local")  # a start takes as long as the training
        words = ("--backbone", backbone_folder, "--steps", 40_000, "--price-range", 0.05, 20, "--out", folder / "r")
        main(["train", "skip", *map(str, words)])

    return once(tmp_path_factory, "runs", make) / "r"


@pytest.fixture(scope="session")
def others(run, backbone_folder, tmp_path_factory, request):
    """Gates beside the run, and the run itself gone on with, fine-tuned."""

    def make(folder):
        request.getfixturevalue("ray_local")
        shutil.copytree(run, folder / "tuned")
        row = replace(DEFAULTS["skip", "digits"], finetuning=Finetuning(rounds=2, epochs=0.5, steps=4096))
        words = ["--backbone", backbone_folder, "--steps", 20_000, "--price-range", 0.05, 20, "--out", folder / "gate"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(DEFAULTS, ("skip", "digits"), row)
            patch.setattr("dynrl.scripts.evaluate.report_runs", lambda *runs: None)  # there will be one of all
            main(["train", "skip", "--agent", "gate", *map(str, words)])
            main(["train", "skip", "--resume", str(folder / "tuned"), "--finetune"])

    return once(tmp_path_factory, "others", make)
