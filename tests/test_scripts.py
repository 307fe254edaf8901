"""The commands: what they refuse, what they write, and that a killed training goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dynrl
from dynrl.backbones import SkipResNet, SlimmableResNet, load_backbone
from dynrl.data import Augmentation, Dataset, load_dataset
from dynrl.deploy import SHIPPED, RoutedModel
from dynrl.evaluation import score_routes
from dynrl.files import read_json, write_json
from dynrl.finetuning import Finetuning
from dynrl.observation import Layout
from dynrl.policies import Router, load_policy, save_policy
from dynrl.pretraining import metric_at_rate
from dynrl.recipes import DEFAULTS
from dynrl.scripts import bench_env, bench_model, bench_ops, gpu_check
from dynrl.scripts.cli import main
from dynrl.scripts.common import read_config
from dynrl.scripts.evaluate import BUDGETS, draw, load_runs, measure, print_table, report_runs
from dynrl.scripts.sweep import front_area
from dynrl.scripts.tables import at_half_table, report_table
from dynrl.training import folder_name, new_folder, plan, pretrain_into
from tests.cases import numbers_split

COMMAND = [sys.executable, "-m", "dynrl.scripts.cli"]
ROOT = Path(__file__).parents[1]


def call(*words, cwd, timeout=240):
    return subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory, small_backbone):
    folder = tmp_path_factory.mktemp("given")
    shutil.copyfile(small_backbone, folder / "backbone.safetensors")
    shutil.copyfile(small_backbone, folder / "plain.safetensors")
    return folder


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize(
    "words",
    [
        (), ("nosuch",), ("train", "nosuch"), ("train",), ("train", "skip", "--data", "nosuch"),
        ("train", "skip", "--nosuch", "3"), ("train", "skip", "--agent", "nosuch"), ("train", "skip", "--steps", "0"),
        ("train", "skip", "--steps", "many"), ("train", "skip", "--seed", "-1"), ("train", "skip", "--threads", "0"),
        ("train", "skip", "--price-range", "1", "0.5"), ("train", "skip", "--price-range", "0", "0.5"),
        ("train", "skip", "--backbone", "nosuch"), ("train", "skip", "--backbone", "junk.safetensors"),
        ("train", "skip", "--seed", str(2**32)), ("evaluate", ".", "--threads", "-1"), ("pretrain", "skip", "--out", "/dev/null/x"),
        ("pretrain", "skip", "--threads", "0"), ("tables", "--readme", "nosuch"),
        ("train", "skip", "--resume", "nosuch"), ("train", "skip", "--out", "."),
        ("train", "skip", "--agent", "gate", "--reward", "correct"),
        ("train", "skip", "--agent", "gate", "--num-env-runners", "1"),
        ("train", "skip", "--reward", "blockdrop"), ("train", "skip", "--baseline", "greedy"),
        ("train", "skip", "--device", "nosuch"), ("train", "skip", "--dtype", "int8"), ("pretrain", "skip", "--device", "nosuch"),
        ("train", "skip", "--agent", "gate", "--dtype", "bfloat16"), ("train", "skip", "--num-learners", "-1"),
        ("train", "skip", "--num-learners", "3"), ("train", "skip", "--device", "meta"),
        ("train", "skip", "--agent", "gate", "--address", "auto"), ("train", "hidden-update", "--policy", "upfront"), ("train", "skip", "--agent", "gate", "--cost", "time"),
        ("train", "skip", "--reward", "nosuch"), ("train", "skip", "--policy", "nosuch"), ("train", "skip", "--cost", "money"), ("pretrain", "nosuch"), ("pretrain", "skip", "--data", "nosuch"),
        ("evaluate",), ("evaluate", "nosuch"), ("evaluate", "/dev/null"), ("evaluate", "junk.safetensors"), ("evaluate", "."),
        ("bench", "nosuch"), ("bench", "env", "--rounds", "0"), ("list", "nosuch"),
        ("bench", "env", "--seconds", "2"), ("bench", "ops", "--runs", "x"), ("bench", "known", "--device", "cuda"),
    ],
)  # fmt: skip
def test_bad_commands_are_refused(words, tmp_path, monkeypatch, capsys):
    """Exit code 2, a reason, nothing written. In this process: a start costs seconds each."""
    (tmp_path / "junk.safetensors").write_bytes(os.urandom(100))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.err.strip() or said.out.strip()
    assert [p.name for p in tmp_path.iterdir()] == ["junk.safetensors"]


def test_a_bad_command_from_a_shell(tmp_path):
    done = call("train", "skip", "--data", "nosuch", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "unknown data set 'nosuch'" in done.stderr


def test_the_plain_network_comes_before_the_backbone(tmp_path, monkeypatch):
    """A run killed between the two must not be taken for pretrained when it is resumed."""
    made = []
    monkeypatch.setattr(
        "dynrl.pretraining.pretrain", lambda backbone, *a, **k: made.append(k["random_routes"]) or backbone
    )
    pretrain_into(tmp_path, plan("skip", "digits"))
    assert made == [False, True]
    assert {p.name for p in tmp_path.iterdir()} == {"plain.safetensors", "backbone.safetensors"}
    _, notes = load_backbone(tmp_path / "backbone.safetensors")
    assert notes["mean"] == load_dataset("digits").mean
    main(["pretrain", "skip", "--network", "layers=[1,2,1]", "--plain", "--out", str(tmp_path / "smaller")])
    assert made == [False, True, False]
    assert {p.name for p in (tmp_path / "smaller").iterdir()} == {"plain.safetensors", "config.json"}
    smaller, notes = load_backbone(tmp_path / "smaller" / "plain.safetensors")
    assert (smaller.max_steps, notes["random_routes"]) == (2, False)


def test_a_killed_pretraining_goes_on_by_the_same_command(tmp_path, monkeypatch, capsys):
    made, killed = [], [True]

    def pretrain(backbone, *rest, random_routes, checkpoint, **more):
        made.append(checkpoint.name)
        if random_routes and killed:
            killed.pop()
            raise KeyboardInterrupt
        return backbone

    def refused(*words):
        with pytest.raises(SystemExit) as left:
            main(words)
        return left.value.code, capsys.readouterr().err

    monkeypatch.setattr("dynrl.pretraining.pretrain", pretrain)
    out = tmp_path / "made"
    words = ["pretrain", "skip", "--network", "layers=[1,2,1]", "--out", str(out)]
    assert refused(*words)[0] == 130
    kept = (out / "config.json").read_text()
    assert "another seed" in refused(*words, "--seed", "3")[1]
    assert "another decision, network" in refused("pretrain", "exit", "--out", str(out))[1]
    main([*words, "--threads", "2"])  # where it runs may change
    assert made == ["plain.pt", "backbone.pt", "backbone.pt"]
    assert {p.name for p in out.iterdir()} == {"plain.safetensors", "backbone.safetensors", "config.json"}
    assert (out / "config.json").read_text() == kept
    (tmp_path / "else").mkdir()
    assert "no folder of dynrl pretrain" in refused("pretrain", "skip", "--out", str(tmp_path / "else"))[1]
    shutil.copyfile(SHIPPED / "skip-digits" / "config.json", tmp_path / "else" / "config.json")
    assert "no folder of dynrl pretrain" in refused("pretrain", "skip", "--out", str(tmp_path / "else"))[1]
    # It holds no policy.
    for other in (("train", "skip", "--resume"), ("evaluate",), ("calibrate",)):
        code, said = refused(*other, str(out))
        assert code == 2 and f"{out} is from dynrl pretrain" in said and f"--backbone {out}" in said
    assert {p.name for p in (tmp_path / "else").iterdir()} == {"config.json"}
    (out / "policy.safetensors").touch()  # one put there by hand: `dynrl calibrate` needs no more
    assert read_config(out)["data"] == "digits"


def test_folders_are_named_by_the_last_part_of_a_data_sets_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [new_folder(None, "exit", "/tmp/my/photos@96"), new_folder(None, "backbone", "skip", "digits")]
    assert [re.sub(r"\d{8}-\d{6}", "TIME", str(path)) for path in made] == [
        "runs/exit-photos@96-TIME", "runs/backbone-skip-digits-TIME",
    ]  # fmt: skip
    assert [folder_name(data) for data in ("digits", "/photos@96", "/a/b/photos")] == ["digits", "photos@96", "photos"]
    with pytest.raises(ValueError, match="made exists; choose another --out, .*dynrl train .*--resume"):
        (tmp_path / "made").mkdir()
        new_folder(tmp_path / "made")


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


def test_help_and_list(tmp_path):
    assert "train" in call("--help", cwd=tmp_path).stdout
    shown = call("train", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "--price-range" in shown.stdout
    listed = call("list", cwd=tmp_path).stdout
    assert "dynrl/Skip-v0" in listed
    assert "skip_resnet" in listed


def test_scripts_are_the_same_programs(tmp_path):
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts" / "list.py"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert shown.stdout == call("list", cwd=tmp_path).stdout


def test_a_run_folder_holds_what_is_promised(run):
    names = {p.name for p in run.iterdir()}
    expected = {
        "config.json",
        "checkpoints",
        "backbone.safetensors",
        "plain.safetensors",
        "policy.safetensors",
        "report.json",
    }
    assert names >= expected | {"report.png"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.startswith(".")]
    model = dynrl.load(run)
    assert model(torch.randn(2, *model.input_shape)).shape == (2, 10)


def test_report(run):
    report = read_json(run / "report.json")
    assert (report["decision"], report["data"], report["metric"]) == ("skip", "digits", "accuracy")
    assert report["seeds"] == {"learned": [0]}
    assert set(report["dense"]) >= {"accuracy", "macs", "latency_ms", "batch_size"}
    assert report["dense"]["accuracy"] == max(
        report["dense"]["all_execute_accuracy"], report["dense"]["plain_accuracy"]
    )
    backbone, _ = load_backbone(run / "backbone.safetensors")
    assert report["dense"]["macs"] == backbone.dense_macs
    keys = {
        "policy", "price", "budget", "accuracy", "macs_fraction", "router_fraction", "latency_ms", "speedup", "realised_ratio",
    }  # fmt: skip
    by_policy = {}
    for point in report["points"]:
        assert keys <= set(point)
        assert 0 <= point["accuracy"] <= 1
        by_policy.setdefault(point["policy"], []).append(point)
    assert set(by_policy) == {"learned", "random", "static", "oracle"}
    learned = {p["budget"]: p for p in by_policy["learned"]}
    assert set(learned) <= set(BUDGETS)
    for point in by_policy["random"]:
        assert point["macs_fraction"] == pytest.approx(learned[point["budget"]]["macs_fraction"], abs=0.04)
    for budget, point in learned.items():
        assert point["macs_fraction"] == pytest.approx(budget, abs=0.06)
        assert 0 < point["router_fraction"] < 0.2
    (oracle,) = by_policy["oracle"]
    assert oracle["accuracy"] >= max(p["accuracy"] for p in by_policy["static"])
    assert run.joinpath("report.png").read_bytes()[:4] == b"\x89PNG"
    # By class: together they spend what the row at half of the MACs says.
    usage, test = report["usage"], load_dataset("digits").test
    assert usage["policy"] == "learned" and [group["class"] for group in usage["groups"]] == list(range(10))
    assert sum(group["inputs"] for group in usage["groups"]) == len(test)
    for key in ("macs_fraction", "accuracy"):
        mean = sum(group["inputs"] * group[key] for group in usage["groups"]) / len(test)
        assert mean == pytest.approx(learned[0.5][key], abs=1e-6)
    shown = EventAccumulator(str(run)).Reload()
    assert shown.Tags()["images"] == ["report"]


def test_a_regression_reports_its_own_metric(tmp_path, capsys):
    split = numbers_split(48)
    dataset = Dataset("numbers", 1, split, split, split, Augmentation())
    backbone, plain = (SkipResNet((1, 8, 8), classes=1, layers=(5,), widths=(4,)).eval() for _ in range(2))
    model = RoutedModel(backbone, Router(**Layout.of(backbone).to_dict(), price_range=(0.01, 1.0), start=1))
    with torch.no_grad():
        model.policy.head.weight.normal_()
    model.curve = [(0.01, 0.9), (1.0, 0.2)]
    measured = measure(backbone, plain, {"learned": [model]}, dataset, batch_size=16)
    alone, whole = measured["dense"]["plain_mse"], measured["dense"]["all_execute_mse"]
    assert measured["dense"]["mse"] == min(alone, whole) < max(alone, whole)
    assert not any("accuracy" in key for part in (measured["dense"], *measured["points"]) for key in part)
    assert {p["policy"] for p in measured["points"]} == {"learned", "random", "static", "oracle"}
    (oracle,) = (p for p in measured["points"] if p["policy"] == "oracle")
    assert oracle["mse"] < min(p["mse"] for p in measured["points"] if p["policy"] == "static")
    report = {"decision": "skip", "data": "numbers", "metric": "mse", "seeds": {"learned": [0]}, **measured}
    print_table(report)
    assert f"{oracle['mse']:.2g}" in capsys.readouterr().out
    table = report_table(report)
    assert " mse " in table[0]
    assert f"| oracle |  | {oracle['mse']:.2g} |" in "\n".join(table)
    (group,) = measured["usage"]["groups"]
    assert group["class"] is None and group["inputs"] == 48
    draw(report, dataset.test, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def numbers_report(backbone, models):
    """The points of a report on small images; `models` are (name, the choice it favours, its curve)."""
    split = numbers_split(48)
    routed = {}
    for name, start, curve in models:
        router = Router(**Layout.of(backbone).to_dict(), price_range=(0.01, 1.0), start=start)
        routed[name] = [RoutedModel(backbone, router, curve)]
    dataset = Dataset("numbers", 1, split, split, split, Augmentation())
    return measure(backbone, None, routed, dataset, batch_size=16)["points"]


def test_a_budget_that_no_random_route_reaches_has_no_random_point():
    """A policy that runs all and pays for its router, too, spends more than any route alone can."""
    backbone = SkipResNet((1, 8, 8), classes=1, layers=(3,), widths=(4,)).eval()
    points = numbers_report(backbone, [("learned", 1, [(0.01, 0.9), (1.0, 0.2)])])
    assert all(p["macs_fraction"] > 1 for p in points if p["policy"] == "learned")
    assert {p["policy"] for p in points} == {"learned", "static", "oracle"}


def test_a_policy_that_reaches_no_budget_is_shown_at_its_lowest_price():
    backbone = SkipResNet((1, 8, 8), classes=1, layers=(3,), widths=(4,)).eval()
    points = numbers_report(backbone, [("learned", 0, [(0.01, 0.44), (1.0, 0.43)])])
    (learned,) = (p for p in points if p["policy"] == "learned")
    assert (learned["budget"], learned["price"]) == (None, pytest.approx(0.01))


def test_more_than_two_choices_are_each_shown_throughout():
    backbone = SlimmableResNet((1, 8, 8), classes=1, layers=(2,), widths=(32,)).eval()
    uniform = [p for p in numbers_report(backbone, []) if p["policy"] == "uniform"]
    assert len(uniform) == backbone.num_choices > 2
    assert uniform[0]["macs_fraction"] == 1 > uniform[-1]["macs_fraction"]
    for choice, point in zip(reversed(range(backbone.num_choices)), uniform, strict=True):
        rates = {f"{at.name}/{c}": float(c == choice) for at in backbone.points for c in range(1, at.n)}
        assert point["choice_rates"] == rates


def test_an_exported_run_is_the_plugged_one(run, tmp_path):
    main(["export", str(run), "--out", str(tmp_path / "model.pt2"), "--budget", "0.7"])
    model, inputs = dynrl.load(run), load_dataset("digits").test.inputs[:40]
    model.set_budget(0.7)
    exported = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(exported(inputs), model(inputs), atol=1e-5, rtol=1e-5)


def test_budgets_in_milliseconds(run, tmp_path, monkeypatch, capsys):
    """Times are made up: of two medians that contradict the prices, the larger one belongs to the lower price."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    others = ({"processor": "other"}, {"threads": 99}, {"torch": "1.0"})
    assert not dynrl.load(folder).latency
    with pytest.raises(ValueError, match="run: dynrl calibrate"):
        dynrl.load(folder).set_milliseconds(5)

    def medians(sides, rounds, tick, calls):
        for side in sides.values():
            side()
        times = [10.0 + 2 * i for i in range(len(sides))][::-1]
        times[0], times[1] = times[1], times[0]
        return dict(zip(sides, times, strict=True))

    monkeypatch.setattr("dynrl.evaluation.medians_in_turn", medians)
    main(["calibrate", str(folder), "--batch-size", "16"])
    assert "model.set_milliseconds(" in capsys.readouterr().out
    model = dynrl.load(folder)
    prices, times = zip(*model.latency, strict=True)
    assert prices == tuple(price for price, _ in model.curve)
    assert times == tuple(10.0 + 2 * i for i in range(len(prices)))[::-1]
    model.set_milliseconds(11.0)
    assert prices[-2] < model.price < prices[-1]
    model.set_milliseconds(times[0])
    assert model.price == pytest.approx(prices[0])
    with pytest.raises(ValueError, match=r"reaches 10\.000 to .* milliseconds"):
        model.set_milliseconds(9.0)
    assert not model.to(torch.bfloat16).latency, "times of another type"
    kept = read_json(folder / "latency.json")
    for name, value in (("policy", "other"), *(("hardware", kept["hardware"] | other) for other in others)):
        write_json(folder / "latency.json", kept | {name: value})
        assert not dynrl.load(folder).latency, "times of another policy or machine"
        write_json(folder / "latency.json", kept)
    with pytest.raises(SystemExit):
        main(["calibrate", str(folder), "--batch-size", "500"])
    assert "a batch of 500 is larger than the 180 validation inputs" in capsys.readouterr().err


def twin(run, folder, **changes):
    """A copy of a run that says it was trained otherwise."""
    shutil.copytree(run, folder)
    config = read_json(folder / "config.json")
    for group in config.values():
        group.update({name: value for name, value in changes.items() if name in group})
    write_json(folder / "config.json", config)
    return folder


def test_several_runs_make_one_report(run, tmp_path):
    before = (run / "report.json").read_text()
    report = report_runs([run, twin(run, tmp_path / "again", seed=1)], tmp_path / "out", batch_size=32)
    assert report["seeds"] == {"learned": [0, 1]}
    assert (run / "report.json").read_text() == before
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    done = call("evaluate", run, run, cwd=tmp_path)
    assert done.returncode == 2
    assert "--out" in done.stderr


@pytest.fixture(scope="module")
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


def test_a_run_is_evaluated_in_bf16(run, tmp_path):
    main(["evaluate", str(run), "--out", str(tmp_path / "bf16"), "--dtype", "bfloat16", "--batch-size", "16"])
    half, full = read_json(tmp_path / "bf16" / "report.json"), read_json(run / "report.json")
    assert (half["device"], half["dtype"], full["dtype"]) == ("cpu", "bfloat16", "float32")
    assert [(p["policy"], p["budget"]) for p in half["points"]] == [(p["policy"], p["budget"]) for p in full["points"]]
    for of, other in zip(half["points"], full["points"], strict=True):
        if of["policy"] in ("learned", "static"):  # the oracle picks what is right by chance, too
            assert of["accuracy"] == pytest.approx(other["accuracy"], abs=0.05)
            assert of["macs_fraction"] == pytest.approx(other["macs_fraction"], abs=0.05)


def test_a_finished_run_is_finetuned(run, others):
    tuned = others / "tuned"
    before, after = (load_backbone(folder / "backbone.safetensors") for folder in (run, tuned))
    assert (tuned / "backbone-pretrained.safetensors").read_bytes() == (run / "backbone.safetensors").read_bytes()
    assert before[0].fingerprint() != after[0].fingerprint()
    assert after[1] == before[1] | {"rounds": 2}
    assert dynrl.load(tuned)(torch.randn(2, 1, 24, 24)).shape == (2, 10)
    with pytest.raises(ValueError, match="trained for another backbone"):
        dynrl.plug(before[0], tuned / "policy.safetensors")
    assert read_config(tuned) == read_config(run) | {"finetune": True}


def test_runs_that_were_not_trained_alike_are_no_seeds_of_one_another(run, others, tmp_path):
    other = twin(run, tmp_path / "other", seed=1, steps=7, entropy=0.5)
    with pytest.raises(ValueError, match=r"are both 'learned' and differ in \['entropy', 'steps'\]"):
        load_runs([run, other])
    with pytest.raises(ValueError, match="of seed 0 a second time"):
        load_runs([run, twin(run, tmp_path / "again")])
    stopped = twin(run, tmp_path / "stopped", seed=1)
    router, metadata = load_policy(stopped / "policy.safetensors")
    save_policy(stopped / "policy.safetensors", router, metadata | {"finished": False})
    assert load_runs([run, stopped])[3] == {"learned": [0], "learned unfinished": [1]}
    killed = twin(run, tmp_path / "killed", seed=2, finetune=True)  # while its backbone was fine-tuned
    shutil.copyfile(run / "backbone.safetensors", killed / "backbone-pretrained.safetensors")
    with pytest.raises(ValueError, match="finetune"):
        load_runs([run, killed])


def test_one_report_of_ppo_gates_and_finetuned_runs(run, others, tmp_path, capsys):
    again = twin(run, tmp_path / "again", seed=1)
    runs = [run, others / "gate", again, others / "tuned"]
    report = report_runs(runs, tmp_path / "out", batch_size=32, smaller=others / "gate")
    assert report["seeds"] == {"learned": [0, 1], "gate": [0], "learned tuned": [0]}
    rows = [p for p in report["points"] if p["policy"] in report["seeds"]]
    assert {(p["policy"], p["runs"]) for p in rows} == {("learned", 2), ("gate", 1), ("learned tuned", 1)}
    drawn = [p["budget"] for p in report["points"] if p["policy"] == "random"]
    assert len(drawn) == len(set(drawn))
    pretrained, tuned = (
        metric_at_rate(load_backbone(folder / "backbone.safetensors")[0], load_dataset("digits").test, None)
        for folder in (run, others / "tuned")
    )
    dense = report["dense"]
    assert dense["all_execute_accuracy"] == pytest.approx(pretrained)
    assert dense["tuned_accuracy"] == pytest.approx(tuned)
    on_validation = {
        name: metric_at_rate(load_backbone(file)[0], load_dataset("digits").validation, None)
        for name, file in (
            ("all_execute", run / "backbone.safetensors"), ("plain", run / "plain.safetensors"),
            ("tuned", others / "tuned" / "backbone.safetensors"),
        )
    }  # fmt: skip
    best = [name for name, value in on_validation.items() if value == max(on_validation.values())]
    assert dense["accuracy"] in [dense[f"{name}_accuracy"] for name in best]
    smaller = next(p for p in report["points"] if p["policy"] == "smaller")
    assert smaller["accuracy"] == pytest.approx(dense["plain_accuracy"])
    assert smaller["macs_fraction"] == 1  # the twin itself, here
    assert "learned 0, 1; gate 0; learned tuned 0" in capsys.readouterr().out
    assert "| learned tuned | " in "\n".join(report_table(report))
    half = at_half_table({"out": report})
    shown = [p for p in report["points"] if p["budget"] in (0.5, None)]
    assert len(half) == 2 + 1 + len(shown) + 2
    assert [line.split(" | ")[1] for line in half[2:-2]] == ["dense", *(p["policy"] for p in shown)]


def test_settings_left_out_are_the_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr("dynrl.training.learn", lambda run, planned: False)
    for data, more in (("adding", []), ("adding", ["--num-envs", "8", "--price-range", "0.1", "2"]), ("digits", [])):
        name = f"{data}-{len(more)}"
        decision = "hidden-update" if data == "adding" else "skip"
        main(["train", decision, "--data", data, "--out", str(tmp_path / name), "--threads", "2", *more])
    row, found = DEFAULTS["hidden-update", "adding"].learning, read_config(tmp_path / "adding-0")
    assert (found["num_envs"], found["price_range"], found["steps"]) == (row.num_envs, list(row.price_range), row.steps)
    assert found["finetune"]  # no backbone survives random routes there
    found = read_config(tmp_path / "adding-5")
    assert (found["num_envs"], found["price_range"], found["hidden"]) == (8, [0.1, 2.0], 0)
    found = read_config(tmp_path / "digits-0")
    assert (found["num_envs"], found["price_range"], found["finetune"]) == (64, [0.002, 2.0], False)


def test_gates_are_resumed_by_the_command(others):
    done = torch.load(others / "gate" / "checkpoints" / "gate.pt", weights_only=True)["steps"]
    assert read_config(others / "gate")["agent"] == "gate"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynrl.scripts.evaluate.report_runs", lambda *runs: None)
        main(["train", "skip", "--resume", str(others / "gate")])
    assert torch.load(others / "gate" / "checkpoints" / "gate.pt", weights_only=True)["steps"] == done


def start(*words, cwd):
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path, pattern, process, seconds=120):
    end = time.time() + seconds
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.stdout.read()[-2000:]
        assert time.time() < end, f"no {pattern} in {path}"
        time.sleep(0.05)


def files(folder):
    """What lies in a run folder, numbers left out: event files carry times, checkpoints steps."""
    return {re.sub(r"\d+", "N", p.name.split(".tfevents")[0]) for p in folder.iterdir()}


def test_killed_and_resumed(run, backbone_folder, tmp_path, capsys):
    out = tmp_path / "killed"
    process = start("train", "skip", "--backbone", backbone_folder, "--steps", 60_000, "--out", out, cwd=tmp_path)
    wait_for(out / "checkpoints", "checkpoint_*", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done_before = max(int(p.name.split("_")[1]) for p in (out / "checkpoints").glob("checkpoint_*"))
    assert 0 < done_before < 60_000
    assert not (out / "policy.safetensors").exists()
    # Fewer steps in all, so that the test is short: what matters is where it starts and how it ends.
    config = read_json(out / "config.json")
    target = done_before + 3000
    config["learning"]["steps"] = target
    (out / "config.json").write_text(json.dumps(config))
    resumed = call("train", "skip", "--resume", out, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    done_after = max(int(p.name.split("_")[1]) for p in (out / "checkpoints").glob("checkpoint_*"))
    assert target <= done_after < target + 64 * 8 * 3
    assert files(out) == files(run)
    dynrl.load(out)
    for words, reason in ((("--resume", out, "--seed", 5), "own settings"), (("--out", out), "exists")):
        with pytest.raises(SystemExit) as refused:
            main(["train", "skip", *map(str, words)])
        assert refused.value.code == 2 and reason in capsys.readouterr().err


def test_ctrl_c_leaves_a_usable_policy(backbone_folder, tmp_path):
    out = tmp_path / "stopped"
    process = start("train", "skip", "--backbone", backbone_folder, "--steps", 10_000_000, "--out", out, cwd=tmp_path)
    wait_for(out / "checkpoints", "checkpoint_*", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to ray's processes, too
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text[-2000:]
    assert "--resume" in text
    model = dynrl.load(out)
    model(torch.randn(2, *model.input_shape))
    assert not (out / "report.json").exists()


def test_bench_env_rows(monkeypatch, capsys):
    monkeypatch.setattr(
        bench_env, "NETWORKS", {"small": {"input_shape": (1, 8, 8), "layers": (2, 2), "widths": (4, 8)}}
    )
    rows = bench_env.bench_env(rounds=1, counts=(6,))
    assert {(r["path"], r["num_envs"]) for r in rows} == {
        *((path, 6) for path in ("walk", "bare", "env", "rllib", "rllib-upfront", "rllib-stock")), ("naive", 1), ("naive", 16)
    }  # fmt: skip
    assert all(r["steps_per_s"] > 0 for r in rows)
    assert {(r["network"], r["device"], r["dtype"]) for r in rows} == {("small", "cpu", "float32")}
    capsys.readouterr()
    monkeypatch.setattr(bench_env, "find_spec", lambda name: None)  # as on a machine with torch alone
    assert [r["path"] for r in bench_env.bench_env(rounds=1, counts=(6,))] == ["walk", "bare"]
    said = capsys.readouterr().out
    assert all(word in said for word in ("gymnasium, ray", "rllib-stock", "naive"))
    with pytest.raises(ValueError, match="unknown networks"):
        bench_env.bench_env(networks=("nosuch",))


def test_bench_ops_rows(monkeypatch):
    """A time is the median over the passes: what disturbs one of them is not seen."""
    measured, counted = bench_ops.measure, []

    def disturbed(*args, **settings):
        rows = measured(*args, **settings)
        counted.append(len(rows))
        return [row | {"routed_ms": 1e9} for row in rows] if len(counted) <= 2 else rows  # the first pass

    monkeypatch.setattr(bench_ops, "measure", disturbed)
    rows = bench_ops.bench_ops(seconds=0.001, ops=("gated_cell",), batches=(2,))
    assert len(rows) == 2 * len(bench_ops.KEPT) and len(counted) == 2 * bench_ops.PASSES
    for row in rows:
        assert (row["op"], row["batch"], row["device"], row["dtype"]) == ("gated_cell", 2, "cpu", "float32")
        assert all(0 < row[f"{side}_ms"] < 1e6 for side in ("dense", "masked", "indexed", "routed"))
        assert row["realised_ratio"] == row["ideal_ms"] / row["routed_ms"]
    assert bench_ops.summary(rows) == []  # of batch 64 and more


def test_what_the_gpu_check_runs_is_there_without_ray_and_gymnasium(tmp_path):
    """Each part's call fits its function's signature, and imports no more than a GPU machine has."""
    gpu_check.lay_out(tmp_path)
    code = "\n".join([
        "import inspect, sys", "sys.modules |= dict.fromkeys(('ray', 'gymnasium', 'tyro', 'stable_baselines3'))", gpu_check.IMPORTS,
        "signatures = {f.__name__: inspect.signature(f) for f in (bench_env, bench_model, bench_ops)}",
        "bench_env, bench_model, bench_ops = (signatures[name].bind for name in ('bench_env', 'bench_model', 'bench_ops'))",
        *gpu_check.PARTS.values(),
    ])  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True
    )
    for part in gpu_check.PARTS.values():
        for name in re.findall(r"'(resnet[^']*)'", part):
            assert name in bench_env.NETWORKS


def test_bench_model_rows(monkeypatch):
    """Of a run, too, whose rows end at different points."""
    monkeypatch.setattr(bench_model, "_compiled", lambda *given: None)  # takes long
    exits = SHIPPED / "exit-digits"
    rows = bench_model.bench_model("cpu", "bfloat16", 1, ("resnet20 32x32",), (4, 9), (exits,))
    assert [(r["network"], r["policy"], r["batch"]) for r in rows] == [
        *(("resnet20 32x32", "random", n) for n in (4, 9)), *((str(exits), "learned", n) for n in (4, 9)),
    ]  # fmt: skip
    assert all(0 < r["macs_fraction"] < 1 and r["ideal_ms"] > 0 and r["routed_ms"] > 0 for r in rows)
    assert {(r["device"], r["dtype"]) for r in rows} == {("cpu", "bfloat16")}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--vary", "nosuch=1"], "names of"), (["--vary", "entropy="], "names of"),
        (["--vary", "entropy=a"], "numbers for entropy"), (["--vary", "num_envs=8,1.5"], "numbers for num_envs"),
        (["--vary", "entropy=0.1,2"], "an entropy of"), (["--vary", "learning_rate=0"], "a learning_rate above"),
        (["--vary", "baseline=group,greedy"], "compares whole routes"), (["--vary", "entropy=0.1", "entropy=0.2"], "once each"),
        (["--agent", "dqn", "--vary", "entropy=0.1"], "an entropy bonus is for"),
        (["--vary", "baseline=nosuch"], "unknown baseline"), (["--vary", "reward=nosuch"], "unknown reward"),
        (["--vary", "entropy=0.01,0.010"], "once"), (["--side-by-side", "0"], "--side-by-side"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_made(words, reason, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "skip", "--data", "digits", "--out", str(tmp_path / "x"), *words])
    assert reason in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [True, False])
def test_a_sweep_outlives_a_run_that_fails(left, tmp_path, monkeypatch, capsys):
    """Else nothing is ever ranked: what diverges does so again."""

    def result(rate, area, error=None):
        run = {
            "run": str(tmp_path / f"learning_rate={rate}"),
            "config": {"run": str(tmp_path / f"learning_rate={rate}")},
        }
        more = {} if area is None else {"quarter": 4, "steps": 9, "seconds": 1.0, "area": area}
        return SimpleNamespace(metrics=run | more, config=run["config"], path="trial", error=error)

    class Results(list):
        errors = property(lambda self: [of.error for of in self if of.error])

    failed = ValueError("Traceback\nValueError: the loss is nan")
    results = Results([result(0.5, None, failed), result(0.6, 0.95, failed)])
    results += [result(0.1, 0.7), result(0.2, 0.9)] if left else []
    monkeypatch.setattr("ray.tune.Tuner.fit", lambda self: results)
    monkeypatch.setattr("dynrl.agents.rllib.start_ray", lambda *where: True)
    monkeypatch.setattr("ray.tune.Tuner.can_restore", lambda path: False)
    monkeypatch.setattr("ray.tune.Tuner.__init__", lambda self, *given, **more: None)
    words = ["sweep", "skip", "--backbone", str(SHIPPED / "skip-digits"), "--out", str(tmp_path)]
    words += ["--vary", "learning_rate=0.1,0.2,0.5,0.6"]
    if left:
        main(words)
        said = capsys.readouterr()
        rows = read_json(tmp_path / "sweep.json")
        assert [row["run"].rpartition("=")[2] for row in rows] == ["0.2", "0.1"]  # a policy that failed is no best one
        assert "--resume" in said.out and "learning_rate=0.2" in said.out
    else:
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2 and not (tmp_path / "sweep.json").exists()
        said = capsys.readouterr()
        assert "all 2 runs" in said.err
    for rate in ("0.5", "0.6"):
        assert f"learning_rate={rate} failed: ValueError: the loss is nan" in said.err


def test_a_front_counts_the_cheapest_network_where_a_policy_has_no_point(small_backbone):
    backbone, split = load_backbone(small_backbone)[0], load_dataset("digits").validation
    full = Router(**Layout.of(backbone).to_dict(), price_range=(0.01, 1.0), start=1)
    with torch.no_grad():
        full.head.weight.zero_()
    nothing = score_routes(backbone.for_inference(), torch.zeros(len(split), 3, dtype=torch.int64), split).metric.mean()
    assert front_area(backbone, full, split) == pytest.approx(float(nothing), abs=1e-6)
