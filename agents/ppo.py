"""PPO, by RLlib, as an agent of `dynrl train`: its advantages from slabs, and its learner."""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from torch import Tensor

from dynrl.agents.rllib import RLlibAgent, RouterModule, routing_config
from dynrl.agents.training import GROUP, check_shares

# Of Adam (torch's and RLlib's is 1e-8). A policy that has found the best routes has next to no gradient for long; then
# one draw of a choice of probability 5e-5 that costs much is a gradient some thousand times as large as those that Adam
# remembers, and its step has flipped the policy for good (measured on skipping of `dynrl bench known`, by routers whose
# features were standardised: one of three seeds fell from 100 to 43 % of the gap; with this none of five did, through
# draws of that kind).
ADAM_EPSILON = 1e-5


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

    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Also sets the entropy bonus. RLlib sets it afterwards and keeps none in its checkpoints: the first iteration
        after a restart would have that of the start.
        """
        super().before_gradient_based_update(timesteps=timesteps)
        for module_id, _ in self.module.items():
            schedule = self.entropy_coeff_schedulers_per_module[module_id]
            schedule.update(timestep=timesteps.get(NUM_ENV_STEPS_SAMPLED_LIFETIME, 0))


class SlabGAE(ConnectorV2):
    """The whole learner pipeline: slabs to one flat, shuffled batch with advantages (Schulman et al. 2016)."""

    def __init__(self, *args: Any, gamma: float, lambda_: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gamma, self.lambda_ = gamma, lambda_

    @torch.no_grad()
    def __call__(self, *, rl_module: Any, batch: Any, episodes: Any, **kwargs: Any) -> dict[str, Any]:
        """Values, advantages (standardised over the batch), and value targets for every step of every slab."""
        module = rl_module[DEFAULT_MODULE_ID].unwrapped()  # of several learners each wraps it
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
        episodes: [T, N] int64, their numbers; none began earlier.

    Returns:
        [T, N] each: advantages, the same for all steps of a route, and which steps to learn from: those of groups whose
        routes lie in the slab as wholes.

    Raises:
        ValueError: there are none.
    """
    count = rewards.shape[1]
    number = episodes - episodes.min()
    key = number * count + torch.arange(count, device=rewards.device)
    size = (int(number.max()) + 1) * count
    returns = rewards.new_zeros(size).index_add(0, key.flatten(), rewards.flatten())
    whole = torch.zeros(size, dtype=torch.bool, device=rewards.device)
    whole[key[ended]] = True
    grouped = returns.view(-1, group)
    relative = (grouped - grouped.mean(1, keepdim=True)).flatten()
    whole = whole.view(-1, group).all(1, keepdim=True).expand(-1, group).flatten()
    kept = whole[key] & (torch.arange(count, device=rewards.device) % group > 0)
    if not kept.any():
        raise ValueError(f"no {group} routes of one input end within {len(rewards)} steps; sample more at a time")
    return relative[key], kept


def ppo_config(
    env_id: str,
    env_config: dict[str, Any],
    router: tuple[str, dict[str, Any]],
    *,
    baseline: str = "value",
    num_envs: int = 64,
    rollout: int = 72,
    num_env_runners: int = 0,
    num_learners: int = 0,
    total_steps: int = 500_000,
    learning_rate: float = 2e-3,
    entropy: float = 0.01,
    **place: Any,
) -> PPOConfig:
    """PPO with our runner and connector; any further RLlib setting can be changed on what is returned, but for `gamma`
    and `lambda_`, which the connector holds.

    Args:
        env_id, env_config, num_envs, rollout, num_env_runners, num_learners, place: see `routing_config`.
        router: `build_policy`'s arguments.
        baseline: of the advantages, see `Settings`.
        total_steps: environment steps over which the learning rate and the entropy bonus fall to a tenth.

    Raises:
        ValueError: environments that cannot be shared out among learners, or make no groups.
    """
    if baseline == "group":
        env_config = {**env_config, "group": GROUP}
    check_shares(num_envs, num_learners, baseline)
    batch = num_envs * rollout * max(1, num_env_runners) // max(1, num_learners)
    model = {"router": list(router), "baseline": baseline}
    config: PPOConfig = routing_config(
        PPOConfig(), env_id, env_config, RLModuleSpec(module_class=RouterModule, model_config=model),
        num_envs=num_envs, rollout=rollout, num_env_runners=num_env_runners, num_learners=num_learners, **place,
    ).training(
        train_batch_size_per_learner=batch,
        minibatch_size=batch // 8,
        num_epochs=4,
        lr=[[0, learning_rate], [total_steps, learning_rate / 10]],
        entropy_coeff=[[0, entropy], [total_steps, entropy / 10]],
        gamma=1.0,
        lambda_=0.95,
        clip_param=0.2,
        grad_clip=0.5,
        vf_loss_coeff=0.5,
        vf_clip_param=float("inf"),  # RLlib clips the squared error at 10: no gradient where the critic is far off
        use_kl_loss=False,
        add_default_connectors_to_learner_pipeline=False,
        learner_class=RouterLearner,
    )  # fmt: skip
    gamma, lambda_ = config.gamma, config.lambda_
    return config.training(learner_connector=lambda *spaces: SlabGAE(gamma=gamma, lambda_=lambda_))


class PPO(RLlibAgent):
    """Proximal policy optimisation (Schulman et al. 2017)."""

    def configure(
        self, env_id: str, env_config: dict[str, Any], router: tuple[str, dict[str, Any]], steps: int, **place: Any
    ) -> PPOConfig:
        """As `ppo_config` says."""
        return ppo_config(
            env_id, env_config, router,
            baseline=self.settings.baseline, total_steps=steps, entropy=self._entropy,
            learning_rate=self.settings.learning_rate or 2e-3, **place,
        )  # fmt: skip
