"""Command lines with odd values: exit code 2, one line, and nothing left."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from contextlib import suppress

import numpy as np
import pytest
import torch
from matplotlib.image import imsave

import dynrl
from dynrl.deploy import SHIPPED
from dynrl.evaluation import report_text
from dynrl.files import load_tensors, locked, read_json, write_json
from dynrl.machine import commit, hardware
from dynrl.scripts.cli import main
from dynrl.scripts.evaluate import report_runs
from tests.scripts.calls import COMMAND, untuned

MODEL = str(SHIPPED / "skip-digits")
TRAIN = ("train", "skip", "--data", "digits")
LINES = [
    *((*TRAIN, "--threads", value) for value in ("0", "1000000", "many", "")),
    *((*TRAIN, "--hidden", value) for value in ("-1", "2147483647", "1.5")), (*TRAIN, "--num-envs", "1000000000"),
    (*TRAIN, "--num-env-runners", "100000"), (*TRAIN, "--num-env-runners", "999"), (*TRAIN, "--num-learners", "99999"),
    *((*TRAIN, "--price-range", *pair) for pair in (("1e-320", "1e308"), ("nan", "1"), ("1", "inf"), ("1e-13", "1"), ("1",))),
    *((*TRAIN, "--learning-rate", value) for value in ("1e-320", "nan", "inf", "0")), (*TRAIN, "--entropy", "nan"),
    *((*TRAIN, "--network", value) for value in (
        "widths=[0,0,0]", "widths=[-8,16,32]", 'widths=["a",1,2]', "layers=[1.5,1,1]", "layers=[]", "layers=[true,1,1]",
        "layers=[99999,1,1]", "widths=[99999,99999,99999]", "layers=[[1],1,1]", "layers=[NaN,1,1]", "widths=[1000000000,1,1]",
    )),
    ("train", "expert", "--data", "digits", "--network", "channels=0"), ("train", "expert", "--data", "digits", "--network", "layers=99999"),
    ("train", "hidden-update", "--data", "sequential-digits", "--network", "hidden=99999"), ("train", "exit", "--network", "exits=[1.0]"),
    *((*TRAIN, option, "") for option in ("--out", "--resume", "--backbone", "--address", "--agent")), (*TRAIN, "--out="),
    (*TRAIN, "--out", "/dev/null/x"), (*TRAIN, "--address", "127.0.0.1:1"), (*TRAIN, "--address", "nosuch"), ("train", "skip", "--data", "x" * 300),
    *(("compare", "skip", "--out", "x", *more) for more in (
        ("--seeds", "0", "0"), ("--agents", "ppo", "ppo"), ("--prices", "1", "1"), ("--prices", "1e-320"), ("--plain", "layers=[0,0,0]"),
        ("--threads", "1000000"), ("skip",),
    )),
    *(("sweep", "skip", "--data", "digits", "--out", "x", *more) for more in (
        ("--steps", "0"), ("--side-by-side", "1000000"), ("--vary", "hidden=2147483647"), ("--vary", "learning_rate=1e-320"), ("--backbone", "nosuch"),
    )),
    ("pretrain", "skip", "--threads", "1000000"), ("pretrain", "skip", "--out", ""), ("demo", "--threads", "1000000"), ("demo", "--out", ""),
    ("evaluate", MODEL, "--batch-size", "1" + "0" * 30, "--out", "x"), ("calibrate", MODEL, "--batch-size", "2147483648"),
    ("export", MODEL, "--out", "x.pt2", "--budget", "nan"), ("export", MODEL, "--out", ""), ("bench", "ops", "--seconds", "nan"),
    ("bench", "env", "--batches", "1000000000"), ("bench", "ops", "--threads", "1000000"), ("bench", "env", "--rounds", "10000000000"),
    ("bench", "model", "--runs", "nosuch"), ("bench", "env", "--out", "/dev/null/x"), ("tables", "nosuch.md"), ("list", "--x"),
]  # fmt: skip


def refused(words, capsys):
    """What a refused command says, in one line."""
    with pytest.raises(SystemExit) as left:
        main(words)
    lines = capsys.readouterr().err.strip().splitlines()
    assert (left.value.code, len(lines)) == (2, 1), lines
    return lines[0]


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("words", LINES, ids=lambda words: " ".join(words)[:60])
def test_odd_values_end_in_one_line_and_leave_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(words, capsys)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(tmp_path):
    shutil.copytree(SHIPPED / "skip-digits", tmp_path / "run")
    return tmp_path / "run"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


TIMES = {"start": 1.0, "choices": [[0.1, 0.2]] * 9, "batch_size": 256, "device": "cpu", "hardware": {}}
LATENCY = {
    "curve": [[0.1, 2.0], [0.2, 1.0]],
    "batch_size": 8,
    "policy": "0",
    "date": "2026-11-28",
    "hardware": hardware(),
}
RECIPE = {
    "epochs": 2, "batch_size": 100, "learning_rate": 0.1, "weight_decay": 0.0, "label_smoothing": 0.0, "rates": [0.5],
    "full_share": 0.1, "optimizer": "sgd", "plain_epochs": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "good", "changes", "reason"),
    [
        ("times.json", TIMES, {"start": "1"}, "start: expected float"), ("times.json", TIMES, {"start": 0}, "more before the first choice"),
        ("times.json", TIMES, {"choices": [[0.1, 0.2]]}, "expected times"), ("times.json", TIMES, {"choices": [[0.1, -1]] * 9}, "at least 0"),
        ("latency.json", LATENCY, {"curve": [[0.1]]}, "curve: expected"), ("latency.json", LATENCY, {"hardware": 3}, "hardware: expected"),
        ("recipe.json", RECIPE, {"epochs": 0}, "epochs of at least 1"), ("recipe.json", RECIPE, {"rates": [2]}, "rates between 0 and 1"),
        ("recipe.json", RECIPE, {"optimizer": "x"}, "optimizer: expected"), ("recipe.json", RECIPE, {"learning_rate": -1}, "learning_rate above 0"),
        ("config.json", None, {"seed": "0"}, "seed: expected int"), ("config.json", None, {"steps": 0}, "steps of at least 1"),
        ("config.json", None, {"hidden": 2**31 - 1}, "hidden of at least 0 and below"), ("config.json", None, {"price_range": [0, 1]}, "price range"),
        ("config.json", None, {"network": ["widths=[0,0,0]"]}, ""), ("config.json", None, {"data": 3}, "data: expected str"),
    ],
)  # fmt: skip
def test_altered_run_folders_are_refused_by_file_and_field_and_left_alone(name, good, changes, reason, run, capsys):
    written = read_json(run / "config.json") if good is None else dict(good)
    for group in (written["problem"], written["learning"]) if good is None else (written,):
        group |= {key: value for key, value in changes.items() if key in group}
    (run / name).write_text(json.dumps(written))
    if name == "config.json" and "network" in changes:  # it is built by these settings only where there is no backbone
        for file in ("backbone.safetensors", "policy.safetensors"):
            (run / file).unlink()
    before = content(run)
    words = (
        ("export", str(run), "--out", str(run / "x.pt2"))
        if name == "latency.json"
        else ("train", "skip", "--resume", str(run))
    )
    said = refused(words, capsys)
    assert reason in said and (str(run / name) in said or "network" in changes)
    assert content(run) == before


def test_a_report_that_is_none_is_named(run, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- table:run -->\n<!-- end -->\n")
    for wrong in ({}, [], {"metric": "accuracy"}, {"metric": []}):
        write_json(run / "report.json", wrong)
        assert str(run / "report.json") in refused(("tables", str(page), "--results", str(tmp_path)), capsys)


def test_a_second_resume_is_refused(run, capsys):
    before = content(run)
    with locked(run):
        assert "in use by another process" in refused(("train", "skip", "--resume", str(run)), capsys)
    assert content(run) == before


@pytest.mark.parametrize(
    ("verb", "first"),
    [
        ("evaluate", "dynrl.evaluation.report.by_backbone"), ("attack", "dynrl.runs.plug"),
        ("calibrate", "dynrl.runs.plug"),
    ],
)  # fmt: skip
def test_what_is_measured_on_a_run_holds_its_folder_before_it_reads_the_policy(verb, first, run, monkeypatch, capsys):
    """Else a training that ends meanwhile has the figures of the policy from before beside it."""

    def read(*given):
        with locked(run):
            raise ValueError("the folder is free")

    before = content(run)
    with locked(run):
        assert "in use by another process" in refused((verb, str(run)), capsys)
    monkeypatch.setattr(first, read)
    assert "in use by another process" in refused((verb, str(run)), capsys)
    assert content(run) == before


@pytest.mark.parametrize("lost", [("policy",), ("policy", "backbone")], ids=" ".join)
@pytest.mark.parametrize(
    "words", [("evaluate",), ("calibrate",), ("attack",), ("export", "--out", "x.pt2")], ids=lambda words: words[0]
)
def test_a_run_without_a_policy_yet_is_told_how_to_go_on(words, lost, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    untuned(run)
    for name in lost:
        (run / f"{name}.safetensors").unlink()
    before = content(run)
    assert "run has no policy yet; go on with: dynrl train skip --resume run" in refused((*words, "run"), capsys)
    config = read_json(run / "config.json")
    write_json(run / "config.json", {"problem": config["problem"], "plain": False, "finetune": False})
    assert "run is from dynrl pretrain, it holds no policy; train one" in refused((*words, "run"), capsys)
    (run / "config.json").write_text("{}")
    assert "has no policy yet" not in refused((*words, "run"), capsys)
    assert content(run).keys() == before.keys() and not (tmp_path / "x.pt2").exists()


@pytest.fixture
def given(tmp_path_factory):
    return str(untuned(tmp_path_factory.mktemp("given")))


def test_a_full_disk_leaves_no_half_made_folder(given, tmp_path, monkeypatch, capsys):
    def full(*files):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    assert "No space left" in refused((*TRAIN, "--backbone", given, "--out", str(tmp_path / "new" / "run")), capsys)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_takes_the_picture_in_tensorboard_and_not_the_table(run, monkeypatch, capsys):
    """A file's limit stands for the disk."""
    report = read_json(run / "report.json")
    imsave(run / "report.png", np.random.default_rng(0).random((100, 100, 3)))
    monkeypatch.setattr("dynrl.evaluation.evaluate", lambda *runs, **how: report)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.warns(UserWarning, match=r"TensorBoard shows no .*report\.png \(OSError: .*too large"):
            report_runs([run], run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr()
    assert report_text(report) in said.out and "Traceback" not in said.err
    assert (run / "report.png").is_file()


@pytest.mark.parametrize("words", [("export", "--out", "x/x.pt2"), ("calibrate",)], ids=lambda words: words[0])
def test_a_folder_that_cannot_be_written_into_is_refused_before_the_work(words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda *given: False)  # these tests may run as root, who may write anywhere
    monkeypatch.setattr("dynrl.evaluation.timing.medians_in_turn", None)
    monkeypatch.setattr("torch.export.export", None)
    before = content(run)
    assert "is not writable; choose another" in refused((*words, "run"), capsys)
    assert content(run) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_alike(number, given, tmp_path):
    """With the policy so far, exit code 130, and what to do next; in ray, too, whose answer to SIGTERM is an abort."""
    words = [
        *COMMAND,
        *TRAIN,
        "--backbone",
        given,
        "--steps",
        "10000000",
        "--num-envs",  # few, so that the first checkpoint comes soon
        "8",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while process.poll() is None and not list(tmp_path.glob("run/checkpoints/*[0-9s]")):
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=140)
    assert process.returncode == 130, said[-2000:]
    assert "ray" not in said, "who trains a policy need not know what trains it"
    assert said.strip().endswith(
        f"interrupted; the policy so far is kept; go on with: dynrl train skip --resume {tmp_path / 'run'}"
    )
    assert load_tensors(tmp_path / "run" / "policy.safetensors", "policy")[1]["finished"] is False
    model = dynrl.load(tmp_path / "run")
    model(torch.randn(2, *model.input_shape))
    assert not (tmp_path / "run" / "report.json").exists()
    assert not list(tmp_path.glob("run/**/.*"))


def test_a_report_names_the_commit_of_dynrl_or_none(tmp_path, monkeypatch):
    """Not that of a repository that a virtual environment or a copy lies in."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "file").touch()
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *words], check=True)
    inside = tmp_path / "env" / "dynrl"
    inside.mkdir(parents=True)
    own = commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert commit() == own
    monkeypatch.setattr("dynrl.machine.__file__", str(inside / "machine.py"))
    assert commit() == ""
