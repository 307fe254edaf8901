"""Comparisons: fronts on known numbers, intervals that cover, and the command from end to end."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dynrl import comparison as cp
from dynrl.backbones import load_backbone
from dynrl.data import load_dataset
from dynrl.deploy import load
from dynrl.evaluation import affordable, score
from dynrl.files import read_json, write_json
from dynrl.recipes import DEFAULTS
from dynrl.scripts.cli import main
from dynrl.tasks import CLASSIFICATION, Regression
from dynrl.training import train


def constant(value: float, count: int = 8) -> torch.Tensor:
    return torch.full((count,), value)


def test_a_front_has_what_every_seed_reaches_and_its_area_is_the_mean_over_the_budgets_of_both():
    def reach(least, slope):
        return lambda budget: None if budget < least else (constant(slope * budget), budget)

    ours = cp.Front.of([reach(0.35, 1.0), reach(0.3, 3.0)], 8)
    theirs = cp.Front.of([cp.fixed_reach(constant(0.5), 0.2)], 8)
    assert ours.reached.tolist() == [b >= 0.35 for b in cp.BUDGETS] and theirs.reached.all()
    # Of lines the trapezoidal rule gives the value in the middle, here of 0.4 to 0.9.
    torch.testing.assert_close(cp.area(ours, ours.reached), torch.stack([constant(0.65), constant(1.95)]))
    found = cp.differences(ours, theirs, CLASSIFICATION)
    assert set(found) == {"area", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"}
    assert found["area"]["difference"] == pytest.approx(1.3 - 0.5)
    assert found["0.5"]["difference"] == pytest.approx(1.0 - 0.5)


def test_out_of_reach_takes_the_nearest_cheaper_point_and_too_dear_takes_none():
    known = [("middle", 0.4, 0.9), ("cheap", 0.2, 0.8), ("same", 0.4, 0.9), ("worse", 0.7, 0.85)]
    assert affordable(known, 0.9, CLASSIFICATION) == "middle"
    assert affordable(known, 0.39, CLASSIFICATION) == "cheap"
    assert affordable(known, 0.1, CLASSIFICATION) is None


def test_a_regressions_differences_are_in_its_own_units():
    ours, theirs = (cp.Front.of([cp.fixed_reach(torch.full((8,), mse), 0.3)], 8) for mse in (0.01, 0.11))
    found = cp.differences(ours, theirs, Regression(variance=1 / 6))
    assert found["area"]["difference"] == pytest.approx(0.1), "less of it is better"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Sides of three seeds on 300 inputs: what inputs have in common cancels, what seeds differ in does not."""
    rng, hits, widths = np.random.default_rng(0), 0, []
    for _ in range(60):
        common = rng.normal(0, 3, 300)
        ours, theirs = (
            torch.tensor(common + shift + rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.5, (3, 300))).float()
            for shift in (0.1, 0.0)
        )
        difference, low, high = cp.paired(ours, theirs)
        assert low < difference < high
        hits += low <= 0.1 <= high
        widths.append(high - low)
    assert hits >= 54  # 57 are to be expected
    assert np.mean(widths) < 0.25, "what is common to both sides must not widen the interval"
    same = torch.randn(1, 50)
    assert cp.paired(same, same) == (0.0, 0.0, 0.0)


def test_what_the_networks_of_a_seed_have_in_common_cancels():
    rng = np.random.default_rng(0)
    networks, inputs = rng.normal(0, 0.2, (3, 1)), rng.normal(0, 3, 300)
    ours, theirs = (
        torch.tensor(networks + inputs + shift + rng.normal(0, 0.1, (3, 300))).float() for shift in (0.1, 0.0)
    )
    apart, together = cp.paired(ours, theirs), cp.paired(ours, theirs, by_seed=True)
    assert apart[0] == together[0] == pytest.approx(0.1, abs=0.02)
    assert together[1] < 0.1 < together[2] and together[2] - together[1] < 0.1 < apart[2] - apart[1]
    assert cp.paired(ours[:1], theirs[:1], by_seed=True) == cp.paired(ours[:1], theirs[:1])


@pytest.mark.usefixtures("ray_local")
def test_a_matrix_is_trained_compared_and_gone_on_with(small_backbone, tmp_path, monkeypatch):
    cells = tmp_path / "skip-digits"
    (cells / "backbone").mkdir(parents=True)
    for name in ("backbone", "plain"):
        shutil.copyfile(small_backbone, cells / "backbone" / f"{name}.safetensors")
    shutil.copytree(cells / "backbone", cells / "plain-itself")
    from dynrl.scripts import compare

    wanted = compare.Args(("skip",), tmp_path, agents=("gate",), seeds=(0, 1), threads=1)
    row = DEFAULTS["skip", "digits"]
    short = replace(row.learning, steps=48_000, price_range=(0.05, 20.0))  # of which gates take half
    monkeypatch.setitem(DEFAULTS, ("skip", "digits"), replace(row, learning=short))
    compare.main(wanted)
    result = read_json(cells / "comparison.json")
    assert result["seeds"] == {"gate": [0, 1]} and (cells / "comparison.png").is_file()
    assert set(result["fronts"]) == {"gate", "random", "static", "smaller", "dense", "oracle"}
    # By hand: both at the highest budget that both reach, on the test split.
    models, means = [load(cells / f"gate-{seed}") for seed in (0, 1)], []
    reached = [b for b in result["budgets"] if all(m.curve[-1][1] < b < m.curve[0][1] for m in models)]
    at = result["budgets"].index(reached[-1])
    for model in models:
        model.set_budget(reached[-1])
        means.append(score(model, load_dataset("digits").test).metric)
    assert result["fronts"]["gate"]["metric"][at] == pytest.approx(np.mean(means), abs=1e-6)
    # One more beside them, trained at one price: it is no contender, but held against those for all prices.
    given = {"agent": "gate", "steps": 12_000, "price_range": (2.0, 2.0)}
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
    assert at_one["policy"] == "gate at 2" and at_one["one_price_metric"] == pytest.approx(alone_score.metric)
    assert at_one["metric"] == pytest.approx(np.mean([s.metric for s in found]), abs=1e-6)
    assert at_one["macs_fraction"] == pytest.approx(alone_score.macs_fraction, abs=0.1)
    assert at_one["difference"] == pytest.approx(at_one["metric"] - at_one["one_price_metric"], abs=1e-6)
    backbone, _ = load_backbone(small_backbone)
    dense = backbone.for_inference()(load_dataset("digits").test.inputs).argmax(1)
    assert result["fronts"]["smaller"]["metric"] == [None] * len(cp.BUDGETS), "it costs as much as dense"
    assert result["fronts"]["dense"]["metric"][0] == pytest.approx(
        float((dense == load_dataset("digits").test.targets).float().mean())
    )


def test_a_matrix_is_of_one_data_set_even_where_folders_bear_one_name(small_backbone, tmp_path):
    from dynrl.scripts import compare

    cell = tmp_path / "skip-photos"
    for folder in (cell / "backbone", cell / "gate-0"):
        folder.mkdir(parents=True)
    shutil.copyfile(small_backbone, cell / "backbone" / "backbone.safetensors")
    shutil.copyfile(small_backbone, cell / "backbone" / "plain.safetensors")
    write_json(cell / "gate-0" / "config.json", {"decision": "skip", "data": "/a/photos", "seed": 0, "agent": "gate"})
    wanted = compare.Args(("skip",), tmp_path, agents=("gate",), seeds=(0,))
    with pytest.raises(ValueError, match="gate-0 was trained on /a/photos, not digits"):
        compare.train_cells(cell, "skip", "digits", wanted)


@pytest.mark.parametrize(
    "words",
    [
        [], ["nosuch"], ["skip", "--plain", "nosuch=1"], ["skip", "--data", "nosuch"], ["skip", "--prices", "-1"],
        ["skip", "--seeds", "0", "-1"], ["exit", "hidden-update", "--data", "digits"],
        ["skip", "--agents", "ppo", "dqn", "--finetune"],
    ],
)  # fmt: skip
def test_a_matrix_that_cannot_be_is_refused_before_anything_is_made(words, tmp_path):
    with pytest.raises(SystemExit):
        main(["compare", *words, "--out", str(tmp_path / "x")])
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_being_made_when_it_was_killed_is_made_anew(small_backbone, tmp_path, monkeypatch):
    from dynrl.scripts import compare

    cell, learned = tmp_path / "skip-digits", []
    for name in ("backbone", "gate-0"):
        (cell / name).mkdir(parents=True)
        shutil.copyfile(small_backbone, cell / name / "backbone.safetensors")
    shutil.copyfile(small_backbone, cell / "backbone" / "plain.safetensors")
    monkeypatch.setattr("dynrl.training.learn", lambda run, planned: learned.append((run.path, run.data)) or True)
    assert compare.train_cells(cell, "skip", "digits", compare.Args(("skip",), tmp_path, agents=("gate",), seeds=(0,)))
    assert learned == [(cell / "gate-0", "digits")] and (cell / "gate-0" / "config.json").is_file()
