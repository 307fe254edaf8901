"""What all commands have in common: bad input is refused with a reason, and help tells what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress

import pytest

from dynrl.deploy import SHIPPED
from dynrl.files import make_aside
from dynrl.scripts.cli import main
from dynrl.training import folder_for, folder_name
from tests.scripts.calls import ROOT, call, refusal

RUN = "no run folder"
MODEL = str(SHIPPED / "skip-digits")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "expected a verb"), (("nosuch",), "got nosuch"), (("list", "nosuch"), "Unrecognized"),
        (("train", "skip", "--step", "5"), "Unrecognized options: --step, 5; there is --steps INT"),
        (("pretrain", "branch", "--no-plain"), "Unrecognized options: --no-plain"),  # in `train`, no plain network
        (("train", "skip", "--steps", "many"), "--steps: got ['many']; there is --steps INT"),
        (("evaluate",), "at least one run folder"), (("evaluate", "nosuch"), RUN), (("evaluate", "/dev/null"), RUN),
        (("evaluate", "junk.safetensors"), RUN), (("evaluate", "."), f". is {RUN}"),
        (("evaluate", ".", "--threads", "-1"), "--threads of at least 1, got -1"),
        (("evaluate", MODEL, "--batch-size", "0"), "batch_size of at least 1, got 0"),
        (("evaluate", MODEL, "--device", "nosuch"), "no device 'nosuch'"),
        (("evaluate", ".", "--dtype", "int8"), "--dtype"),
        (("calibrate", "."), RUN), (("calibrate", ".", "--threads", "0"), "--threads of at least 1, got 0"),
        (("calibrate", MODEL, "--batch-size", "-1"), "batch_size of at least 1, got -1"),
        (("export", "nosuch", "--out", "x.pt2"), RUN), (("export", "skip-digits", "--out", "x.txt"), "*.pt2"),
        (("export", "skip-digits", "--out", "x.pt2", "--budget", "7"), "out of reach"),
        (("tables", "nosuch"), "nosuch"), (("tables", "--results", "nosuch"), "README.md"),
        (("bench", "nosuch"), "nosuch"), (("bench", "env", "--rounds", "0"), "--rounds of at least 1, got 0"),
        (("bench", "env", "--seconds", "2"), "does not heed --seconds; its options are --rounds, --only"),
        (("bench", "ops", "--runs", "x"), "does not heed --runs"),
        (("bench", "known", "--device", "cuda"), "does not heed --device"),
        (("compare",), "--out"), (("sweep", "skip"), "--out"),
    ],
)  # fmt: skip
def test_bad_commands_are_refused(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reason in refusal(words, tmp_path, capsys)


def test_folders_are_named_by_the_last_part_of_a_data_sets_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [folder_for(None, "exit", "/tmp/my/photos@96"), folder_for(None, "backbone", "skip", "digits")]
    assert [re.sub(r"\d{8}-\d{6}", "TIME", str(path)) for path in made] == [
        "runs/exit-photos@96-TIME", "runs/backbone-skip-digits-TIME",
    ]  # fmt: skip
    assert [folder_name(data) for data in ("digits", "/photos@96", "/a/b/photos")] == ["digits", "photos@96", "photos"]
    with pytest.raises(ValueError, match="made exists; choose another --out, .*dynrl train .*--resume"):
        (tmp_path / "made").mkdir()
        with make_aside(folder_for(tmp_path / "made")):
            pass
    with pytest.raises(ValueError, match="dynrl train --resume '.*/my run'"):  # which a shell takes as one word
        (tmp_path / "my run").mkdir()
        with make_aside(folder_for(tmp_path / "my run")):
            pass


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    """`pip install dynrl` leaves out what the commands need."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tyro", None)
        with pytest.raises(SystemExit) as left:
            main(["list"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "tyro" in said and "pip install 'dynrl[train]'" in said and "'.[train]'" in said
    monkeypatch.setitem(sys.modules, "dynrl.scripts.list", None)  # a fault of dynrl's own
    with pytest.raises(ModuleNotFoundError, match=r"dynrl\.scripts\.list"):
        main(["list"])


@pytest.mark.parametrize(
    ("words", "expected"), [(["--help"], "train"), (["train", "--help"], "--price-range FLOAT FLOAT")]
)
def test_help(words, expected, capsys):
    with suppress(SystemExit):
        main(words)
    shown = capsys.readouterr().out
    assert expected in shown
    assert not {"NONETYPE", "ignore[valid-type]"} & {*shown.split()}


@pytest.mark.parametrize(
    ("verb", "said", "told"),
    [
        ("compare", (), "to go on, give the same command"), ("sweep", (), "to go on, give the same command"),
        ("list", (), "to begin anew, give the same command"), ("list", ("so it is",), "so it is"),
    ],
)  # fmt: skip
def test_who_interrupts_is_told_how_to_go_on(verb, said, told, monkeypatch, capsys):
    def stop(*given):
        raise KeyboardInterrupt(*said)

    monkeypatch.setattr("dynrl.scripts.cli._run", stop)
    with pytest.raises(SystemExit) as left:
        main([verb])
    assert left.value.code == 130 and capsys.readouterr().err == f"dynrl {verb}: interrupted; {told}\n"


def test_scripts_are_the_same_programs(tmp_path):
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts" / "list.py"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "dynrl/Skip-v0" in shown.stdout and "SkipResNet" in shown.stdout
    assert shown.stdout == call("list", cwd=tmp_path).stdout
