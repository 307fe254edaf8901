"""`dynrl evaluate`: one report of one run, of several, of several kinds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dynrl
from dynrl.backbones import load_backbone
from dynrl.data import load_dataset
from dynrl.evaluation import BUDGETS
from dynrl.evaluation.tables import by_decision_table, report_table
from dynrl.files import read_json
from dynrl.policies import load_policy, save_policy
from dynrl.runs import RunFolder, RunKind, by_kind
from dynrl.scripts.cli import main
from dynrl.scripts.evaluate import report_runs
from tests.cases import full_metric
from tests.scripts.calls import twin


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
    rules = {f"threshold {name}" for name in backbone.scores}
    assert set(by_policy) == {"learned", "random", "static", "oracle"} | rules
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


def test_several_runs_make_one_report(run, tmp_path, capsys):
    before = (run / "report.json").read_text()
    report = report_runs([run, twin(run, tmp_path / "again", seed=1)], tmp_path / "out", batch_size=32)
    assert report["seeds"] == {"learned": [0, 1]}
    assert (run / "report.json").read_text() == before
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    with pytest.raises(SystemExit) as refused:
        main(["evaluate", str(run), str(run)])
    assert refused.value.code == 2 and "--out" in capsys.readouterr().err


def test_runs_on_several_backbones_make_one_report_of_means(run, tmp_path):
    other = twin(run, tmp_path / "other", seed=1)
    backbone, notes = load_backbone(other / "backbone.safetensors")
    with torch.no_grad():
        backbone.fc.bias[0] += 1
    backbone.save(other / "backbone.safetensors", **notes)
    router, metadata = load_policy(other / "policy.safetensors")
    save_policy(other / "policy.safetensors", router, metadata | {"backbone": backbone.fingerprint()})
    both = report_runs([run, other], tmp_path / "both", batch_size=32)
    alone = [read_json(run / "report.json"), report_runs([other], tmp_path / "alone", batch_size=32)]
    assert both["backbones"] == 2 and both["seeds"] == {"learned": [0, 1]}

    def learned(report):
        return {p["budget"]: p["accuracy"] for p in report["points"] if p["policy"] == "learned"}

    first, second = map(learned, alone)
    assert first != second
    assert learned(both) == pytest.approx({b: (first[b] + second[b]) / 2 for b in first if b in second})


def test_a_report_asks_at_the_budgets_that_are_named(run, tmp_path):
    main(["evaluate", str(run), "--out", str(tmp_path / "few"), "--batch-size", "16", "--budgets", "0.55", "0.7"])
    points = read_json(tmp_path / "few" / "report.json")["points"]
    assert [p["budget"] for p in points if p["policy"] == "learned"] == [0.55, 0.7]


def test_a_run_is_evaluated_in_bf16(run, tmp_path):
    main(["evaluate", str(run), "--out", str(tmp_path / "bf16"), "--dtype", "bfloat16", "--batch-size", "16"])
    half, full = read_json(tmp_path / "bf16" / "report.json"), read_json(run / "report.json")
    assert (half["device"], half["dtype"], full["dtype"]) == ("cpu", "bfloat16", "float32")
    assert [(p["policy"], p["budget"]) for p in half["points"]] == [(p["policy"], p["budget"]) for p in full["points"]]
    for of, other in zip(half["points"], full["points"], strict=True):
        if of["policy"] in ("learned", "static"):  # the oracle picks what is right by chance, too
            assert of["accuracy"] == pytest.approx(other["accuracy"], abs=0.05)
            assert of["macs_fraction"] == pytest.approx(other["macs_fraction"], abs=0.05)


def test_runs_that_were_not_trained_alike_are_no_seeds_of_one_another(run, others, tmp_path):
    other = twin(run, tmp_path / "other", seed=1, steps=7, entropy=0.5)
    with pytest.raises(ValueError, match=r"are both 'learned' and differ in \['entropy', 'steps'\]"):
        by_kind([RunFolder(run), RunFolder(other)])
    made_apart = twin(run, tmp_path / "apart", seed=2, epochs=9)  # what made the backbone that both have matters not
    assert [len(alike) for alike in by_kind([RunFolder(run), RunFolder(made_apart)]).values()] == [2]
    with pytest.raises(ValueError, match="of seed 0 a second time"):
        by_kind([RunFolder(run), RunFolder(twin(run, tmp_path / "again"))])
    stopped = twin(run, tmp_path / "stopped", seed=1)
    router, metadata = load_policy(stopped / "policy.safetensors")
    save_policy(stopped / "policy.safetensors", router, metadata | {"finished": False})
    found = by_kind([RunFolder(run), RunFolder(stopped)])
    assert {kind.label: [of.seed for of in mine] for kind, mine in found.items()} == {
        "learned": [0], "learned unfinished": [1],
    }  # fmt: skip
    assert list(found) == [RunKind(), RunKind(finished=False)]
    killed = twin(run, tmp_path / "killed", seed=2, finetune=True)  # while its backbone was fine-tuned
    shutil.copyfile(run / "backbone.safetensors", killed / "backbone-pretrained.safetensors")
    with pytest.raises(ValueError, match="finetune"):
        by_kind([RunFolder(run), RunFolder(killed)])


def test_one_report_of_ppo_gates_and_finetuned_runs(run, others, tmp_path, capsys):
    again = twin(run, tmp_path / "again", seed=1)
    runs = [run, others / "gate", again, others / "tuned"]
    report = report_runs(runs, tmp_path / "out", batch_size=32, smaller=[others / "gate"])
    assert report["seeds"] == {"learned": [0, 1], "gate": [0], "learned tuned": [0]}
    rows = [p for p in report["points"] if p["policy"] in report["seeds"]]
    assert {(p["policy"], p["runs"]) for p in rows} == {("learned", 2), ("gate", 1), ("learned tuned", 1)}
    drawn = [p["budget"] for p in report["points"] if p["policy"] == "random"]
    assert len(drawn) == len(set(drawn))
    pretrained, tuned = (
        full_metric(load_backbone(folder / "backbone.safetensors")[0], load_dataset("digits").test)
        for folder in (run, others / "tuned")
    )
    dense = report["dense"]
    assert dense["all_execute_accuracy"] == pytest.approx(pretrained)
    assert dense["tuned_accuracy"] == pytest.approx(tuned)
    on_validation = {
        name: full_metric(load_backbone(file)[0], load_dataset("digits").validation)
        for name, file in (
            ("all_execute", run / "backbone.safetensors"), ("plain", run / "plain.safetensors"),
            ("tuned", others / "tuned" / "backbone.safetensors"),
        )
    }  # fmt: skip
    best = [name for name, value in on_validation.items() if value == max(on_validation.values())]
    assert dense["accuracy"] in [dense[f"{name}_accuracy"] for name in best]
    smaller = next(p for p in report["points"] if p["policy"].startswith("plain "))
    assert smaller["policy"] == f"plain {dense['macs'] / 1e6:.3g} MMACs"
    assert smaller["accuracy"] == pytest.approx(dense["plain_accuracy"])
    assert smaller["macs_fraction"] == 1  # the twin itself, here: no budget allows it
    assert "smaller" not in {p["policy"] for p in report["points"]}
    assert "learned 0, 1; gate 0; learned tuned 0" in capsys.readouterr().out
    assert "| learned tuned | " in "\n".join(report_table(report))
    (row,) = by_decision_table({"out": report}, [0.5])[2:]
    reached = {p["policy"]: p["accuracy"] for p in report["points"] if p["budget"] in (0.5, None)}
    assert row.startswith(
        f"| [skip, digits](results/out) | {100 * dense['accuracy']:.2f} | **{100 * reached['learned tuned']:.2f}** tuned"
    )
    kinds = {p["policy"]: p["kind"] for p in report["points"]}
    assert kinds["learned tuned"] == RunKind(tuned=True).to_dict() and kinds["gate"]["agent"] == "gate"
    assert kinds["random"] is None


def test_a_protocol_that_does_not_fit_is_refused_before_it_is_measured(run):
    with pytest.raises(ValueError, match="exits in a row for the protocol 'budgeted', got SkipResNet"):
        dynrl.evaluate(run, protocol="budgeted")
    with pytest.raises(ValueError, match="expected the protocol 'budgeted', or None for none, got 'anytime'"):
        dynrl.evaluate(run, protocol="anytime")


def test_a_report_into_a_file_is_refused_before_it_is_measured(tmp_path):
    (tmp_path / "file").touch()
    for call_ in (dynrl.evaluate, dynrl.compare):
        with pytest.raises(ValueError, match="expected a folder to write into, got the file"):
            call_([tmp_path / "run"], out=tmp_path / "file")
