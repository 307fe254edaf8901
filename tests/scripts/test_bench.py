"""`dynrl bench`, and what a GPU machine runs of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dynrl.backbones import load_backbone
from dynrl.data import DATASETS, Augmentation, Dataset, Split, load_dataset
from dynrl.deploy import SHIPPED
from dynrl.envs import DECISIONS
from dynrl.evaluation import score_routes
from dynrl.pretraining import Recipe, metric_at_rate
from dynrl.recipes import DEFAULTS, Defaults
from dynrl.scripts import lay_out
from dynrl.scripts.bench import env as bench_env
from dynrl.scripts.bench import gpu, known, tables, tasks
from dynrl.scripts.bench import model as bench_model
from dynrl.scripts.bench import ops as bench_ops
from dynrl.tasks import Regression
from tests.cases import TOYS


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
    lay_out.lay_out(tmp_path)
    code = "\n".join([
        "import inspect, sys", "sys.modules |= dict.fromkeys(('ray', 'gymnasium', 'tyro', 'stable_baselines3'))", gpu.IMPORTS,
        "signatures = {f.__name__: inspect.signature(f) for f in (bench_env, bench_model, bench_ops)}",
        "bench_env, bench_model, bench_ops = (signatures[name].bind for name in ('bench_env', 'bench_model', 'bench_ops'))",
        *gpu.PARTS.values(),
    ])  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True
    )
    for part in gpu.PARTS.values():
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


@pytest.mark.parametrize("name", TOYS)
def test_every_route_is_walked_once_and_weighs_what_random_choices_make_it(name):
    """Columns that no row reaches make no routes: a binary tree of fifteen nodes has sixteen, not 32,768."""
    backbone, inputs = TOYS[name]().eval(), torch.randn(1, 4)
    routes, likely = known.every_route(backbone, inputs)
    walk = backbone.run_route(inputs.expand(len(routes), -1), routes)
    reached = (walk.route >= 0).sum(1)
    assert float(likely.sum()) == pytest.approx(1.0)
    assert {tuple(route) for route in walk.route.tolist()} == {
        tuple(route)
        for route in backbone.run_route(
            inputs.expand(3000, -1), torch.randint(0, backbone.num_choices, (3000, backbone.columns))
        ).route.tolist()
    }
    ended_alike = {"exiting": 3, "looping": 4, "branching": 2 + 2 * 2 * 2, "roundabout": 2 + 4 * 2}
    assert len(routes) == ended_alike[name] and int(reached.max()) <= backbone.max_steps
    with pytest.raises(ValueError, match="more than 2 routes"):
        known.every_route(backbone, inputs, most=2)


def test_uniformly_random_choices_earn_what_was_said_they_would():
    backbone, prices = TOYS["branching"]().eval(), torch.tensor([0.1, 1.0])
    inputs = torch.randn(2, 4)
    with torch.no_grad():
        targets = backbone(inputs)
    split = Split(inputs, targets, Regression.of(targets + torch.randn(2, 2)))
    best, random = known.known_returns(backbone, split, prices)
    counts = (backbone.thrift >= 0).sum(1)
    drawn = (torch.rand(8000, backbone.columns) * counts).long()
    rows = torch.arange(8000) % 2
    walked = score_routes(backbone, drawn, Split(inputs[rows], targets[rows], split.task))
    returns = walked.likely.unsqueeze(1) - prices * walked.macs.unsqueeze(1)
    torch.testing.assert_close(random, returns.mean(0), atol=0.02, rtol=0.02)
    assert (best >= random).all()


@pytest.mark.parametrize("decision", DECISIONS)
def test_known_networks_are_small_and_of_the_decisions_family(decision):
    backbone = known.small_backbone(decision)
    data = known.two_kinds(backbone)
    assert backbone.decision == decision and len(data.train) == 128
    routes, likely = known.every_route(backbone.for_inference(), data.train.inputs[:1])
    assert 2 < len(routes) <= 1024 and float(likely.sum()) == pytest.approx(1.0, abs=1e-4)
    full, cheapest = (data.train.targets[i] for i in range(2))
    assert not torch.allclose(full, cheapest)


def test_tables_of_benches_have_a_row_for_each_measurement():
    machine = {"threads": 2, "processor": "cpu", "torch": "2"}
    row = {"decision": "skip", "seconds_to_enough": 2.0, "share": 0.99, "seconds": 20.0}
    result = {"date": "today", "hardware": machine, "rows": [row, row | {"seconds_to_enough": None}]}
    assert "| skip | 2 | not by all | 99.0% in 20 s |" in tables.BENCHES["bench-known"](result)


# Tasks ------------------------------------------------------------------------------------------------------------


def dots_split(count):
    """Is there a second bright pixel? It is as far away as the difficulty says."""
    generator = torch.Generator().manual_seed(count)
    far = torch.randint(1, 4, (count,), generator=generator)
    targets = torch.randint(0, 2, (count,), generator=generator)
    inputs = torch.zeros(count, 1, 8, 8)
    inputs[:, 0, 4, 4] = 1.0
    inputs[torch.arange(count), 0, 4, 4 + far] = targets.float()
    return Split(inputs, targets, difficulty={"distance": far.float()})


@pytest.fixture
def dots(monkeypatch):
    data = Dataset("dots", 2, dots_split(256), dots_split(64), dots_split(128), Augmentation())
    monkeypatch.setitem(DATASETS, "dots", lambda: data)
    row = Defaults("skip_resnet", {"layers": (6,), "widths": (8,)}, Recipe(epochs=1, batch_size=64))
    monkeypatch.setitem(DEFAULTS, ("skip", "dots"), row)
    load_dataset.cache_clear()
    yield data
    load_dataset.cache_clear()


def test_networks_of_half_the_macs_are_the_dearest_of_their_way(dots):
    row = DEFAULTS["skip", "dots"]
    found = tasks.halves(row, dots)
    assert found == {
        "depth": ("layers=[3]",), "width": ("widths=[5]",), "stride": ("layers=[2,4]", "widths=[8,8]"),
        "taper": ("layers=[2,1]", "widths=[8,16]"),
    }  # fmt: skip
    whole = row.build(dots, 0).dense_macs
    for settings in found.values():
        assert tasks.LEAST <= row.changed(settings).build(dots, 0).dense_macs / whole <= tasks.HALF
    more = row.changed(["layers=[4]"]).build(dots, 0).dense_macs
    assert more / whole > tasks.HALF, "one block more is too many"
    two_stages = row.changed(["layers=[2,4]", "widths=[8,8]"])
    assert tasks.halves(two_stages, dots)["stride"] == ("layers=[1,1,4]", "widths=[8,8,8]")
    digits = load_dataset("digits")
    assert set(tasks.halves(DEFAULTS["expert", "digits"], digits)) == {"depth", "width"}
    sequences = load_dataset("sequential-digits")
    assert list(tasks.halves(DEFAULTS["hidden-update", "sequential-digits"], sequences)) == ["width"]


def test_bench_tasks_trains_each_network_once(dots, tmp_path, monkeypatch, capsys):
    rows = tasks.bench_tasks(("dots",), 2, (tmp_path / "nets",))
    assert [row["network"] for row in rows] == ["dense", "depth", "width", "stride", "taper"]
    assert all((row["data"], row["decision"], row["seeds"]) == ("dots", "skip", 2) for row in rows)
    folders = sorted((tmp_path / "nets").glob("skip-dots-depth-*"))
    assert len(folders) == 2 and len(list((tmp_path / "nets").iterdir())) == 10
    by_hand = [metric_at_rate(load_backbone(f / "plain.safetensors")[0], dots.test, None) for f in folders]
    depth = rows[1]
    assert depth["accuracy"] == pytest.approx(sum(by_hand) / 2, abs=1e-6)
    assert depth["accuracy_std"] == pytest.approx(abs(by_hand[0] - by_hand[1]) / 2**0.5, abs=1e-6)
    assert depth["macs_fraction"] == depth["macs"] / rows[0]["macs"]
    bins = depth["difficulty"]["distance"]
    assert [(row["from"], row["to"]) for row in bins] == [(1, 1), (2, 2), (3, 3)]
    mean = sum(row["inputs"] * row["accuracy"] for row in bins) / len(dots.test)
    assert mean == pytest.approx(depth["accuracy"], abs=1e-6)
    assert "dots, depth layers=[3]: " in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("dynrl.pretraining.pretrain", lambda *a, **k: pytest.fail("trained again"))
        assert tasks.bench_tasks(("dots",), 2, (tmp_path / "nets",)) == rows
    row = DEFAULTS["skip", "dots"]
    monkeypatch.setitem(DEFAULTS, ("skip", "dots"), replace(row, pretraining=replace(row.pretraining, epochs=2)))
    tasks.bench_tasks(("dots",), 1, (tmp_path / "nets",))
    assert len(list((tmp_path / "nets").iterdir())) == 15, "another recipe's networks are not taken for these"
    with pytest.raises(ValueError, match="one folder for the networks, got 2"):
        tasks.bench_tasks(("dots",), 1, (tmp_path, tmp_path))


@pytest.mark.parametrize(("accuracy", "fit"), [(0.93, True), (0.95, True), (0.97, False), (0.99, False)])
def test_a_task_is_fit_where_all_networks_of_half_the_macs_are_worse(accuracy, fit):
    bins = [
        {"from": 1.0, "to": 2.0, "inputs": 5, "accuracy": 0.5},
        {"from": 3.0, "to": 3.0, "inputs": 5, "accuracy": 1.0},
    ]
    dense = {
        "data": "dots", "decision": "skip", "network": "dense", "settings": [], "metric": "accuracy", "seeds": 3,
        "macs": 2_000_000, "macs_fraction": 1.0, "accuracy": 0.98, "accuracy_std": 0.01, "error": 0.02,
        "difficulty": {"distance": bins},
    }  # fmt: skip
    half = {"settings": ["layers=[3]"], "macs": 1_000_000, "macs_fraction": 0.5}
    rows = [
        dense, dense | half | {"network": "depth", "accuracy": 0.9, "error": 0.1},
        dense | half | {"network": "stride", "accuracy": accuracy, "error": 1 - accuracy},
    ]  # fmt: skip
    (found,) = tasks.summary(rows)
    assert (found["best"], found["fit"]) == ("stride", fit) and found["margin"] == pytest.approx(0.98 - accuracy)
    machine = {"threads": 2, "processor": "cpu", "torch": "2"}
    table = tables.BENCHES["bench-tasks"]({"date": "today", "hardware": machine, "rows": rows, "summary": [found]})
    assert table[0] == "| skip, dots | MMACs | share | accuracy % | distance 1 to 2 | 3 |"
    assert table[3] == "| depth `layers=[3]` | 1.00 | 0.50 | 90.00 ±1.00 | 50.00 | 100.00 |"
    assert table[6].startswith("dots is fit: " if fit else "dots is not fit: ")
