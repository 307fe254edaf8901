"""`dynrl compare`, from end to end."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dynrl.backbones import load_backbone
from dynrl.data import load_dataset
from dynrl.deploy import SHIPPED, load
from dynrl.evaluation import COMPARED, score
from dynrl.files import read_json, write_json
from dynrl.policies import load_policy, save_policy
from dynrl.recipes import DEFAULTS
from dynrl.runs import RunKind
from dynrl.scripts import cells, compare
from dynrl.scripts.cli import main
from dynrl.settings import Learning, Problem, Settings
from dynrl.training import train
from tests.scripts.calls import twin, untuned


@pytest.mark.usefixtures("ray_local")
def test_a_matrix_is_trained_compared_and_gone_on_with(small_backbone, tmp_path, monkeypatch):
    cells = tmp_path / "skip-digits"
    (cells / "backbone").mkdir(parents=True)
    for name in ("backbone", "plain"):
        shutil.copyfile(small_backbone, cells / "backbone" / f"{name}.safetensors")
    shutil.copytree(cells / "backbone", cells / "plain-itself")
    wanted = compare.Args(("skip",), tmp_path, agents=("gate",), seeds=(0, 1), threads=1)
    row = DEFAULTS["skip", "digits"]
    short = replace(row.learning, steps=48_000, price_range=(0.05, 20.0))  # of which gates take half
    monkeypatch.setitem(DEFAULTS, ("skip", "digits"), replace(row, learning=short))
    compare.main(wanted)
    result = read_json(cells / "comparison.json")
    assert result["seeds"] == {"gate": [0, 1]} and (cells / "comparison.png").is_file()
    models = [load(cells / f"gate-{seed}") for seed in (0, 1)]
    rules = {f"threshold {name}" for name in models[0].backbone.scores}
    assert set(result["fronts"]) == {"gate", "random", "static", "smaller", "dense", "oracle"} | rules
    # By hand: both at the highest budget that both reach, on the test split.
    means = []
    reached = [b for b in result["budgets"] if all(m.curve[-1][1] < b < m.curve[0][1] for m in models)]
    at = result["budgets"].index(reached[-1])
    for model in models:
        model.set_budget(reached[-1])
        means.append(score(model, load_dataset("digits").test).metric)
    assert result["fronts"]["gate"]["metric"][at] == pytest.approx(np.mean(means), abs=1e-6)
    # One more beside them, trained at one price: it is no contender, but held against those for all prices.
    given = {"agent": "gate", "steps": 12_000, "price_range": (2.5, 2.5)}
    assert train("skip", "digits", backbone=cells / "backbone", out=cells / "alone", **given).finished
    # A second time nothing is trained: what is there stays as it is.
    before = {p: p.stat().st_mtime_ns for p in cells.glob("gate-*/policy.safetensors")}
    monkeypatch.setattr("dynrl.training.learn", lambda *_: pytest.fail("trained again"))
    main(["compare", "skip", "--out", str(tmp_path), "--agents", "gate", "--seeds", "0", "1"])
    assert before == {p: p.stat().st_mtime_ns for p in cells.glob("gate-*/policy.safetensors")}
    again = read_json(cells / "comparison.json")
    assert again["fronts"] == result["fronts"] and not result["one_price"]
    (at_one,) = again["one_price"]
    alone_score, found = score(load(cells / "alone"), load_dataset("digits").test), []
    for seed in (0, 1):
        model = load(cells / f"gate-{seed}")
        model.set_budget(alone_score.macs_fraction)
        found.append(score(model, load_dataset("digits").test))
    assert at_one["policy"] == "gate at 2.5" and at_one["one_price_metric"] == pytest.approx(alone_score.metric)
    assert at_one["metric"] == pytest.approx(np.mean([s.metric for s in found]), abs=1e-6)
    assert at_one["macs_fraction"] == pytest.approx(alone_score.macs_fraction, abs=0.1)
    assert at_one["difference"] == pytest.approx(at_one["metric"] - at_one["one_price_metric"], abs=1e-6)
    backbone, _ = load_backbone(small_backbone)
    dense = backbone.for_inference()(load_dataset("digits").test.inputs).argmax(1)
    assert result["fronts"]["smaller"]["metric"] == [None] * len(COMPARED), "it costs as much as dense"
    assert result["fronts"]["dense"]["metric"][0] == pytest.approx(
        float((dense == load_dataset("digits").test.targets).float().mean())
    )


def test_a_matrix_is_of_one_data_set_even_where_folders_bear_one_name(small_backbone, tmp_path):
    cell = tmp_path / "skip-photos"
    for folder in (cell / "backbone", cell / "gate-0"):
        folder.mkdir(parents=True)
    shutil.copyfile(small_backbone, cell / "backbone" / "backbone.safetensors")
    shutil.copyfile(small_backbone, cell / "backbone" / "plain.safetensors")
    Settings(Problem("skip", "/a/photos"), Learning("gate")).save(cell / "gate-0" / "config.json")
    wanted = compare.Args(("skip",), tmp_path, agents=("gate",), seeds=(0,))
    with pytest.raises(ValueError, match="gate-0 does not say what /a/photos held, so digits"):
        cells.train_cells(cell, "skip", "digits", wanted)


def test_runs_on_another_backbone_are_refused_before_any_training(tmp_path):
    cell, other = tmp_path / "cells" / "gate-0", tmp_path / "other"
    for folder in (cell, other):
        untuned(shutil.copytree(SHIPPED / "skip-digits", folder))
    backbone, notes = load_backbone(other / "backbone.safetensors")
    with torch.no_grad():
        next(backbone.parameters()).add_(1e-3)
    backbone.save(other / "backbone.safetensors", **notes)
    for given, reason in (
        (other, f"{cell} learned on another backbone than that in {other}"),
        (None, f"{cell} is there, but not the backbone"),
    ):
        wanted = compare.Args(("skip",), tmp_path, agents=("gate",), seeds=(1,), backbone=given)
        with pytest.raises(ValueError, match=reason):
            cells.train_cells(cell.parent, "skip", "digits", wanted)
    assert [path.name for path in cell.parent.iterdir()] == ["gate-0"]
    assert cells.train_cells(cell.parent, "skip", "digits", replace(wanted, seeds=(0,), backbone=cell))


@pytest.mark.usefixtures("ray_local")
def test_policies_learn_on_a_given_backbone_and_a_collapsed_one_is_a_row(small_backbone, tmp_path, monkeypatch, capsys):
    """Of two agents, one has learned nothing: it skips all blocks whatever the price."""
    given = tmp_path / "given"
    given.mkdir()
    shutil.copyfile(small_backbone, given / "backbone.safetensors")
    row = DEFAULTS["skip", "digits"]
    monkeypatch.setitem(
        DEFAULTS, ("skip", "digits"), replace(row, learning=replace(row.learning, price_range=(0.05, 20.0)))
    )
    words = [
        "compare",
        "skip",
        "--backbone",
        str(given),
        "--steps",
        "6000",
        "--agents",
        "gate",
        "sb3-ppo",
        "--seeds",
        "0",
    ]
    main([*words, "--out", str(tmp_path / "all")])
    cells = tmp_path / "all" / "skip-digits"
    assert sorted(path.name for path in cells.iterdir() if path.is_dir()) == ["gate-0", "sb3-ppo-0"], (
        "nothing was pretrained"
    )
    assert read_json(cells / "gate-0" / "config.json")["learning"]["steps"] == 6000
    assert (cells / "gate-0" / "backbone.safetensors").read_bytes() == small_backbone.read_bytes()
    policy, metadata = load_policy(cells / "sb3-ppo-0" / "policy.safetensors")
    save_policy(cells / "sb3-ppo-0" / "policy.safetensors", policy, metadata | {"curve": [(0.05, 1.01), (20.0, 1.0)]})
    capsys.readouterr()
    result = compare.compare_runs(cells)
    said = capsys.readouterr().out
    assert result["reachable"]["sb3-ppo"] == [1.0, 1.01]
    assert "sb3-ppo collapsed: it spends 1.01 of the dense MACs at every price" in said
    with pytest.raises(ValueError, match="poses one decision"):
        compare.main(compare.Args(("skip", "exit"), tmp_path / "x", backbone=given))


@pytest.mark.parametrize("tuned", [False, True])
def test_plain_networks_differ_in_several_settings_and_train_as_long_as_backbones(tuned, tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(
        "dynrl.training.pretrain_into",
        lambda folder, planned, plain_only=False, finetune=False: made.update(
            {folder.name: (plain_only, finetune, planned.settings.problem.network, planned.backbone.config["layers"])}
        ),
    )
    given = ("layers=[1, 2, 1] widths=[8,16,32]", "layers=[2,2,2]")
    row = DEFAULTS["skip", "digits"]
    for always in (False, True):
        monkeypatch.setitem(DEFAULTS, ("skip", "digits"), replace(row, joint=always))
        wanted = compare.Args(("skip",), tmp_path, agents=(), plain=given, finetune=tuned)
        assert cells.train_cells(tmp_path, "skip", "digits", wanted)
        end = "-tuned" if tuned or always else ""
        assert made == {
            "backbone": (False, False, (), [3, 4, 4]),
            f"plain-layers-1-2-1-widths-8-16-32{end}": (True, bool(end), ("layers=[1, 2, 1]", "widths=[8,16,32]"), [1, 2, 1]),
            f"plain-layers-2-2-2{end}": (True, bool(end), ("layers=[2,2,2]",), [2, 2, 2]),
        }  # fmt: skip
        made.clear()


@pytest.mark.parametrize("tuned", [False, True])
def test_only_plain_networks_that_are_done_and_trained_as_long_are_compared(tuned, tmp_path, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr("dynrl.evaluation.compare", lambda runs, **more: given.update(more, runs=runs) or given)
    monkeypatch.setattr("dynrl.evaluation.comparison_text", lambda result: "")
    for name in ("plain-a", "plain-b", "plain-a-tuned", "plain-b-tuned"):
        (tmp_path / name).mkdir()
        if "-a" in name:
            (tmp_path / name / "plain.safetensors").touch()
    compare.compare_runs(tmp_path, tuned)
    end, other = ("-tuned", "") if tuned else ("", "-tuned")
    assert given["smaller"] == [tmp_path / f"plain-a{end}"]
    said = capsys.readouterr().err
    assert f"left out, because it was stopped early: {tmp_path}/plain-b{end}\n" in said
    assert f"not train as long as {'tuned' if tuned else 'these'} backbones: {tmp_path}/plain-a{other}\n" in said


def matrix_of(folder, **steps):
    """A folder that has shipped runs as cells, each of so many steps."""
    for name, count in steps.items():
        twin(
            SHIPPED / "exit-digits", folder / name.replace("_", "-"), steps=count, seed=int(name[-1]), price_range=None
        )
    return {
        "agents": (read_json(SHIPPED / "exit-digits" / "config.json")["learning"]["agent"],),
        "backbone": SHIPPED / "exit-digits",
    }


@pytest.mark.parametrize(
    ("seeds", "steps", "expected"),
    [
        ((0, 1), None, 1000), ((0, 1), 1000, 1000), ((0, 1), 2000, 2000), ((0,), None, 1000),
        ((0, 1), 512, "ppo-0 was trained with steps=1000, not 512"),
        ((1,), 512, "ppo-0 was trained with steps=1000, not 512"),
        ((1,), 2000, "ppo-0 was trained with steps=1000, not 2000"),  # it is compared, and does not go on
    ],
)  # fmt: skip
def test_cells_that_could_not_be_compared_are_refused_before_they_are_trained(seeds, steps, expected, tmp_path):
    given = matrix_of(tmp_path / "exit-digits", ppo_0=1000)
    write_json(tmp_path / "exit-digits" / "comparison.json", {})
    wanted = compare.Args(("exit",), tmp_path, seeds=seeds, steps=steps, **given)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            compare.main(wanted)
        return
    found = cells.planned_cells(tmp_path / "exit-digits", "exit", "digits", wanted)
    assert {name: settings["steps"] for name, settings in found.items()} == {f"ppo-{s}": expected for s in seeds}


def test_each_price_is_a_cell_of_its_own(tmp_path):
    wanted = compare.Args(("exit",), tmp_path, agents=("ppo",), seeds=(0,), prices=(2.0, 0.1, 0.1000000001), steps=640)
    found = cells.planned_cells(tmp_path, "exit", "digits", wanted)
    assert list(found) == ["ppo-0", "ppo-at-2-0", "ppo-at-0.1-0", "ppo-at-0.1000000001-0"]
    assert [RunKind(price=price).label for price in wanted.prices] == [
        "learned at 2", "learned at 0.1", "learned at 0.1000000001",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "at least one decision"), (["nosuch"], "nosuch"), (["skip", "--plain", "nosuch=1"], "NAME=VALUE"),
        (["skip", "--plain", "layers=[1,1,1]", "layers=[1, 2, 1] nosuch=1"], "NAME=VALUE"),
        (["skip", "--data", "nosuch"], "unknown data set 'nosuch'"), (["skip", "--prices", "-1"], "price"),
        (["skip", "--seeds", "0", "-1"], "seed of at least 0"), (["exit", "hidden-update", "--data", "digits"], "no defaults for"),
        (["skip", "--agents", "ppo", "dqn", "--finetune"], "from the backbone before fine-tuning"),
        (["skip", "--agents", "gate", "--prices", "1"], "add ppo to --agents"),
    ],
)  # fmt: skip
def test_a_matrix_that_cannot_be_is_refused_before_anything_is_made(words, reason, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", *words, "--out", str(tmp_path / "x")])
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_being_made_when_it_was_killed_is_made_anew(small_backbone, tmp_path, monkeypatch):
    cell, learned = tmp_path / "skip-digits", []
    for name in ("backbone", "gate-0"):
        (cell / name).mkdir(parents=True)
    for name in ("backbone", "plain"):
        shutil.copyfile(small_backbone, cell / "backbone" / f"{name}.safetensors")
    (cell / "gate-0" / "data.json").write_text("{}")
    monkeypatch.setattr("dynrl.training.learn", lambda run, planned: learned.append((run.path, run.data)) or True)
    wanted = compare.Args(("skip",), tmp_path, agents=("gate",), seeds=(0,))
    assert not cells.train_cells(cell, "skip", "digits", wanted), "nothing was learned here, so nothing is finished"
    assert learned == [(cell / "gate-0", "digits")] and (cell / "gate-0" / "config.json").is_file()
