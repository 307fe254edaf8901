"""Train a policy with RLlib to the end, through kills and Ctrl-C."""

from __future__ import annotations

import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from dynrl.agents.metrics import TrainingLog
from dynrl.agents.rllib import ppo_config, router_of, start_ray
from dynrl.backbones import Backbone
from dynrl.envs import decision as decision_row
from dynrl.observation import Layout
from dynrl.policies import Router
from dynrl.progress import progress
from dynrl.tasks import TASKS

KEEP_CHECKPOINTS = 2


@dataclass(frozen=True)
class Settings:
    """What decides how a policy is trained.

    Attributes:
        decision, data: names.
        steps: decisions in all.
        seed: of weights, inputs, prices and exploration.
        router_hidden: units of the policy's hidden layer, 0 for a linear one.
        num_envs: inputs that walk side by side in one runner.
        num_env_runners: remote processes that sample; 0 samples in this one.
        price_range, accuracy_term: see `RoutingVectorEnv`.
        checkpoint_every: training iterations between checkpoints.
    """

    decision: str
    data: str
    steps: int
    seed: int = 0
    router_hidden: int = 64
    num_envs: int = 64
    num_env_runners: int = 0
    price_range: tuple[float, float] = (0.002, 2.0)
    accuracy_term: str = "distillation"
    checkpoint_every: int = 10


def train_policy(settings: Settings, backbone: Backbone, backbone_file: Path, folder: Path) -> tuple[Router, bool]:
    """Train a policy for `backbone` (saved as `backbone_file`), going on from the newest checkpoint in `folder`.

    Checkpoints go to `folder/checkpoints`, TensorBoard's files to `folder`.

    Returns:
        the router, and whether all steps were done (False after Ctrl-C).

    Raises:
        ValueError: the weights are no longer finite; the last checkpoint stays.
    """
    checkpoints = folder / "checkpoints"
    started = start_ray(num_cpus=max(2, settings.num_env_runners + 1))
    # The full network's choice is the favoured one at the start; where points differ in it, the commonest.
    router = {
        **Layout.of(backbone).to_dict(),
        "price_range": list(settings.price_range),
        "hidden": settings.router_hidden,
        "start": statistics.mode(backbone.full_route),
    }
    # Whole walks, so that each has its end: eight of them, or of long ones some seventy steps.
    walks = max(1, min(8, 72 // backbone.max_steps))
    env_config = {
        "backbone": str(backbone_file.resolve()), "data": settings.data,
        "price_range": list(settings.price_range), "accuracy_term": settings.accuracy_term,
    }  # fmt: skip
    config = ppo_config(
        decision_row(settings.decision).env_id, env_config, router, seed=settings.seed, num_envs=settings.num_envs,
        rollout=walks * backbone.max_steps, num_env_runners=settings.num_env_runners, total_steps=settings.steps,
    )  # fmt: skip
    algorithm = config.build_algo()
    try:
        done, newest = 0, newest_checkpoint(checkpoints)
        if newest is not None:
            algorithm.restore_from_path(newest.resolve())
            done = int(newest.name.removeprefix("checkpoint_"))
        iteration = algorithm.iteration
        finished = True
        with (
            TrainingLog(folder, begins_after=done) as log,
            progress(total=settings.steps, initial=done, desc="learning", unit="step", unit_scale=True) as bar,
            stop_on_interrupt() as stop,
        ):
            while done < settings.steps:
                start = time.perf_counter()
                result = algorithm.train()
                steps = int(result["env_runners"]["num_env_steps_sampled_lifetime"])
                scalars = scalars_of(result)
                scalars["throughput/steps_per_s"] = (steps - done) / (time.perf_counter() - start)
                log.write(steps, scalars)
                bar.update(min(steps, settings.steps) - min(done, settings.steps))
                shown = ("reward", *TASKS, "macs_fraction", "routes/distinct")
                bar.set_postfix({tag: f"{scalars[tag]:.3g}" for tag in shown if tag in scalars}, refresh=False)
                done, iteration = steps, iteration + 1
                if not all(torch.isfinite(p).all() for p in router_of(algorithm).parameters()):
                    raise ValueError(f"the policy's weights are no longer finite after {done} steps; see {checkpoints}")
                over = done >= settings.steps or stop.is_set
                if over or iteration % settings.checkpoint_every == 0:
                    save_checkpoint(algorithm, checkpoints, done)
                if stop.is_set:
                    finished = done >= settings.steps
                    break
        return router_of(algorithm), finished
    finally:
        algorithm.stop()
        if started:
            ray.shutdown()  # what follows is timed: ray's processes should not share its cores


def scalars_of(result: dict[str, Any]) -> dict[str, float]:
    """The scalars of one RLlib training result, by the tags of `TrainingLog`."""
    sampled, learned = result["env_runners"], result["learners"]["default_policy"]
    route = sampled.get("route", {})
    scalars: dict[str, Any] = {"reward": sampled.get("episode_return_mean"), **route.get("mean", {})}
    scalars["routes/distinct"] = route.get("distinct")
    scalars |= {f"rate/{tag}": value for tag, value in route.get("rate", {}).items()}
    for name, key in (("loss/policy", "policy_loss"), ("loss/value", "vf_loss"), ("entropy", "entropy")):
        scalars[name] = learned.get(key)
    scalars["loss/value_explained"] = learned.get("vf_explained_var")
    return {tag: float(value) for tag, value in scalars.items() if value is not None}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return max(folder.glob("checkpoint_*"), default=None)


def save_checkpoint(algorithm: Any, folder: Path, steps: int) -> None:
    """Save aside, then rename: a checkpoint that bears its name is whole. Older ones than the last two go."""
    aside = folder / ".unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    algorithm.save_to_path(aside.resolve())
    target = folder / f"checkpoint_{steps:012d}"
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    for old in sorted(folder.glob("checkpoint_*"))[:-KEEP_CHECKPOINTS]:
        shutil.rmtree(old)


class _Stop:
    is_set = False


@contextmanager
def stop_on_interrupt() -> Iterator[_Stop]:
    """Within the block the first Ctrl-C sets `is_set`, so that an iteration is never torn; the second raises."""
    stop = _Stop()

    def note(number: int, frame: Any) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.is_set = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
