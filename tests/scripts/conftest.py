from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from dynrl.finetuning import Finetuning
from dynrl.recipes import DEFAULTS
from dynrl.scripts.cli import main
from tests.scripts.calls import call


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory, small_backbone):
    folder = tmp_path_factory.mktemp("given")
    shutil.copyfile(small_backbone, folder / "backbone.safetensors")
    shutil.copyfile(small_backbone, folder / "plain.safetensors")
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, backbone_folder):
    """A short training by the command, report included."""
    out = tmp_path_factory.mktemp("runs") / "r"
    done = call(
        "train",
        "skip",
        "--backbone",
        backbone_folder,
        "--steps",
        40_000,
        "--price-range",
        0.05,
        20,
        "--out",
        out,
        cwd=out.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="session")
def others(run, backbone_folder, tmp_path_factory):
    """Gates beside the run, and the run itself gone on with, fine-tuned."""
    folder = tmp_path_factory.mktemp("others")
    shutil.copytree(run, folder / "tuned")
    row = replace(DEFAULTS["skip", "digits"], finetuning=Finetuning(rounds=2, epochs=0.5, steps=4096))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEFAULTS, ("skip", "digits"), row)
        patch.setattr("dynrl.scripts.evaluate.report_runs", lambda *runs: None)  # there will be one of all
        words = ["--backbone", backbone_folder, "--steps", 20_000, "--price-range", 0.05, 20, "--out", folder / "gate"]
        main(["train", "skip", "--agent", "gate", *map(str, words)])
        main(["train", "skip", "--resume", str(folder / "tuned"), "--finetune"])
    return folder
