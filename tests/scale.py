"""Several processes, some of which die; a sweep; changed files; a soak: `make test-scale`, outside the ordinary run."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.rllib.core import DEFAULT_MODULE_ID

from dynrl.agents.base import open_agent
from dynrl.agents.rllib import start_ray
from dynrl.backbones import load_backbone
from dynrl.data import load_dataset
from dynrl.deploy import RoutedModel, load, shipped
from dynrl.evaluation import score, score_routes
from dynrl.files import load_tensors, read_json
from dynrl.plugins import VARIABLE
from dynrl.scripts.cli import main
from dynrl.settings import Learning, Place, Problem, Settings
from tests import lines
from tests.mutations import check
from tests.scripts.calls import COMMAND, untuned

STEPS = 24_000
SOAK = float(os.environ.get("DYNRL_SOAK", "600"))  # the seconds of a soak, for all shipped models together


def test_changed_models_are_refused_by_their_file_or_right(tmp_path):
    """2,500 well-formed files with wrong content; what they cost is printed."""
    found = check(2500, 1, tmp_path)
    print(f"\nchanged models: {found}")
    assert found["refused"] + found["accepted"] == 2500
    assert found["megabytes"] < 300


def test_changed_command_lines_are_refused_in_a_line_or_heeded(tmp_path):
    """800 lines, about a hundred of a kind."""
    found = lines.check(800, 1, tmp_path)
    print(f"\nchanged command lines: {found}")
    assert sum(map(sum, (kind.values() for kind in found.values()))) == 800
    assert found["nothing"]["heeded"] > 0 and found["misspelt"]["refused"] > 0


def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path):
    """`SOAK` / 60 kills, at least 3, each at a random moment since the start; what is resumed is the whole run."""
    learning = ["--agent", "gate", "--steps", "40000", "--price-range", "0.02", "2", "--data", "digits"]
    begin = ["--backbone", str(untuned(tmp_path / "given")), *learning]

    def started(*words):
        words = [*COMMAND, "train", "skip", *words, "--no-evaluate", "--threads", "1"]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    begun = time.monotonic()
    said, _ = (whole := started(*begin, "--out", str(tmp_path / "whole"))).communicate()
    assert whole.returncode == 0, said[-2000:]
    length, draw, kills, runs = time.monotonic() - begun, random.Random(2), 0, 0
    while kills < max(3, SOAK / 60):
        runs, out, before = runs + 1, tmp_path / f"killed-{runs}", kills
        while True:
            process = started(*(("--resume", str(out)) if out.exists() else (*begin, "--out", str(out))))
            try:
                # The first one of each run is killed for sure.
                said, _ = process.communicate(timeout=draw.uniform(0, length * (0.9 if kills == before else 1.5)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0, said[-2000:]
            break
        for kind in ("policy", "backbone"):
            (one, known), (other, same) = (
                load_tensors(run / f"{kind}.safetensors", kind) for run in (tmp_path / "whole", out)
            )
            assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
            assert known == same
        assert not list(out.glob("**/.*.*"))
    print(f"\n{kills} kills in {runs} runs of {length:.0f} s")


def resident():
    """The megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.parametrize("name", shipped())
def test_memory_stays_flat_over_a_soak(name):
    """Calls of any batch size, at budgets and limits that change meanwhile, from two threads at a time."""
    model = load(name)
    spent, least = [share for _, share in model.curve], model.backbone.least_macs()
    tightest = 1.2 * (model.backbone.start_macs + int(least[0].min())) / model.backbone.dense_macs + 0.1
    # The dense network's, but for a cascade: if it asks all of its models, it costs more than the dearest one.
    most = model.backbone.start_macs + int(model.backbone.column_costs.max(1).values.sum())
    begun, sizes, wrong, calls = time.monotonic(), list[float](), list[str](), [0, 0]

    def work(thread):
        draw = random.Random(thread)
        while time.monotonic() - begun < SOAK / len(shipped()):
            model.set_budget(draw.uniform(min(spent), max(spent)))
            model.set_limit(draw.choice((None, draw.uniform(tightest, 1.0))))
            outputs = model(model.backbone.random_inputs(draw.choice((1, 2, 7, 64, 255))))
            if not outputs.isfinite().all() or not (model.last_route.macs <= most).all():
                wrong.append(str(model.last_route))
            calls[thread] += 1
            sizes.append(resident())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quarter = len(sizes) // 4
    before, after = (sum(part) / len(part) for part in (sizes[2 * quarter : 3 * quarter], sizes[3 * quarter :]))
    print(f"\n{name}: {sum(calls)} calls, {before:.0f} MB in the third quarter, {after:.0f} MB in the last")
    assert not wrong and min(calls) > 10
    assert after < 1.02 * before


def kill(runner):
    """End an actor's process as the kernel would: it cannot say goodbye."""
    ray.kill(runner, no_restart=False)


@pytest.mark.parametrize("agent", ["ppo", "appo", "dqn"])
def test_a_runner_killed_in_training_does_not_stop_it(agent, small_backbone, tmp_path):
    learning = Learning(agent, steps=STEPS, num_envs=16, price_range=(20.0, 20.0), reward="log_likelihood")
    settings = Settings(Problem("skip", "digits"), learning, Place(num_env_runners=2))
    with open_agent(settings, small_backbone, tmp_path, STEPS) as trained:
        trained.learn(STEPS // 4)
        group = trained._algorithm.env_runner_group
        before, kept = trained.steps, trained.router().state_dict()
        kill(group._worker_manager.actors()[1])
        trained.learn(STEPS // 2)
        assert trained.steps > before
        # Both dead at once.
        for runner in group._worker_manager.actors().values():
            kill(runner)
        trained.learn(STEPS)
        router, healthy = trained.router(), group.num_healthy_remote_workers()
    assert healthy == 2, "those that died are there again"
    assert any(not torch.equal(value, kept[name]) for name, value in router.state_dict().items())
    backbone, _ = load_backbone(small_backbone)
    model, test = RoutedModel(backbone, router), load_dataset("digits").test
    nothing = score_routes(model.backbone, torch.zeros(len(test), backbone.max_steps, dtype=torch.int64), test)
    assert score(model, test).macs_fraction == pytest.approx(float(nothing.macs.mean()), abs=0.05)


def test_learners_share_the_work_and_stay_equal(small_backbone, tmp_path):
    settings = Settings(
        Problem("skip", "digits"),
        Learning(steps=STEPS, num_envs=32, price_range=(0.002, 2.0)),
        Place(num_env_runners=1, num_learners=2),
    )
    with open_agent(settings, small_backbone, tmp_path, STEPS) as trained:
        start = trained.router().state_dict()
        trained.learn(STEPS // 2)
        held = trained._algorithm.learner_group.foreach_learner(
            lambda learner: learner.module[DEFAULT_MODULE_ID].unwrapped().state_dict()
        )
        one, other = (result.get() for result in held)
        router = trained.router().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(one[f"net.{name}"], value) for name, value in router.items())
    assert not torch.equal(start["head.weight"], router["head.weight"])


def test_a_sweep_trains_all_ranks_them_and_goes_on(tmp_path, capsys):
    given, out = untuned(tmp_path / "given"), tmp_path / "sweep"
    words = ["sweep", "skip", "--data", "digits", "--backbone", str(given), "--out", str(out), "--steps", "60000"]
    words += ["--vary", "learning_rate=0.002,1e-07"]
    main(words)
    shown = capsys.readouterr().out
    rows = read_json(out / "sweep.json")
    assert [row["run"].rpartition("/")[2] for row in rows] == ["learning_rate=0.002", "learning_rate=1e-07"]
    assert rows[0]["quarter"] == 4 and rows[0]["steps"] >= 60_000 and rows[0]["area"] > rows[1]["area"]
    assert "report of the best: dynrl train skip --resume" in shown and "quarter 1 of 4" in shown
    main(words)  # nothing is left to do
    assert read_json(out / "sweep.json") == rows
    with pytest.raises(SystemExit):  # other settings than those runs have
        main([*words[:-3], "90000", *words[-2:]])
    assert "a sweep with another steps" in capsys.readouterr().err
    main([*words[:-1], "learning_rate=0.002,1e-07,0.004"])  # one value more
    more = {row["run"].rpartition("=")[2]: row for row in read_json(out / "sweep.json")}
    assert set(more) == {"0.002", "1e-07", "0.004"} and more["0.002"] == rows[0]
    main(["train", "skip", "--resume", str(out / "learning_rate=0.002")])
    assert (out / "learning_rate=0.002" / "report.json").is_file()


def test_a_sweep_ranks_what_is_left_and_tries_again_what_failed(tmp_path, capsys, monkeypatch):
    words = ["sweep", "skip", "--backbone", str(untuned(tmp_path / "given")), "--out", str(tmp_path), "--steps", "4000"]
    words += ["--vary", "learning_rate=0.002,0.004"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # make the run folders only
        patch.setattr("dynrl.sweep.search", lambda *given: [])
        main(words)
    file = tmp_path / "learning_rate=0.004" / "backbone.safetensors"
    kept = file.read_bytes()
    file.write_bytes(b"none")
    capsys.readouterr()
    for whole in (False, True):
        if whole:
            file.write_bytes(kept)
        main(words)
        names = {row["run"].rpartition("/")[2] for row in read_json(tmp_path / "sweep.json")}
        assert names == {"learning_rate=0.002"} | ({"learning_rate=0.004"} if whole else set())
        failed = [line for line in capsys.readouterr().err.splitlines() if " failed: " in line]
        assert len(failed) == (not whole)
        assert all("learning_rate=0.004 failed: ValueError: " in line and "cut short" in line for line in failed)


@pytest.fixture
def two_nodes(monkeypatch):
    """A cluster of two nodes with a core each, which `--address auto` finds; the second node may be killed."""
    ray.shutdown()
    # A token of an earlier `ray start` may lie about, and `auto` would ask for it. Workers that are nice wait for ever
    # beside whatever else runs on this machine.
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_worker_niceness", "0")):
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster, cluster.add_node(num_cpus=1)
    ray.shutdown()
    cluster.shutdown()


def test_a_node_that_dies_in_training_does_not_end_it(two_nodes, tmp_path):
    cluster, second = two_nodes
    out, said = tmp_path / "run", tmp_path / "said"
    words = ["train", "skip", "--backbone", str(untuned(tmp_path / "given")), "--out", str(out), "--steps", "120000"]
    words += ["--price-range", "0.02", "2", "--num-env-runners", "2", "--address", "auto", "--no-evaluate"]
    with said.open("w") as file:
        process = subprocess.Popen([*COMMAND, *words], stdout=file, stderr=subprocess.STDOUT)
    ray.init(cluster.address, log_to_driver=False)

    def runners():
        actors = ray._private.state.actors().values()
        return {actor["Address"]["NodeID"] for actor in actors if actor["State"] == "ALIVE"}

    while process.poll() is None and "reward=" not in said.read_text():
        time.sleep(0.5)
    assert runners() == {node["NodeID"] for node in ray.nodes()}, "one on each node"
    cluster.remove_node(second, allow_graceful=False)
    assert process.wait(900) == 0, said.read_text()[-2000:]
    assert load_tensors(out / "policy.safetensors", "policy")[1]["finished"] is True
    model, test = load(out), load_dataset("digits").test
    model.set_budget(0.6)
    found = score(model, test)
    print(f"\na node died: {found.metric:.3f} at {found.macs_fraction:.2f} of the dense MACs")
    assert found.metric > 0.97 and found.macs_fraction < 0.7


def test_workers_of_a_cluster_load_plugins(tmp_path, monkeypatch):
    """A cluster of before the command: what its workers are started with is its own environment."""
    ray.shutdown()
    monkeypatch.delenv(VARIABLE, raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        (tmp_path / "told.py").write_text("from dynrl.data import DATASETS\nDATASETS['told'] = None\n")
        monkeypatch.setenv(VARIABLE, str(tmp_path / "told.py"))
        assert start_ray(0, cluster.address)

        @ray.remote
        def known():
            from dynrl.data import DATASETS

            return "told" in DATASETS

        assert ray.get(known.remote(), timeout=120)
    finally:
        ray.shutdown()
        cluster.shutdown()
