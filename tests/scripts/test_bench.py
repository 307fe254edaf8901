"""`dynrl bench`, and what a GPU machine runs of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dynrl.backbones import ExitModule, SkipModule, load_backbone
from dynrl.data import DATASETS, Augmentation, Dataset, Split, load_dataset
from dynrl.deploy import SHIPPED, RoutedModel
from dynrl.envs import DECISIONS
from dynrl.evaluation import score_routes
from dynrl.files import read_json
from dynrl.policies import PolicySpec
from dynrl.pretraining import Recipe
from dynrl.recipes import DEFAULTS, Defaults
from dynrl.scripts import lay_out
from dynrl.scripts.bench import env as bench_env
from dynrl.scripts.bench import gpu, known, tables, tasks
from dynrl.scripts.bench import model as bench_model
from dynrl.scripts.bench import ops as bench_ops
from dynrl.tasks import Regression
from tests.cases import TOYS, full_metric
from tests.devices import TapeRecorder
from tests.scripts.calls import ROOT


def test_bench_env_rows(monkeypatch, capsys):
    small = {"input_shape": (1, 8, 8), "layers": (2, 2), "widths": (4, 8)}
    monkeypatch.setattr(bench_env, "NETWORKS", {"small": small, "exits": small | {"exits": (0, 1, 2)}})
    rows = bench_env.bench_env(rounds=1, counts=(6,))
    assert {(r["path"], r["num_envs"]) for r in rows} == {
        *((path, 6) for path in ("walk", "bare", "env", "rllib", "rllib-upfront", "rllib-stock")), ("naive", 1), ("naive", 16)
    }  # fmt: skip
    assert all(r["steps_per_s"] > 0 for r in rows)
    assert {(r["network"], r["device"], r["dtype"]) for r in rows} == {("small", "cpu", "float32")}
    assert [r["path"] for r in bench_env.bench_env(1, ("exits",), (6,))] == ["env"]
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


def test_rows_are_kept_as_they_come(monkeypatch):
    """In one pass, as on a GPU: a shape's rows are kept before the next one is measured."""
    measured, kept, before = bench_ops.measure, [], []

    def counted(*args):
        before.append(len(kept))
        return measured(*args)

    monkeypatch.setattr(bench_ops, "PASSES", 1)
    monkeypatch.setattr(bench_ops, "measure", counted)
    rows = bench_ops.bench_ops(seconds=0.001, ops=("gated_cell",), batches=(3, 2), keep=kept.append)
    assert rows == kept and [row["batch"] for row in rows] == [3] * 6 + [2] * 6
    assert before == [0, 3, 6, 9]
    monkeypatch.setattr(bench_env, "find_spec", lambda name: None)
    networks = {name: {"input_shape": (1, 8, 8), "layers": (2, 2), "widths": (4, 8)} for name in ("one", "two")}
    monkeypatch.setattr(bench_env, "NETWORKS", networks)
    kept.clear()
    rows = bench_env.bench_env(1, ("two", "one"), (4,), keep=kept.append)
    assert rows == kept and [row["network"] for row in rows] == ["two", "two", "one", "one"]


def test_bench_model_rows(monkeypatch):
    """Of a run, too, whose rows end at different points; a compiler that fails is named, and nothing else is missing."""

    def fails(*given):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(bench_model, "_compiled", fails)
    exits, kept = SHIPPED / "exit-digits", []
    rows = bench_model.bench_model("cpu", "bfloat16", 1, ("resnet20 32x32",), (4, 9), (exits,), kept.append)
    assert rows == kept and [(r["network"], r["policy"], r["batch"]) for r in rows] == [
        *(("resnet20 32x32", "random", n) for n in (4, 9)), *((str(exits), "learned", n) for n in (4, 9)),
    ]  # fmt: skip
    assert all(0 < r["macs_fraction"] < 1 and r["ideal_ms"] > 0 and r["routed_ms"] > 0 for r in rows)
    assert {(r["device"], r["dtype"], r["compiled_ms"]) for r in rows} == {("cpu", "bfloat16", None)}
    assert not any("captured_dense_ms" in r for r in rows)


# On a GPU -------------------------------------------------------------------------------------------------------


def chain(name):
    """Blocks that keep their input's shape, as another package would make them."""
    assert name == "chain"
    block = lambda: torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU())  # noqa: E731
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), block(), block(), block(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5)
    )


TINY = {
    "ours": bench_model.Network((), {"input_shape": (3, 8, 8), "layers": (2, 2), "widths": (4, 8)}, cuda=(5, 3)),
    "skips": bench_model.Network(
        (), {"input_shape": (3, 8, 8), "blocks": ["1", "2", "3"]}, SkipModule, cuda=(4,),
        module=(f"{__name__}.chain", "chain"),
    ),
    "exits": bench_model.Network(
        (), {"input_shape": (3, 8, 8), "layers": ["1", "2"]}, ExitModule, cuda=(4,),
        module=(f"{__name__}.chain", "chain"),
    ),
    "elsewhere": bench_model.Network((), {}, SkipModule, cuda=(4,), module=("nosuch.make", "net")),
}  # fmt: skip


def test_the_table_of_networks_runs_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(bench_model, "NETWORKS", TINY)
    monkeypatch.setattr(bench_model, "_compiled", lambda *given: lambda: None)
    rows = bench_model.bench_model(rounds=1, networks=("ours", "skips", "exits"))
    assert [(r["network"], r["batch"]) for r in rows] == [("ours", 5), ("ours", 3), ("skips", 4), ("exits", 4)]
    assert all(r["dense_ms"] > 0 and "replayed_ms" not in r for r in rows)
    assert bench_model.bench_model() == [] and "nosuch is missing" not in capsys.readouterr().out
    assert list(bench_model._asked((), "cuda")) == ["ours", "skips", "exits"]
    assert "left out, as nosuch is missing: elsewhere" in capsys.readouterr().out
    with pytest.raises(ValueError, match="elsewhere is made by nosuch, which is not installed here"):
        bench_model.bench_model(networks=("elsewhere",))


@pytest.mark.parametrize("name", ["ours", "skips", "exits"])
def test_sides_that_are_graphs(name, monkeypatch):
    """One model runs eagerly and another replays, on the same routes; tapes stand for graphs."""
    monkeypatch.setattr("dynrl.deploy.graphs.records", lambda inputs: isinstance(inputs, torch.Tensor))
    monkeypatch.setattr("dynrl.deploy.graphs.recorder_for", lambda inputs: TapeRecorder())
    monkeypatch.setattr(bench_model, "captured", lambda side, repeats: side)
    backbone, inputs = TINY[name].build().eval(), torch.randn(6, 3, 8, 8)
    policy = bench_model._InVain(PolicySpec.of("sequential", backbone, (0.01, 1.0), 8).build())
    policy.route = torch.randint(0, 2, (6, backbone.columns))
    eager, replayed = RoutedModel(backbone, policy), RoutedModel(backbone, policy)
    sides = {"dense nchw": lambda: 1, "ideal": lambda: 2, "routed": lambda: 3}
    made = bench_model._in_graphs(eager, replayed, inputs, policy.route, sides)
    whole = ["captured routed", "captured with router"] if name == "ours" else []
    assert list(made) == ["captured dense nchw", "captured ideal", *whole, "replayed"]
    assert made["captured ideal"]() is sides["ideal"]
    outputs, expected = made["replayed"]()(), eager(inputs)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-4)
    ran = eager.last_route.actions
    assert torch.equal(replayed.last_route.actions, ran) and torch.equal(ran.clamp_min(0), policy.route * (ran >= 0))
    if whole:
        assert torch.equal(made["captured routed"]()().route, ran)
        with pytest.raises(ValueError, match="on a CUDA device"):
            made["captured with router"]()
    (found,) = bench_model._recorded(replayed)["recorded"]
    assert found["inputs"] == (6, 3, 8, 8)
    ways = {
        "ours": "whole 3 kernels",
        "skips": "whole 3 select",
        "exits": "pieces",
    }  # the first of those that are as fast
    assert bench_model._recorded(replayed)["way"] == ways[name]
    assert bench_model._recorded(eager) == {"way": "eager", "recorded": []}
    monkeypatch.setattr(replayed.graphs, "report", lambda: [{"inputs": (1,), "why": "a block waits"}])
    assert bench_model._recorded(replayed)["way"] == "eager"


def test_the_times_of_graphs():
    times = bench_model._graph_times(
        {"dense nchw": 0.5, "captured dense nchw": 3.0, "captured dense nhwc": 2.5, "replayed": 2.0}
    )
    assert times == {
        "captured_dense_ms": 2.5, "captured_ideal_ms": None, "captured_routed_ms": None,
        "captured_with_router_ms": None, "replayed_ms": 2.0,
    }  # fmt: skip
    assert set(bench_model._graph_times({}).values()) == {None}


def test_what_the_gpu_check_runs_is_there_without_ray_and_gymnasium(tmp_path):
    """Each part's call fits its function's signature, and imports no more than a GPU machine has."""
    lay_out.lay_out(tmp_path)
    code = "\n".join([
        "import inspect, sys",
        "absent = ('ray', 'gymnasium', 'tyro', 'stable_baselines3', 'timm', 'torchvision')",
        "sys.modules |= dict.fromkeys(absent)", gpu.IMPORTS, "import dynrl.scripts.bench.gpu",
        "signatures = {f.__name__: inspect.signature(f) for f in (bench_env, bench_model, bench_ops)}",
        "bench_env, bench_model, bench_ops = (signatures[name].bind for name in ('bench_env', 'bench_model', 'bench_ops'))",
        "rounds, keep = 1, print", *(part.call for part in gpu.PARTS.values()),
    ])  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True
    )
    assert all((tmp_path / name).exists() for name in gpu.TESTS)
    for name, part in gpu.PARTS.items():
        for network in re.findall(r"'(resnet[^']*)'", part.call):
            assert network in (bench_env.NETWORKS if "bench_env" in part.call else bench_model.NETWORKS), name
    assert {name for name, network in bench_model.NETWORKS.items() if network.cuda} == set(gpu.TABLE) < set(gpu.PARTS)
    assert list(gpu.PARTS)[: len(gpu.TABLE)] == [*gpu.TABLE], "the table comes first"


WAITS = "import time; keep({'op': 'one'}); keep({'op': 'two'}); time.sleep(600)"
GOES_ON = """
from pathlib import Path
keep({'op': 'one'})
while not Path('out.json').exists(): pass
keep({'op': 'two'})
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A check of a CPU, with no imports and the present predictions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "machine", lambda: {"device": "NVIDIA H200", "torch": "2"})
    monkeypatch.setattr(gpu, "IMPORTS", "")
    found = predictions()
    return lambda: gpu.Check(tmp_path / "out.json", "abc", "typed", found)


def predictions():
    return read_json(ROOT / "results" / "gpu-predicted-20261129.json")


def test_a_part_that_takes_too_long_is_ended_and_what_it_measured_is_kept(check, tmp_path, monkeypatch):
    """Its time is over when two rows are there, however long a machine takes for them."""
    rows, out = tmp_path / "slow.rows", tmp_path / "out.json"
    late = lambda: rows.exists() and rows.read_text().count("\n") == 2  # noqa: E731
    monkeypatch.setattr(gpu, "monotonic", lambda: 50.0 if late() else 0.0)
    mine = check()
    mine.bench("slow", gpu.Part(WAITS, 40))
    mine.bench("wrong", gpu.Part("keep({'op': 'three'}); raise KeyError('lost')", 60))
    mine.bench("elsewhere", gpu.Part("keep({'op': 'none'})", 60, "timm"))
    assert [row["op"] for row in mine.result["rows"]] == ["one", "two", "three"]
    (cut,) = mine.result["cut"]
    assert cut == "slow, after 50 s and 2 rows"
    assert list(mine.result["failed"]) == ["wrong"] and "KeyError: 'lost'" in mine.result["failed"]["wrong"]
    assert mine.result["left_out"] == ["elsewhere: timm is missing"]
    assert read_json(out)["rows"] == mine.result["rows"]


def test_rows_are_written_while_a_part_runs(check, tmp_path, monkeypatch):
    """So that a call which is cut short from outside keeps them."""
    mine, seen = check(), []
    write = mine.write
    monkeypatch.setattr(mine, "write", lambda: (write(), seen.append(len(read_json(tmp_path / "out.json")["rows"]))))
    mine.bench("going on", gpu.Part(GOES_ON, 60))
    assert seen[0] == 1 and seen[-1] == 2 and not mine.result["cut"]


def test_no_part_begins_without_time_and_none_takes_more_than_is_left(check, monkeypatch):
    """By a clock of our own, which a part moves on by all that it is given."""
    clock, given = [0.0], []

    class Job:
        log = ""

        def __init__(self, name, *command, **environment):
            self.began, self.name = clock[0], name

        def wait(self, until, look=lambda: None):
            given.append((self.name, until - clock[0]))
            clock[0] = max(clock[0], until)
            return 124

    monkeypatch.setattr(gpu, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "Job", Job)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    mine = check()
    assert mine.warm_up() == 124 and clock[0] == gpu.WARMING
    assert len(given) == len(gpu.TESTS) + sum(part.missing is None for part in gpu.PARTS.values())
    given.clear()
    for name, part in gpu.PARTS.items():
        mine.bench(name, replace(part, missing=None))
    mine.train()
    left = gpu.SECONDS - gpu.WARMING
    for name, seconds in given:
        assert seconds == min(gpu.PARTS[name].seconds, left) and seconds >= gpu.LEAST
        left -= seconds
    assert clock[0] <= gpu.SECONDS and [name for name, _ in given][: len(gpu.TABLE)] == [*gpu.TABLE]
    assert mine.result["left_out"] == [*(name for name in gpu.PARTS if name not in dict(given)), "train"]


# Predictions ------------------------------------------------------------------------------------------------------


def test_each_row_of_the_table_has_one_prediction():
    keys = [(row["network"], row["batch"], row["column"]) for row in predictions()["rows"]]
    assert len(keys) == len(set(keys))
    for name in gpu.TABLE:
        for batch in bench_model.NETWORKS[name].cuda:
            for column in ("captured_dense_ms", "captured_ideal_ms", "replayed_ms"):
                assert (name, batch, column) in keys


def test_predictions_and_bars_join_to_rows():
    found = predictions()
    row = {
        "network": "resnet50 224x224", "batch": 256, "replayed_ms": 8.0, "captured_dense_ms": 10.0,
        "captured_ideal_ms": 7.5, "with_router_ms": 14.0,
    }  # fmt: skip
    here = gpu.judged(row, found, "NVIDIA H200")
    assert here["predicted"]["replayed_ms"] == pytest.approx(7.9953) and here["predicted"]["dense_ms"] == 10.1652
    assert [(bar["most_ms"], bar["holds"]) for bar in here["bars"]] == [(10.2, True), (8.05, True)]
    assert not gpu.judged(row | {"replayed_ms": 8.06}, found, "NVIDIA H200")["bars"][1]["holds"]
    # On another card twice as slow, the ratios count: of the dense network, 8.05 of 10.0322; of the ideal, of 7.4771.
    slow = {"replayed_ms": 15.9, "captured_dense_ms": 20.0, "captured_ideal_ms": 15.0}
    (_, bar) = gpu.judged(row | slow, found, "another")["bars"]
    assert bar["most_ms"] == pytest.approx(min(20 * 8.05 / 10.0322, 15 * 8.05 / 7.4771), abs=1e-3) and bar["holds"]
    missing = gpu.judged(row | {"replayed_ms": None, "captured_ideal_ms": None}, found, "another")["bars"]
    assert [bar["holds"] for bar in missing] == [None, None]
    other = gpu.judged(row | {"network": "elsewhere"}, found, "NVIDIA H200")
    assert other["predicted"] == {} and len(other["bars"]) == 1
    lines = gpu.bars([here, other, {"op": "none"}])
    assert len(lines) == 3 and lines[1].endswith("at most 8.05 ms (8.05 ms): holds")


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


def test_the_table_of_a_gpu_has_both_times_of_each_side_and_what_was_predicted():
    row = {
        "network": "resnet50 224x224", "batch": 64, "dense_ms": 3.75, "ideal_ms": 4.24, "routed_ms": 10.1,
        "with_router_ms": 14.8, "captured_dense_ms": 2.7, "captured_ideal_ms": 2.11, "captured_routed_ms": 2.39,
        "captured_with_router_ms": None, "replayed_ms": 2.5, "way": "whole 12 kernels",
    }  # fmt: skip
    rows = [gpu.judged(row, predictions(), "NVIDIA H200")]
    table = tables.BENCHES["gpu"]({"date": "today", "device": "card", "torch": "2", "rows": rows})
    assert (
        "| resnet50 224x224 | 64 | 3.75, 2.70 | 4.24, 2.11 | 10.10, 2.39 | 14.80, - | 2.50 | whole 12 kernels | 2.55 | hold, fail |"
    ) in table
    foreseen = tables.BENCHES["gpu-predicted"](predictions())
    assert "| resnet50 224x224 | 64 | 2.70 | 2.11 | 2.55 | 2.48 | does not hold |" in foreseen
    assert "| resnet50 224x224 | 256 | 10.03 | 7.48 | 8.00 | 8.05 | holds |" in foreseen


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
    whole = row.build(dots, 0).whole_macs
    for settings in found.values():
        assert tasks.LEAST <= row.changed(settings).build(dots, 0).whole_macs / whole <= tasks.HALF
    more = row.changed(["layers=[4]"]).build(dots, 0).whole_macs
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
    by_hand = [full_metric(load_backbone(f / "plain.safetensors")[0], dots.test) for f in folders]
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
