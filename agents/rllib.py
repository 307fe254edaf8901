"""RLlib on a routing environment: the router as RLModule, runners, and the agent that all its algorithms share.

RLlib's training steps, learners, checkpoints, evaluation and Tune stay stock. Its own runner costs 40 to 150
microseconds of Python a step and knows next-step autoreset only; `SlabRunner` steps the environment in torch and
returns one time-major slab; `EpisodesRunner` cuts that into RLlib's episodes, for algorithms that ask for them.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from pathlib import Path
from typing import Any

# Before ray is imported: it reads them once. No telemetry; no warnings about machines without accelerators.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import numpy as np
import ray
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical, TorchMultiCategorical
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import (
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
    SAMPLE_TIMER,
    WEIGHTS_SEQ_NO,
)
from torch import Tensor, nn

from dynrl.agents.metrics import ended_episodes, episode_scalars
from dynrl.agents.training import GROUP, Agent, entropy_bonus, env_arguments, rollout_steps, router_arguments
from dynrl.backbones import load_backbone
from dynrl.envs import decision
from dynrl.envs.core import RoutingVectorEnv
from dynrl.plugins import VARIABLE
from dynrl.policies import LearnedPolicy, build_policy

for _name in ("ray", "ray.rllib", "ray.tune"):  # each has a level of its own
    logging.getLogger(_name).setLevel(logging.ERROR)

KEEP_CHECKPOINTS = 2


class RouterModule(TorchRLModule, ValueFunctionAPI, InferenceOnlyAPI):
    """A policy (`net`, what is deployed) beside a value network.

    `model_config["router"]` holds `build_policy`'s arguments.
    """

    def setup(self) -> None:
        """Build both networks."""
        if not isinstance(self.action_space, (Discrete, MultiDiscrete)):
            raise ValueError(f"RouterModule takes Discrete or MultiDiscrete actions, got {self.action_space}")
        settings: Any = self.model_config  # RLlib adds keys of its own beside "router"
        self.net = build_policy(*settings["router"])
        self.action_dist_cls = TorchCategorical
        if isinstance(self.action_space, MultiDiscrete):
            several: Any = TorchMultiCategorical
            self.action_dist_cls = several.get_partial_dist_cls(input_lens=[self.net.choices] * self.net.decisions)
        width, hidden = self.net.price + 1, 64
        self.value = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def get_non_inference_attributes(self) -> list[str]:
        """Runners act; they need no values."""
        return ["value"]

    def get_initial_state(self) -> dict[str, Any]:
        """None: policies are stateless."""
        return {}

    def logits(self, observation: Tensor) -> Tensor:
        """[n, decisions * choices], what choices are drawn by."""
        logits: Tensor = self.net(observation)
        return logits

    def explore(self, log_probs: Tensor, steps: int) -> Tensor:
        """[rows] int64: a choice for each row of `log_probs` [rows, choices], after so many environment steps."""
        # The largest of log-probability plus Gumbel noise is a draw from the distribution.
        return (log_probs - torch.empty_like(log_probs).exponential_().log_()).argmax(1)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.logits(batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """[n], the return expected from each observation."""
        return self.value(self.net.trunk(batch[Columns.OBS])).squeeze(-1)


class Slab:
    """T steps of N sub-environments, time first. Stands where RLlib expects a list of episodes.

    A plain class: RLlib takes dicts and tuples apart when it gathers samples.

    Attributes:
        obs [T, N, D], actions [T, N] (upfront [T, N, decisions]), rewards [T, N], terminateds [T, N] bool,
        logp [T, N], logits [T, N, A]; greedy [T, N], what the likeliest actions would have earned, or [T, 0];
        episodes [T, N] int64, the number of each row's episode, all of which began in the slab, or [T, 0];
        last_obs [N, D]: what the next slab begins with.
    """

    def __init__(self, steps: list[tuple[Tensor, ...]], last_obs: Tensor) -> None:
        stacked = [torch.stack(column) for column in zip(*steps, strict=True)]
        self.obs, self.actions, self.rewards, self.terminateds, self.logp, self.logits, *rest = stacked
        self.greedy, self.episodes = rest
        self.last_obs = last_obs

    def to_host(self) -> Slab:
        """All of it moved to the CPU."""
        for name, value in vars(self).items():
            setattr(self, name, value.cpu())
        return self

    def split(self, parts: int) -> list[Slab]:
        """As many slabs, each of some of the sub-environments; their number must be a multiple of `parts`."""
        found = [copy.copy(self) for _ in range(parts)]
        for name, value in vars(self).items():
            axis = 0 if name == "last_obs" else 1
            pieces = value.chunk(parts, axis) if value.shape[axis] else [value] * parts
            for slab, piece in zip(found, pieces, strict=True):
                setattr(
                    slab, name, piece.clone() if parts > 1 else piece
                )  # a view would travel with all it is a view of
        return found

    def __len__(self) -> int:
        return self.rewards.numel()


class SlabRunner(SingleAgentEnvRunner):
    """Steps a same-step autoreset `RoutingVectorEnv` in torch; returns one `Slab` a sample."""

    env: Any

    def make_env(self) -> None:
        """As RLlib makes it, without the wrapper that turns infos into Python lists."""
        super().make_env()
        self.env = self.env.env
        mode = self.env.metadata["autoreset_mode"]
        # Anything else would lose the first transition of every episode, or train on reset steps.
        if not isinstance(self.env.unwrapped, RoutingVectorEnv) or mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"SlabRunner needs a dynrl environment with autoreset_mode='SameStep', got {self.env}, {mode}"
            )
        self._obs: Tensor | None = None
        self._lengths = torch.zeros(0)
        self._begun: dict[int, tuple[Any, ...]] = {}  # of `EpisodesRunner`: what of a row's walk is there so far

    def make_module(self) -> None:
        """As RLlib makes it, where the environment's tensors are."""
        if self.env is not None:
            self._device = self.env.unwrapped.device
        super().make_module()

    def sample(  # type: ignore[override]
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[Any]:
        """Collect at least `num_timesteps` steps, or `num_episodes` episodes from fresh ones on."""
        explore = self.config.explore if explore is None else explore
        env: RoutingVectorEnv = self.env.unwrapped
        count = env.num_envs
        self.metrics.log_value(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
        with self.metrics.log_time(SAMPLE_TIMER), torch.no_grad():
            if num_timesteps is None and num_episodes is None:
                num_timesteps = self.config.get_rollout_fragment_length(self.worker_index) * count
            module: Any = self.module
            baseline = module.model_config.get("baseline")
            if baseline == "group" and self._lengths.any():
                # Rows whose walks differ in length drift apart, until none of a group meet the same input in a slab.
                self._needs_initial_reset = True
            if self._obs is None or force_reset or num_episodes is not None or self._needs_initial_reset:
                self._obs = env.reset_tensors(self._new_seed() if self._needs_initial_reset else None)
                self._needs_initial_reset = False
                self._returns, self._lengths = torch.zeros(2, count, device=env.device)
                self._begun = {}
            steps: list[tuple[Tensor, ...]] = []
            ended: list[dict[str, Tensor]] = []
            obs, done = self._obs, 0
            net: LearnedPolicy = module.net
            before = self.num_env_steps_sampled_lifetime
            leads = torch.arange(count, device=env.device) % GROUP == 0
            while len(steps) * count < num_timesteps if num_timesteps is not None else done < (num_episodes or 0):
                logits = module.logits(obs)
                # A row for each decision: one of each observation, or all of a walk's.
                log_probs = torch.log_softmax(logits.view(-1, net.choices), 1)
                likeliest = log_probs.argmax(1)
                if random_actions:
                    actions = torch.randint(env.backbone.num_choices, likeliest.shape, device=env.device)
                elif explore:
                    actions = module.explore(log_probs, before + len(steps) * count)
                else:
                    actions = likeliest
                if baseline == "group":
                    actions = torch.where(leads.repeat_interleave(net.decisions), likeliest, actions)
                logp = log_probs.gather(1, actions.unsqueeze(1)).view(count, -1).sum(1)
                if env.upfront:
                    actions, likeliest = actions.view(count, -1), likeliest.view(count, -1)
                greedy = env.foresee(likeliest) if baseline == "greedy" else torch.empty(0)
                number = env.episodes if baseline == "group" else torch.empty(0)
                following, rewards, terminated, info = env.step_tensors(actions)
                steps.append((obs, actions, rewards, terminated, logp, logits, greedy, number))
                self._returns += rewards
                self._lengths += 1
                if "route" in info:
                    over = ended_episodes(env, info, self._returns) | {"length": self._lengths[terminated]}
                    ended.append(over)
                    done += len(over["return"])
                    self._returns[terminated], self._lengths[terminated] = 0, 0
                obs = following
            self._obs = obs
        self._report(len(steps) * count, done, ended)
        slab = Slab(steps, obs)
        return self._hand_over(slab if env.device.type == "cpu" else slab.to_host())

    def _new_seed(self) -> int | None:
        """Of this worker and of no other, whatever their runs' seeds (RLlib counts workers on from their run's seed);
        other inputs after a restart than at the start.
        """
        if self.config.seed is None:
            return None
        own = (self.config.seed, self.worker_index, self.num_env_steps_sampled_lifetime)
        return int(np.random.SeedSequence(own).generate_state(1, np.uint64)[0]) >> 2  # room to count on from it

    def _hand_over(self, slab: Slab) -> list[Any]:
        """What a sample returns; it may travel to another process. Slabs of one size, which RLlib shares out whole."""
        return slab.split(max(1, self.config.num_learners))

    def _report(self, steps: int, episodes: int, ended: list[dict[str, Tensor]]) -> None:
        """Log once a sample; the stock runner's counters are what PPO's training step reads."""
        self._increase_sampled_metrics(steps, episodes)
        self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=steps)
        if not ended:
            return
        over = {name: torch.cat([part[name] for part in ended]) for name in ended[0]}
        log = self.metrics.log_value
        log(EPISODE_RETURN_MEAN, float(over["return"].mean()), window=1)
        log(EPISODE_RETURN_MIN, float(over["return"].min()), reduce="min", window=1)
        log(EPISODE_RETURN_MAX, float(over["return"].max()), reduce="max", window=1)
        log(EPISODE_LEN_MEAN, float(over["length"].mean()), window=1)
        for tag, value in episode_scalars(over, self.env.unwrapped.backbone.points).items():
            log(("route", tag), value, window=1)

    def get_metrics(self) -> Any:
        """What was logged since the last call."""
        return self.metrics.reduce()

    def get_spaces(self) -> dict[str, Any]:
        """The environment's spaces; without one (a driver with remote runners) those handed in."""
        if self.env is None:
            return self.spaces
        spaces = super().get_spaces()
        spaces[DEFAULT_MODULE_ID] = (self.env.single_observation_space, self.env.single_action_space)
        return spaces


class EpisodesRunner(SlabRunner):
    """`SlabRunner` for algorithms that ask for RLlib's episodes: whole walks, each when it has ended.

    A walk that a slab cuts waits for its end: RLlib's V-trace counts a cut episode's rest as nothing.
    """

    def _hand_over(self, slab: Slab) -> list[Any]:
        found = []
        columns = (slab.obs, slab.actions, slab.rewards, slab.logp, slab.logits)
        by_row: list[Any] = [column.transpose(0, 1).numpy() for column in columns]
        for row, ended in enumerate(slab.terminateds.t()):
            start = 0
            for end in [*(ended.nonzero().flatten() + 1).tolist(), len(ended)]:
                walk: tuple[Any, ...] = tuple(column[row, start:end] for column in by_row)
                if row in self._begun:
                    walk = tuple(map(np.concatenate, zip(self._begun.pop(row), walk, strict=True)))
                if start == end or not ended[end - 1]:  # the slab ends, with a walk or within one
                    if len(walk[0]):
                        self._begun[row] = walk
                    continue
                obs, actions, rewards, logp, logits = walk
                seen: Any = np.concatenate([obs, obs[-1:]])  # behind its end there is nothing to see
                found.append(
                    SingleAgentEpisode(
                        observations=seen, infos=[{}] * (len(obs) + 1), actions=actions,
                        rewards=rewards, terminated=True, len_lookback_buffer=0, t_started=0,
                        extra_model_outputs={Columns.ACTION_LOGP: logp, Columns.ACTION_DIST_INPUTS: logits},
                    )
                )  # fmt: skip
                start = end
        return found


def routing_config(
    config: Any,
    env_id: str,
    env_config: dict[str, Any],
    module: RLModuleSpec,
    runner: type[SlabRunner] = SlabRunner,
    *,
    seed: int = 0,
    num_envs: int = 64,
    rollout: int = 72,
    num_env_runners: int = 0,
    num_learners: int = 0,
    num_gpus_per_learner: float = 0,
    num_gpus_per_env_runner: float = 0,
) -> Any:
    """`config`, an RLlib algorithm's, with a routing environment, a module and a runner; and returned.

    Args:
        env_id: a registered dynrl environment; remote workers find it by `dynrl:` before the id.
        env_config: its arguments, without `autoreset_mode`.
        rollout: steps of each sub-environment a training iteration.
        num_env_runners, num_learners: remote processes that sample and that learn; 0: this one does.
        num_gpus_per_env_runner, num_gpus_per_learner: which ray sets aside for each; fractions share one.
    """
    return (
        config.environment(
            f"dynrl:{env_id}", env_config={**env_config, "autoreset_mode": AutoresetMode.SAME_STEP.value}
        )
        .env_runners(
            env_runner_cls=runner,
            num_env_runners=num_env_runners,
            num_gpus_per_env_runner=num_gpus_per_env_runner,
            num_envs_per_env_runner=num_envs,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=rollout,
            sample_timeout_s=600,
        )
        .learners(num_learners=num_learners, num_gpus_per_learner=num_gpus_per_learner)
        .rl_module(rl_module_spec=module)
        .debugging(seed=seed, log_level="ERROR")
    )


def start_ray(num_cpus: int, address: str | None = None) -> bool:
    """Start a quiet local ray, or join the cluster at `address`; whether it did: False where ray runs already.

    Raises:
        ValueError: no cluster there.
    """
    if ray.is_initialized():
        return False
    if address is not None:
        plugins = os.environ.get(VARIABLE)  # the cluster starts its workers: they inherit nothing from here
        told = {"env_vars": {VARIABLE: plugins}} if plugins else None
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=told)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"no ray cluster at {address!r}: {error}") from None
        return True
    ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return True


def router_of(algorithm: Any) -> LearnedPolicy:
    """The policy inside an algorithm, with its newest weights, those of the learner; a copy."""
    kind, config = algorithm.config.rl_module_spec.model_config["router"]
    twin = build_policy(kind, config)
    weights = algorithm.learner_group.get_weights()[DEFAULT_MODULE_ID]
    own = {name.removeprefix("net."): value for name, value in weights.items() if name.startswith("net.")}
    twin.load_state_dict({name: torch.tensor(value) for name, value in own.items()})
    return twin.eval()


class RLlibAgent(Agent):
    """An algorithm of RLlib's on the decision's environment; its file fills in `configure`."""

    def configure(
        self, env_id: str, env_config: dict[str, Any], router: tuple[str, dict[str, Any]], steps: int, **place: Any
    ) -> Any:
        """The algorithm's config.

        Args:
            env_id, env_config, place: as of `routing_config`.
            router: `build_policy`'s arguments.
            steps: of the environment in all, for schedules.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Start ray and build the algorithm."""
        settings, (backbone, _) = self.settings, load_backbone(self.backbone_file)
        if start_ray(max(2, settings.num_env_runners + settings.num_learners + 1), settings.address):
            self._held.callback(ray.shutdown)  # what follows is timed: ray's processes should not share its cores
        # Of steps of the environment, which has one for all decisions of a walk, if they are taken upfront.
        self._decisions = backbone.max_steps if settings.upfront else 1
        self._walk = backbone.max_steps // self._decisions
        self._entropy = entropy_bonus(settings, backbone)
        config = self.configure(
            decision(settings.decision).env_id, env_arguments(settings, self.backbone_file),
            router_arguments(backbone, settings),
            self.total // self._decisions, seed=settings.seed, num_envs=settings.num_envs,
            rollout=rollout_steps(settings, backbone),
            num_env_runners=settings.num_env_runners, num_learners=settings.num_learners,
            # Remote runners see no GPU that ray has not given them.
            num_gpus_per_env_runner=settings.device.startswith("cuda") / max(1, settings.num_env_runners),
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
        runners.foreach_env_runner(lambda runner: runner.make_env() if runner.env is not None else None)


def scalars_of(result: dict[str, Any]) -> dict[str, float]:
    """The scalars of one RLlib training result, by the tags of `TrainingLog`."""
    learned = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    scalars: dict[str, Any] = dict(result["env_runners"].get("route", {}))
    for name, key in (
        ("loss/policy", "policy_loss"), ("loss/value", "vf_loss"), ("loss/value_explained", "vf_explained_var"),
        ("loss/q", "qf_loss"), ("entropy", "entropy"),
    ):  # fmt: skip
        scalars[name] = learned.get(key)
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
