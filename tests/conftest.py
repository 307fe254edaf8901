from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import dynrl.data

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()  # which plugins were given is the developer's own business
THREADS = 2
if hasattr(os, "sched_getaffinity"):
    # Threads that outnumber their cores spend most of their time waiting for each other. So each of the processes that
    # share the tests out, and whatever it starts, has a core of its own.
    cores = sorted(os.sched_getaffinity(0))
    if "PYTEST_XDIST_WORKER" in os.environ:
        cores = [cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]]
        os.sched_setaffinity(0, set(cores))
    THREADS = min(THREADS, len(cores))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are first imported
# Cases go through the decisions again and again. Of two data sets at a time, each would be made anew for each case.
dynrl.data.load_dataset = lru_cache(maxsize=8)(dynrl.data.load_dataset.__wrapped__)

pytest_plugins = ["tests.kernel_counts"]


@pytest.fixture(autouse=True)
def _few_threads_and_a_seed():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic = True  # gradients taken twice are compared bit by bit


@pytest.fixture(scope="session", autouse=True)
def _times_are_taken_once():
    """No test asserts a time, and the rounds of timing are most of a report."""
    from dynrl import training
    from dynrl.evaluation import report

    report.ROUNDS = training.TIMED_ROUNDS = 1


@pytest.fixture(scope="session", autouse=True)
def _one_tile_a_kernel_on_cuda():
    """Tuning compiles a dozen tiles for each shape: minutes. `tests/aot.py` compiles the others, `bench ops` runs them."""
    if torch.cuda.is_available():
        from dynrl.ops.kernels import conv, conv_tiles, gru, linear

        for module in (conv, conv_tiles, gru, linear):
            for kernel in vars(module).values():
                if hasattr(kernel, "configs"):
                    kernel.configs = kernel.configs[:1]


@pytest.fixture
def full_precision() -> Iterator[None]:
    """CUDA computes float32 without TF32, as comparisons of float32 results need; elsewhere tests run what users run."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def registries():
    """What a test adds to the registries is gone after it."""
    from dynrl.agents.base import AGENTS
    from dynrl.backbones import FAMILIES
    from dynrl.envs.rewards import REWARDS
    from dynrl.policies import POLICIES

    kept = [(registry, dict(registry)) for registry in (AGENTS, FAMILIES, REWARDS, POLICIES, dynrl.data.DATASETS)]
    yield
    if kept[-1][1] != dynrl.data.DATASETS:
        dynrl.data.load_dataset.cache_clear()
    for registry, was in kept:
        registry.clear()
        registry.update(was)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: the folder that `make(folder)` fills, made by whichever of pytest's processes asks first."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        try:
            folder.mkdir()
        except FileExistsError:
            for _ in range(3000):
                if done.exists():
                    assert done.read_text() == "made", f"{name} could not be made, see the other process"
                    return folder
                time.sleep(0.2)
            raise
        state = "failed"
        try:
            make(folder)
            state = "made"
        finally:
            done.write_text(state)
        return folder

    return once


@pytest.fixture(scope="session")
def small_backbone(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A digits backbone of 3 gates, trained for a few seconds: every route is better than chance."""
    from dynrl.backbones import SkipResNet
    from dynrl.data import load_dataset
    from dynrl.pretraining import Recipe, pretrain

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        backbone = SkipResNet((1, 24, 24), layers=(2, 2), widths=(8, 16), stem_stride=2)
        digits = load_dataset("digits")
        pretrain(backbone, digits, Recipe(epochs=6, batch_size=64), seed=0)
        backbone.trained_on = digits.provenance
        backbone.save(folder / "backbone.safetensors")

    return once("small-backbone", make) / "backbone.safetensors"


@pytest.fixture(scope="session")
def ray_local():
    """One ray for all tests that need a cluster."""
    import ray

    from dynrl.agents.rllib import start_ray

    start_ray(num_cpus=4)  # on paper: a runner, two learners, this process
    yield
    ray.shutdown()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process seems to have no ray, whichever tests came before: a cluster is looked for where one is named."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
