"""The report of an attack, on a model that comes with the package."""

from __future__ import annotations

import pytest
import torch

import dynrl
from dynrl.data import load_dataset
from dynrl.deploy import SHIPPED, policy_fingerprint
from dynrl.evaluation import attack
from dynrl.files import locked, read_json
from dynrl.policies import load_policy, save_policy
from dynrl.runs import RunFolder, kind_of
from dynrl.scripts.cli import main
from tests.scripts.calls import twin

RUN, ROWS = SHIPPED / "exit-digits", 24


def test_a_report_by_the_command(tmp_path, capsys):
    main(["attack", str(RUN), "--out", str(tmp_path), "--rows", str(ROWS), "--steps", "3"])
    shown, report = capsys.readouterr().out, read_json(tmp_path / "attack.json")
    assert {path.name for path in tmp_path.iterdir()} == {"attack.json", "attack.png"}
    names = ["clean", "noise", "uncertainty", "spending"]
    assert [row["inputs"] for row in report["free"]] == [row["inputs"] for row in report["limited"]] == names
    clean, noise, _, spending = report["free"]
    assert spending["lost"] > 0.3 > noise["lost"] and spending["macs_fraction"] > clean["macs_fraction"] + 0.1
    assert max(row["most"] for row in report["limited"]) <= report["limit"] == 0.6 < spending["most"]
    assert all(name in shown for name in names) and "set_limit(0.6)" in shown
    assert report["epsilon"] == pytest.approx(8 / 255)

    # Efficacy another way: the area under the share of rows that are done within a cost, above the cheapest route's.
    model = dynrl.load(RUN)
    model.set_budget(0.5)
    model(load_dataset("digits").seen_by(model.backbone.trained_on).test.inputs[:ROWS])
    spent = model.last_route.macs.double() / model.backbone.dense_macs
    costs = torch.linspace(report["least"], 1, 20_001, dtype=torch.float64)
    area = float((spent <= costs[:-1].unsqueeze(1)).double().mean())
    assert clean["efficacy"] == pytest.approx(area, abs=1e-3)
    assert clean["macs_fraction"] == pytest.approx(float(model.last_route.macs_fraction.mean()))


def test_a_policy_is_named_by_what_the_folder_holds(tmp_path):
    """As a kill in the first round of fine-tuning leaves it: the settings ask for what nobody has done yet."""
    run = twin(RUN, tmp_path / "run", finetune=True)
    policy, known = load_policy(run / "policy.safetensors")
    save_policy(run / "policy.safetensors", policy, known | {"finished": False})
    report = attack(run, rows=4, steps=1, limit=None)
    kind = kind_of(RunFolder(run).settings, tuned=False, finished=False)
    assert report["policy"] == kind.label and "tuned" not in kind.label
    assert report["policies"] == {kind.label: [policy_fingerprint(dynrl.load(run))]}


def test_an_attack_leaves_the_runs_own_networks_as_they_are():
    run = RunFolder(RUN)
    run.model.set_budget(0.8)
    price = run.model.price
    attack(run, rows=4, steps=1)
    assert (run.model.price, run.model.limit) == (price, None)
    assert all(weight.requires_grad for weight in run.backbone.parameters())


def test_what_cannot_be_attacked_is_refused(tmp_path):
    for settings, reason in (
        ({"limit": 0.01}, "expected a limit of at least"), ({"budget": 0.01}, "reaches"), ({"rows": 0}, "rows"),
        ({"steps": 0}, "steps"), ({"epsilon": 0.0}, "expected an epsilon above 0"), ({"price": 1e9}, "outside"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            attack(RUN, out=tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="no run folder"):
        attack(tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with locked(tmp_path), pytest.raises(ValueError, match="in use by another process"):
        attack(RUN, out=tmp_path, rows=4, steps=1)
