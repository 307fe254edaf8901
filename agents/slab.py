"""These runners sample for RLlib: `SlabRunner` steps the environment in torch and returns one time-major `Slab`.

RLlib's own runner spends much Python time on each step and supports next-step autoreset only. `EpisodesRunner` cuts a
slab into RLlib's episodes, for algorithms that ask for them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
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
from torch import Tensor

from dynrl.agents.baselines import BASELINES, Baseline
from dynrl.agents.metrics import ended_episodes, episode_scalars
from dynrl.envs.core import RoutingVectorEnv, stepped_in_torch


class Slab:
    """A slab holds T steps of N sub-environments as named columns, time first.

    It takes the place of RLlib's lists of episodes. It is a plain class, since RLlib takes dicts and tuples apart when
    it gathers samples.

    Attributes:
        obs: [T, N, D], the observations.
        actions: [T, N], or [T, N, decisions] if one look is answered by several decisions.
        rewards: [T, N], the rewards.
        terminateds: [T, N] bool, whether the episode ended with that step.
        logp: [T, N], the log-probability with which the actions were drawn.
        logits: [T, N, A], the policy's logits.
        last_obs: [N, D], the observation that the next slab begins with.
        episodes, greedy: [T, N], columns that a baseline keeps (see `dynrl.agents.baselines`).
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    terminateds: Tensor
    logp: Tensor
    logits: Tensor
    last_obs: Tensor
    episodes: Tensor
    greedy: Tensor

    def __init__(self, columns: Mapping[str, Tensor], last_obs: Tensor) -> None:
        vars(self).update(columns, last_obs=last_obs)

    def to(self, device: torch.device | str) -> Slab:
        """Return a slab of the same columns on `device`."""
        columns = {name: value.to(device) for name, value in vars(self).items()}
        return Slab(columns, columns.pop("last_obs"))

    def split(self, parts: int) -> list[Slab]:
        """Split the slab into equal parts of the sub-environments, whose number must be a multiple of `parts`."""
        found = [copy.copy(self) for _ in range(parts)]
        for name, value in vars(self).items():
            for slab, piece in zip(found, value.chunk(parts, 0 if name == "last_obs" else 1), strict=True):
                # A view would take its whole base along when it is sent to another process.
                setattr(slab, name, piece.clone() if parts > 1 else piece)
        return found

    def __len__(self) -> int:
        return self.rewards.numel()


class SlabRunner(SingleAgentEnvRunner):
    """This runner steps a `RoutingVectorEnv` with same-step autoreset in torch, and returns one `Slab` a sample."""

    env: Any

    def make_env(self) -> None:
        """Make the environment like RLlib, but without the wrapper that turns infos into Python lists."""
        super().make_env()
        self.env = stepped_in_torch(self.env.env)
        self._obs: Tensor | None = None
        self._lengths = torch.zeros(0)
        self._begun: dict[int, tuple[Any, ...]] = {}  # for `EpisodesRunner`: the begun walk of a row

    def make_module(self) -> None:
        """Make the module like RLlib, but on the device of the environment."""
        if self.env is not None:
            self._device = self.env.device
        super().make_module()

    @property
    def _baseline(self) -> Baseline:
        module: Any = self.module
        return BASELINES[module.model_config.get("baseline", Baseline.name)]

    def sample(  # type: ignore[override]
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[Any]:
        """Collect at least `num_timesteps` steps, or new episodes until `num_episodes` of them have ended.

        Short walks end first, so which episodes are logged is fixed before they begin: as many of each row.
        """
        explore = self.config.explore if explore is None else explore
        env: RoutingVectorEnv = self.env
        count, fresh = env.num_envs, force_reset or num_episodes is not None
        self.metrics.log_value(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
        with self.metrics.log_time(SAMPLE_TIMER), torch.no_grad():
            if num_timesteps is None and num_episodes is None:
                num_timesteps = self.config.get_rollout_fragment_length(self.worker_index) * count
            obs = self._first_obs(fresh)
            drawn, most = self._baseline.drawn(count).to(env.device), self._logged(num_timesteps, num_episodes)
            over = torch.zeros(count, dtype=torch.int64, device=env.device)  # how many episodes of each row have ended
            steps: list[dict[str, Tensor]] = []
            ended: list[dict[str, Tensor]] = []
            before = self.num_env_steps_sampled_lifetime
            while len(steps) * count < num_timesteps if num_timesteps is not None else bool((over[drawn] < most).any()):
                step = self._decide(obs, before + len(steps) * count, explore, random_actions)
                following, rewards, terminated, info = env.step_tensors(step["actions"])
                steps.append({**step, "rewards": rewards, "terminateds": terminated})
                self._returns += rewards
                self._lengths += 1
                if "route" in info:
                    logged = terminated & drawn & (over < most)
                    found = ended_episodes(env, info | {"ended": logged}, self._returns)
                    ended.append(found | {"length": self._lengths[logged]})
                    over += terminated
                    self._returns[terminated], self._lengths[terminated] = 0, 0
                obs = following
            self._obs = obs
        self._report(len(steps) * count, int(over.sum()), ended)
        return self._hand_over(Slab({name: torch.stack([s[name] for s in steps]) for name in steps[0]}, obs).to("cpu"))

    def _logged(self, num_timesteps: int | None, num_episodes: int | None) -> float:
        """Return how many episodes of each row are logged at most; where slabs go on with walks, it is all that end."""
        env: RoutingVectorEnv = self.env
        if num_timesteps is None:
            assert num_episodes is not None
            return math.ceil(num_episodes / int(self._baseline.drawn(env.num_envs).sum()))
        if not self._baseline.begins_anew:
            return math.inf
        # So many end in the slab, however long they are.
        return math.ceil(num_timesteps / env.num_envs) // env.sight.looks(env.backbone.max_steps)

    def _first_obs(self, fresh: bool) -> Tensor:
        """Return what the rows see before the first step: where they stood, or the beginning of new episodes."""
        env: RoutingVectorEnv = self.env
        # New episodes for a baseline are drawn by a new seed.
        anew = self._baseline.begins_anew and bool(self._lengths.any())
        self._needs_initial_reset = self._needs_initial_reset or anew
        if self._obs is None or fresh or self._needs_initial_reset:
            self._obs = env.reset_tensors(self._new_seed() if self._needs_initial_reset else None)
            self._needs_initial_reset = False
            self._returns, self._lengths = torch.zeros(2, env.num_envs, device=env.device)
            self._begun = {}
        return self._obs

    def _decide(self, obs: Tensor, sampled: int, explore: bool, random_actions: bool) -> dict[str, Tensor]:
        """Return the columns of one step that are known before it is taken, when `sampled` steps came before."""
        env: RoutingVectorEnv = self.env
        module: Any = self.module
        net = module.net
        shape: Any = env.action_space.shape
        scores = net.scores(obs)
        logits = module.logits(scores)
        # There is one row for each decision: one an observation, or all decisions of a walk.
        log_probs = torch.log_softmax(logits.view(-1, net.sight.choices), 1)
        likeliest = scores.view(-1, net.sight.choices).argmax(1)
        if random_actions:
            actions = torch.randint(env.backbone.num_choices, likeliest.shape, device=env.device)
        else:
            actions = module.explore(log_probs, sampled) if explore else likeliest
        actions = self._baseline.replace(actions, likeliest, net.sight.decisions)
        logp = log_probs.gather(1, actions.unsqueeze(1)).view(len(obs), -1).sum(1)
        kept = self._baseline.columns(env, likeliest.view(shape))
        return {"obs": obs, "actions": actions.view(shape), "logp": logp, "logits": logits, **kept}

    def _new_seed(self) -> int | None:
        """Return a seed that no other worker of any run has (RLlib only adds a worker's number to its run's seed).

        After a restart, the seed differs from that of the start, so that other inputs are met.
        """
        if self.config.seed is None:
            return None
        own = (self.config.seed, self.worker_index, self.num_env_steps_sampled_lifetime)
        return int(np.random.SeedSequence(own).generate_state(1, np.uint64)[0]) >> 2  # leaves room to count upwards

    def _hand_over(self, slab: Slab) -> list[Any]:
        """Return slabs of equal size, one for each learner; RLlib shares them out whole."""
        return slab.split(max(1, self.config.num_learners))

    def _report(self, steps: int, episodes: int, ended: list[dict[str, Tensor]]) -> None:
        """Log one sample, and count its steps like RLlib's own runner: PPO's training step reads these counts."""
        self._increase_sampled_metrics(steps, episodes)
        self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=steps)
        if not any(len(part["return"]) for part in ended):
            return
        over = {name: torch.cat([part[name] for part in ended]) for name in ended[0]}
        log = self.metrics.log_value
        log(EPISODE_RETURN_MEAN, float(over["return"].mean()), window=1)
        log(EPISODE_RETURN_MIN, float(over["return"].min()), reduce="min", window=1)
        log(EPISODE_RETURN_MAX, float(over["return"].max()), reduce="max", window=1)
        log(EPISODE_LEN_MEAN, float(over["length"].mean()), window=1)
        for tag, value in episode_scalars(over, self.env.backbone.points).items():
            log(("route", tag), value, window=1)

    def get_metrics(self) -> Any:
        """Return what was logged since the last call."""
        return self.metrics.reduce()

    def get_spaces(self) -> dict[str, Any]:
        """Return the environment's spaces; a driver of remote runners has none and returns those it was given."""
        if self.env is None:
            return self.spaces
        spaces = super().get_spaces()
        spaces[DEFAULT_MODULE_ID] = (self.env.single_observation_space, self.env.single_action_space)
        return spaces


class EpisodesRunner(SlabRunner):
    """This `SlabRunner` returns RLlib's episodes: whole walks, each once it has ended.

    A walk that a slab cuts is kept until it ends, because RLlib's V-trace counts the rest of a cut episode as nothing.
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
                if start == end or not ended[end - 1]:  # the slab ends here, after a walk or within one
                    if len(walk[0]):
                        self._begun[row] = walk
                    continue
                obs, actions, rewards, logp, logits = walk
                seen: Any = np.concatenate([obs, obs[-1:]])  # RLlib wants an observation after the end; there is none
                found.append(
                    SingleAgentEpisode(
                        observations=seen, infos=[{}] * (len(obs) + 1), actions=actions,
                        rewards=rewards, terminated=True, len_lookback_buffer=0, t_started=0,
                        extra_model_outputs={Columns.ACTION_LOGP: logp, Columns.ACTION_DIST_INPUTS: logits},
                    )
                )  # fmt: skip
                start = end
        return found
