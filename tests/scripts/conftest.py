from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from dynrl.finetuning import Finetuning
from dynrl.recipes import DEFAULTS
from dynrl.scripts.cli import main


@pytest.fixture(scope="session")
def backbone_folder(once, small_backbone):
    def make(folder):
        for name in ("backbone", "plain"):
            shutil.copyfile(small_backbone, folder / f"{name}.safetensors")

    return once("given", make)


@pytest.fixture(scope="session")
def run(once, backbone_folder, request):
    """A short training by the command, report included."""

    def make(folder):
        request.getfixturevalue("ray_local")  # a start takes as long as the training
        words = ("--backbone", backbone_folder, "--steps", 24_000, "--price-range", 0.05, 20, "--out", folder / "r")
        main(["train", "skip", *map(str, words)])

    return once("runs", make) / "r"


@pytest.fixture(scope="session")
def others(run, backbone_folder, once, request):
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

    return once("others", make)
