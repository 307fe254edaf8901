"""PPO, by RLlib, as an agent of `dynrl train`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ray

from dynrl.agents.rllib import ppo_config, router_of, start_ray
from dynrl.agents.training import Agent, router_arguments, walks
from dynrl.backbones import load_backbone
from dynrl.envs import decision
from dynrl.policies import LearnedPolicy

KEEP_CHECKPOINTS = 2
# The bonus for each decision of a walk of up to eight. Of a longer one each moves the return less: at the same bonus
# policies stay undecided, and the likeliest choices, taken throughout, lead where training never was.
ENTROPY = 0.01
UPFRONT_WALKS = 16  # of each sub-environment a training iteration: a walk is one sample to learn from, not one a step


class PPO(Agent):
    """Proximal policy optimisation (Schulman et al. 2017) on the decision's environment."""

    def start(self) -> None:
        """Start ray and build the algorithm."""
        settings, (backbone, _) = self.settings, load_backbone(self.backbone_file)
        if start_ray(max(2, settings.num_env_runners + settings.num_learners + 1), settings.address):
            self._held.callback(ray.shutdown)  # what follows is timed: ray's processes should not share its cores
        env_config = {
            "backbone": str(self.backbone_file.resolve()), "data": settings.data,
            "price_range": list(settings.price_range), "accuracy_term": settings.accuracy_term,
            "upfront": settings.upfront, "times": settings.times,
            "device": settings.device, "dtype": settings.dtype,
        }  # fmt: skip
        # Of steps of the environment, which has one for all decisions of a walk, if they are taken upfront.
        self._decisions = backbone.max_steps if settings.upfront else 1
        rollout = UPFRONT_WALKS if settings.upfront else walks(backbone) * backbone.max_steps
        config = ppo_config(
            decision(settings.decision).env_id, env_config, router_arguments(backbone, settings), seed=settings.seed,
            num_envs=settings.num_envs, rollout=rollout, num_env_runners=settings.num_env_runners,
            num_learners=settings.num_learners, total_steps=self.total // self._decisions, baseline=settings.baseline,
            # Remote runners see no GPU that ray has not given them.
            num_gpus_per_env_runner=settings.device.startswith("cuda") / max(1, settings.num_env_runners),
            entropy=ENTROPY * min(1.0, 8 / backbone.max_steps),
        )  # fmt: skip
        self._algorithm = config.build_algo()
        self._held.callback(self._algorithm.stop)
        self.steps, newest = 0, newest_checkpoint(self.checkpoints)
        if newest is not None:
            self._algorithm.restore_from_path(newest.resolve())
            self.steps = int(newest.name.removeprefix("checkpoint_"))

    def iterate(self) -> dict[str, float]:
        """One training iteration of RLlib's."""
        result = self._algorithm.train()
        self.steps = int(result["env_runners"]["num_env_steps_sampled_lifetime"]) * self._decisions
        return scalars_of(result)

    def router(self) -> LearnedPolicy:
        """The policy inside the algorithm."""
        return router_of(self._algorithm)

    def save(self) -> None:
        """RLlib's own checkpoint."""
        save_checkpoint(self._algorithm, self.checkpoints, self.steps)

    def reload(self) -> None:
        """New environments in every runner: they load the file again, since it has changed."""
        runners = self._algorithm.env_runner_group
        assert runners is not None
        # Given the method's name only, the local runner would not call it.
        runners.foreach_env_runner(
            lambda runner: runner.make_env(), local_env_runner=self.settings.num_env_runners == 0
        )


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
