"""`dynrl bench`, and what a GPU machine runs of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from dynrl.deploy import SHIPPED
from dynrl.scripts import gpu_check, lay_out
from dynrl.scripts.bench import env as bench_env
from dynrl.scripts.bench import model as bench_model
from dynrl.scripts.bench import ops as bench_ops


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
