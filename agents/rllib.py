"""RLlib's PPO on a routing environment: the router as RLModule, a runner without episode objects, and its GAE.

RLlib's training step, learners, checkpoints, evaluation and Tune stay stock. Its own runner costs 40 to 150
microseconds of Python a step and knows next-step autoreset only; `SlabRunner` steps the environment in torch and
returns one time-major slab, which `SlabGAE` turns into the learner's batch.
"""

from __future__ import annotations

import logging
import os
from typing import Any

# Before ray is imported: it reads them once. No telemetry; no warnings about machines without accelerators.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical, TorchMultiCategorical
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.metrics import (
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
    SAMPLE_TIMER,
    WEIGHTS_SEQ_NO,
)
from torch import Tensor, nn

from dynrl.agents.training import GROUP
from dynrl.backbones import choice_rates
from dynrl.envs.core import RoutingVectorEnv
from dynrl.policies import LearnedPolicy, build_policy

for _name in ("ray", "ray.rllib", "ray.tune"):  # each has a level of its own
    logging.getLogger(_name).setLevel(logging.ERROR)


# Of Adam (torch's and RLlib's is 1e-8). A policy that has found the best routes has next to no gradient for long; then
# one draw of a choice of probability 5e-5 that costs much is a gradient some thousand times as large as those that Adam
# remembers, and its step has flipped the policy for good (measured on skipping of `dynrl bench known`, by routers whose
# features were standardised: one of three seeds fell from 100 to 43 % of the gap; with this none of five did, through
# draws of that kind).
ADAM_EPSILON = 1e-5


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

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.net(batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """[n], the return expected from each observation."""
        return self.value(self.net.trunk(batch[Columns.OBS])).squeeze(-1)


class RouterLearner(PPOTorchLearner):
    """RLlib's PPO learner with an Adam that does not leap where gradients have long been next to nothing."""

    def configure_optimizers_for_module(self, module_id: Any, config: Any = None) -> None:
        """As RLlib's, with `ADAM_EPSILON`."""
        assert self._module is not None
        module = self._module[module_id]
        parameters = self.get_parameters(module)
        optimizer = torch.optim.Adam(parameters, eps=ADAM_EPSILON)
        self.register_optimizer(
            module_id=module_id, optimizer=optimizer, params=parameters, lr_or_lr_schedule=config.lr
        )


class Slab:
    """T steps of N sub-environments, time first. Stands where RLlib expects a list of episodes.

    A plain class: RLlib takes dicts and tuples apart when it gathers samples.

    Attributes:
        obs [T, N, D], actions [T, N] (upfront [T, N, decisions]), rewards [T, N], terminateds [T, N] bool,
        logp [T, N], logits [T, N, A]; greedy [T, N], what the likeliest actions would have earned, or [T, 0];
        episodes [T, N] int64, the number of each row's episode, -1 where it began before the slab, or [T, 0];
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
    ) -> list[Slab]:
        """Collect at least `num_timesteps` steps, or `num_episodes` episodes from fresh ones on."""
        explore = self.config.explore if explore is None else explore
        env: RoutingVectorEnv = self.env.unwrapped
        count = env.num_envs
        self.metrics.log_value(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
        with self.metrics.log_time(SAMPLE_TIMER), torch.no_grad():
            if num_timesteps is None and num_episodes is None:
                num_timesteps = self.config.get_rollout_fragment_length(self.worker_index) * count
            if self._obs is None or force_reset or num_episodes is not None or self._needs_initial_reset:
                seed = self._seed if self._needs_initial_reset else None
                # RLlib's seeds of workers are one apart, sub-environments count on from theirs: spread them. The steps
                # done so far, so that a resumed run does not meet its first inputs again.
                self._obs = env.reset_tensors(
                    None if seed is None else seed * 1_000_003 + 31 * self.num_env_steps_sampled_lifetime
                )
                self._needs_initial_reset = False
                self._returns, self._lengths = torch.zeros(2, count, device=env.device)
            steps: list[tuple[Tensor, ...]] = []
            ended: list[dict[str, Tensor]] = []
            obs, done = self._obs, 0
            module: Any = self.module
            net: LearnedPolicy = module.net
            baseline = module.model_config.get("baseline")
            leads = torch.arange(count, device=env.device) % GROUP == 0
            # Whose episodes began before this slab, and which those are.
            earlier = torch.where(self._lengths > 0, env.episodes, -1)
            while len(steps) * count < num_timesteps if num_timesteps is not None else done < (num_episodes or 0):
                logits = net(obs)
                # A row for each decision: one of each observation, or all of a walk's.
                log_probs = torch.log_softmax(logits.view(-1, net.choices), 1)
                likeliest = log_probs.argmax(1)
                if random_actions:
                    actions = torch.randint(env.backbone.num_choices, likeliest.shape, device=env.device)
                elif explore:
                    # The largest of log-probability plus Gumbel noise is a draw from the distribution.
                    actions = (log_probs - torch.empty_like(log_probs).exponential_().log_()).argmax(1)
                else:
                    actions = likeliest
                if baseline == "group":
                    actions = torch.where(leads.repeat_interleave(net.decisions), likeliest, actions)
                logp = log_probs.gather(1, actions.unsqueeze(1)).view(count, -1).sum(1)
                if env.upfront:
                    actions, likeliest = actions.view(count, -1), likeliest.view(count, -1)
                greedy = env.foresee(likeliest) if baseline == "greedy" else torch.empty(0)
                number = torch.empty(0)
                if baseline == "group":
                    number = env.episodes
                    number = torch.where(number == earlier, -1, number)
                following, rewards, terminated, info = env.step_tensors(actions)
                steps.append((obs, actions, rewards, terminated, logp, logits, greedy, number))
                self._returns += rewards
                self._lengths += 1
                if "route" in info:
                    names = (env.task.metric, "macs_fraction", "price", "route")
                    over = {name: info[name][terminated] for name in names}
                    over |= {"return": self._returns[terminated], "length": self._lengths[terminated]}
                    ended.append(over)
                    done += len(over["return"])
                    self._returns[terminated], self._lengths[terminated] = 0, 0
                obs = following
            self._obs = obs
        self._report(len(steps) * count, done, ended)
        slab = Slab(steps, obs)
        return [slab if env.device.type == "cpu" else slab.to_host()]  # it may travel to another process

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
        for name in (self.env.unwrapped.task.metric, "macs_fraction", "price"):
            log(("route", "mean", name), float(over[name].mean()), window=1)
        route = over["route"]
        log(("route", "distinct"), float(len(route.unique(dim=0))), window=1)
        for tag, share in choice_rates(self.env.unwrapped.backbone.points, route).items():
            log(("route", "rate", tag), share, window=1)

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


class SlabGAE(ConnectorV2):
    """The whole learner pipeline: slabs to one flat, shuffled batch with advantages (Schulman et al. 2016)."""

    def __init__(self, *args: Any, gamma: float, lambda_: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gamma, self.lambda_ = gamma, lambda_

    @torch.no_grad()
    def __call__(self, *, rl_module: Any, batch: Any, episodes: Any, **kwargs: Any) -> dict[str, Any]:
        """Values, advantages (standardised over the batch), and value targets for every step of every slab."""
        module = rl_module[DEFAULT_MODULE_ID]
        device = next(module.parameters()).device
        columns: dict[str, list[Tensor]] = {}
        for slab in episodes:
            length, count = slab.rewards.shape
            obs, rewards, ended = slab.obs.to(device), slab.rewards.to(device), slab.terminateds.to(device)
            flat = obs.flatten(0, 1)
            values = module.compute_values({Columns.OBS: torch.cat([flat, slab.last_obs.to(device)])})
            values = values.view(length + 1, count)
            advantages = gae(rewards, values, ended, self.gamma, self.lambda_)
            targets = advantages + values[:-1]
            kept: slice | Tensor = slice(None)
            if slab.greedy.numel():
                advantages = rewards - slab.greedy.to(device)
            if slab.episodes.numel():
                advantages, learned_from = group_advantages(rewards, ended, slab.episodes.to(device), GROUP)
                kept = learned_from.flatten()
            for name, column in (
                (Columns.OBS, flat),
                (Columns.ACTIONS, slab.actions.to(device).flatten(0, 1)),
                (Columns.ACTION_LOGP, slab.logp.to(device).flatten()),
                (Columns.ACTION_DIST_INPUTS, slab.logits.to(device).flatten(0, 1)),
                (Postprocessing.ADVANTAGES, advantages.flatten()),
                (Postprocessing.VALUE_TARGETS, targets.flatten()),
            ):
                columns.setdefault(name, []).append(column[kept])
        # Neighbours in a slab stand at the same point; minibatches should not.
        order = torch.randperm(sum(map(len, columns[Columns.OBS])), device=device)
        flat_batch = {name: torch.cat(parts)[order] for name, parts in columns.items()}
        raw = flat_batch[Postprocessing.ADVANTAGES]
        flat_batch[Postprocessing.ADVANTAGES] = (raw - raw.mean()) / raw.std().clamp_min(1e-4)
        return {DEFAULT_MODULE_ID: flat_batch}


def gae(rewards: Tensor, values: Tensor, ended: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, equation 16), episodes cut where `ended`.

    Args:
        rewards, ended: [T, N]; `ended` where the episode ended with that step.
        values: [T + 1, N], of each observation and of the one after the last.

    Returns:
        [T, N].
    """
    alive = (~ended).float()
    delta = rewards + gamma * values[1:] * alive - values[:-1]
    advantages = torch.zeros_like(delta)
    running = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + gamma * lambda_ * alive[t] * running
        advantages[t] = running
    return advantages


def group_advantages(rewards: Tensor, ended: Tensor, episodes: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """What each route earned, less what its group did on average: of one input, at one price (Shao et al. 2024,
    "DeepSeekMath", section 4.1, without their division by the group's spread: inputs whose routes differ little should
    not count as much as others).

    The first of each group is the greedy route, which is compared with and not learned from, as it was not drawn.

    Args:
        rewards, ended: [T, N].
        episodes: [T, N] int64; -1 where an episode began earlier.

    Returns:
        [T, N] each: advantages, the same for all steps of a route, and which steps to learn from: those of groups whose
        routes lie in the slab as wholes.

    Raises:
        ValueError: there are none.
    """
    count = rewards.shape[1]
    valid = episodes >= 0
    number = (episodes - episodes.where(valid, episodes.max()).min()).clamp_min(0)
    key = number * count + torch.arange(count, device=rewards.device)
    size = (int(number.max()) + 1) * count
    returns = rewards.new_zeros(size).index_add(0, key[valid], rewards[valid])
    whole = torch.zeros(size, dtype=torch.bool, device=rewards.device)
    whole[key[valid & ended]] = True
    grouped = returns.view(-1, group)
    relative = (grouped - grouped.mean(1, keepdim=True)).flatten()
    whole = whole.view(-1, group).all(1, keepdim=True).expand(-1, group).flatten()
    kept = valid & whole[key] & (torch.arange(count, device=rewards.device) % group > 0)
    if not kept.any():
        raise ValueError(f"no {group} routes of one input end within {len(rewards)} steps; sample more at a time")
    return relative[key], kept


def ppo_config(
    env_id: str,
    env_config: dict[str, Any],
    router: tuple[str, dict[str, Any]],
    *,
    baseline: str = "value",
    seed: int = 0,
    num_envs: int = 64,
    rollout: int = 72,
    num_env_runners: int = 0,
    num_learners: int = 0,
    num_gpus_per_learner: float = 0,
    num_gpus_per_env_runner: float = 0,
    total_steps: int = 500_000,
    learning_rate: float = 2e-3,
    entropy: float = 0.01,
) -> PPOConfig:
    """PPO with our runner and connector; any further RLlib setting can be changed on what is returned.

    Args:
        env_id: a registered dynrl environment; remote workers find it by `dynrl:` before the id.
        env_config: its arguments, without `autoreset_mode`.
        router: `build_policy`'s arguments.
        baseline: of the advantages, see `Settings`.
        rollout: steps of each sub-environment a training iteration.
        num_env_runners, num_learners: remote processes that sample and that learn; 0: this one does.
        num_gpus_per_env_runner, num_gpus_per_learner: which ray sets aside for each; fractions share one.
        total_steps: environment steps over which the learning rate and the entropy bonus fall to a tenth.

    Raises:
        ValueError: more than one learner: a slab is not split between learners; environments that make no groups.
    """
    if baseline == "group":
        if num_envs % GROUP:
            raise ValueError(
                f"groups of {GROUP} routes of one input: expected {GROUP} x n environments, got {num_envs}"
            )
        env_config = {**env_config, "group": GROUP}
    if num_learners > 1:
        raise ValueError(f"expected at most one learner, got {num_learners}: a slab is not split between learners")
    per_runner = num_envs * rollout
    model = {"router": list(router), "baseline": baseline}
    schedule: Any = [[0, entropy], [total_steps, entropy / 10]]
    config = (
        PPOConfig()
        .environment(f"dynrl:{env_id}", env_config={**env_config, "autoreset_mode": AutoresetMode.SAME_STEP.value})
        .env_runners(
            env_runner_cls=SlabRunner,
            num_env_runners=num_env_runners,
            num_gpus_per_env_runner=num_gpus_per_env_runner,
            num_envs_per_env_runner=num_envs,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=rollout,
            sample_timeout_s=600,
        )
        .learners(num_learners=num_learners, num_gpus_per_learner=num_gpus_per_learner)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=RouterModule, model_config=model))
        .training(
            train_batch_size_per_learner=per_runner * max(1, num_env_runners),
            minibatch_size=per_runner * max(1, num_env_runners) // 8,
            num_epochs=4,
            lr=[[0, learning_rate], [total_steps, learning_rate / 10]],
            entropy_coeff=schedule,
            gamma=1.0,
            lambda_=0.95,
            clip_param=0.2,
            grad_clip=0.5,
            vf_loss_coeff=0.5,
            vf_clip_param=float("inf"),  # RLlib clips the squared error at 10: no gradient where the critic is far off
            use_kl_loss=False,
            add_default_connectors_to_learner_pipeline=False,
            learner_class=RouterLearner,
        )
        .debugging(seed=seed, log_level="ERROR")
    )
    gamma, lambda_ = config.gamma, config.lambda_
    return config.training(learner_connector=lambda *spaces: SlabGAE(gamma=gamma, lambda_=lambda_))


def start_ray(num_cpus: int, address: str | None = None) -> bool:
    """Start a quiet local ray, or join the cluster at `address`; whether it did: False where ray runs already.

    Raises:
        ValueError: no cluster there.
    """
    if ray.is_initialized():
        return False
    if address is not None:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"no ray cluster at {address!r}: {error}") from None
        return True
    ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return True


def router_of(algorithm: Any) -> LearnedPolicy:
    """The policy inside an algorithm, with its newest weights; a copy."""
    module = algorithm.get_module(DEFAULT_MODULE_ID)
    assert module is not None
    twin = build_policy(module.net.kind, module.net.config)
    twin.load_state_dict(module.net.state_dict())
    return twin.eval()
