"""`dynrl sweep`: what it refuses, and how it ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dynrl.backbones import load_backbone
from dynrl.data import load_dataset
from dynrl.evaluation import score_routes
from dynrl.files import read_json, write_json
from dynrl.scripts.cli import main
from dynrl.sweep import front_area, quarters
from tests.cases import make_policy
from tests.scripts.calls import untuned


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
    words = ["sweep", "skip", "--backbone", str(untuned(tmp_path / "given")), "--out", str(tmp_path)]
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


def test_a_copied_sweep_names_its_own_runs(tmp_path):
    row = {"run": "/elsewhere/run", "quarter": 1, "steps": 9, "seconds": 1.0, "area": 0.5}
    write_json(tmp_path / "quarters.json", [row])
    assert quarters(tmp_path / "quarters.json") == [row | {"run": str(tmp_path)}]


def test_a_front_counts_the_cheapest_network_where_a_policy_has_no_point(small_backbone):
    backbone, split = load_backbone(small_backbone)[0], load_dataset("digits").validation
    full = make_policy(backbone, (0.01, 1.0))
    with torch.no_grad():
        full.head.weight.zero_()
    nothing = score_routes(backbone.for_inference(), torch.zeros(len(split), 3, dtype=torch.int64), split).metric.mean()
    assert front_area(backbone, full, split) == pytest.approx(float(nothing), abs=1e-6)
