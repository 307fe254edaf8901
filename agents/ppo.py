"""This agent trains by RLlib's PPO, with its own learner and its own advantages from slabs."""

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

from dynrl.agents.base import Ground, entropy_bonus
from dynrl.agents.baselines import BASELINES, Baseline, gae
from dynrl.agents.numbers import ADAM_EPSILON
from dynrl.agents.numbers import PPO as NUMBERS
from dynrl.agents.rllib import RLlibAgent, RouterModule, routing_config
from dynrl.backbones import Backbone
from dynrl.policies import PolicySpec
from dynrl.schema import check_one_of
from dynrl.settings import Settings


class RouterLearner(PPOTorchLearner):
    """This is RLlib's PPO learner with an Adam that makes no leap after gradients were tiny for a long time."""

    def configure_optimizers_for_module(self, module_id: Any, config: Any = None) -> None:
        """Make RLlib's optimiser with `ADAM_EPSILON`."""
        assert self._module is not None
        module = self._module[module_id]
        parameters = self.get_parameters(module)
        optimizer = torch.optim.Adam(parameters, eps=ADAM_EPSILON)
        self.register_optimizer(
            module_id=module_id, optimizer=optimizer, params=parameters, lr_or_lr_schedule=config.lr
        )

    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Set the entropy bonus before the update, too.

        RLlib sets it after the update and keeps none in its checkpoints. The first iteration after a restart would have
        the bonus of the start.
        """
        super().before_gradient_based_update(timesteps=timesteps)
        for module_id, _ in self.module.items():
            schedule = self.entropy_coeff_schedulers_per_module[module_id]
            schedule.update(timestep=timesteps.get(NUM_ENV_STEPS_SAMPLED_LIFETIME, 0))


class SlabGAE(ConnectorV2):
    """This is the whole learner pipeline: it turns slabs into one flat, shuffled batch with advantages.

    A slab (`dynrl.agents.slab`) is what one runner sampled, as tensors [T, N, ...]; RLlib hands slabs over in the place
    of its episodes.
    """

    def __init__(self, *args: Any, gamma: float, lambda_: float, baseline: Baseline, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gamma, self.lambda_, self.baseline = gamma, lambda_, baseline

    @torch.no_grad()
    def __call__(self, *, rl_module: Any, batch: Any, episodes: Any, **kwargs: Any) -> dict[str, Any]:
        """Return a batch of the steps that are learned from, with advantages (standardised over it) and value targets.

        The baseline may choose those steps, and change the advantages of GAE. Value targets stay those of GAE.
        """
        module = rl_module[DEFAULT_MODULE_ID].unwrapped()  # RLlib wraps it where there are several learners
        device = next(module.parameters()).device
        columns: dict[str, list[Tensor]] = {}
        for given in episodes:
            slab = given.to(device)
            flat = slab.obs.flatten(0, 1)
            values = module.compute_values({Columns.OBS: torch.cat([flat, slab.last_obs])})
            values = values.view(len(slab.rewards) + 1, -1)
            estimates = gae(slab.rewards, values, slab.terminateds, self.gamma, self.lambda_)
            advantages, learned_from = self.baseline.advantages(slab, estimates)
            kept: slice | Tensor = slice(None) if learned_from is None else learned_from.flatten()
            for name, column in (
                (Columns.OBS, flat),
                (Columns.ACTIONS, slab.actions.flatten(0, 1)),
                (Columns.ACTION_LOGP, slab.logp.flatten()),
                (Columns.ACTION_DIST_INPUTS, slab.logits.flatten(0, 1)),
                (Postprocessing.ADVANTAGES, advantages.flatten()),
                (Postprocessing.VALUE_TARGETS, (estimates + values[:-1]).flatten()),
            ):
                columns.setdefault(name, []).append(column[kept])
        # Neighbours in a slab stand at the same point; the rows of a minibatch should not.
        order = torch.randperm(sum(map(len, columns[Columns.OBS])), device=device)
        flat_batch = {name: torch.cat(parts)[order] for name, parts in columns.items()}
        raw = flat_batch[Postprocessing.ADVANTAGES]
        flat_batch[Postprocessing.ADVANTAGES] = (raw - raw.mean()) / raw.std().clamp_min(1e-4)
        return {DEFAULT_MODULE_ID: flat_batch}


def check_shares(num_envs: int, num_learners: int, baseline: Baseline) -> None:
    """Refuse, with a ValueError, a number of environments that learners cannot share equally in whole groups."""
    learners = max(1, num_learners)
    if num_envs % (learners * baseline.group):
        raise ValueError(
            f"{learners} learners, groups of {baseline.group} routes of one input: expected "
            f"{learners * baseline.group} x n environments (--num-envs), got {num_envs}"
        )


def ppo_config(
    env_id: str,
    env_config: dict[str, Any],
    spec: PolicySpec,
    *,
    baseline: str = Baseline.name,
    num_envs: int = 64,
    rollout: int = 72,
    num_env_runners: int = 0,
    num_learners: int = 0,
    total_steps: int = 500_000,
    learning_rate: float = NUMBERS.learning_rate,
    entropy: float = NUMBERS.entropy,
    **place: Any,
) -> PPOConfig:
    """Return a configuration of RLlib's PPO with our runner and connector.

    Any other setting of RLlib can be changed on the result. Not so `gamma` and `lambda_`: the connector holds its own,
    and a change on the result would do nothing.

    Args:
        env_id, env_config, num_envs, rollout, num_env_runners, num_learners, place: the same as in `routing_config`.
        spec: the specification that builds the policy.
        baseline: what rewards are compared with, a name in `BASELINES`.
        total_steps: the environment steps over which the learning rate and the entropy bonus fall to a tenth.
        learning_rate, entropy: their values at the start.

    Raises:
        ValueError: the environments cannot be shared equally among the learners in whole groups.
    """
    compared = BASELINES[baseline]
    check_shares(num_envs, num_learners, compared)
    batch = num_envs * rollout * max(1, num_env_runners) // max(1, num_learners)
    module = RLModuleSpec(module_class=RouterModule, model_config={"spec": spec, "baseline": baseline})
    config: PPOConfig = routing_config(
        PPOConfig(), env_id, {**env_config, "group": compared.group}, module,
        num_envs=num_envs, rollout=rollout, num_env_runners=num_env_runners, num_learners=num_learners, **place,
    )  # fmt: skip
    return config.training(
        train_batch_size_per_learner=batch,
        minibatch_size=batch // NUMBERS.minibatches,
        num_epochs=NUMBERS.epochs,
        lr=falling(learning_rate, total_steps),
        entropy_coeff=falling(entropy, total_steps),
        gamma=NUMBERS.gamma,
        lambda_=NUMBERS.lambda_,
        clip_param=NUMBERS.clip,
        grad_clip=NUMBERS.gradient_norm,
        vf_loss_coeff=NUMBERS.value_weight,
        vf_clip_param=float("inf"),  # RLlib clips squared errors at 10: critics that are far off get no gradient
        use_kl_loss=False,
        add_default_connectors_to_learner_pipeline=False,
        learner_class=RouterLearner,
        learner_connector=lambda *spaces: SlabGAE(gamma=NUMBERS.gamma, lambda_=NUMBERS.lambda_, baseline=compared),
    )


def falling(start: float, steps: int) -> Any:
    """Return RLlib's schedule of a number that falls from `start` to a tenth of it over `steps`."""
    return [[0, start], [steps, start / 10]]


class PPO(RLlibAgent):
    """This agent is proximal policy optimisation (Schulman et al. 2017)."""

    cannot = {}

    @classmethod
    def refuse(cls, settings: Settings, backbone: Backbone) -> None:
        """Also refuse baselines that are unknown or do not fit the policy, and environments that cannot be shared."""
        super().refuse(settings, backbone)
        learning = settings.learning
        check_one_of("baseline", learning.baseline, BASELINES)
        baseline = BASELINES[learning.baseline]
        if baseline.one_look and Ground.of(learning, backbone).looks > 1:
            raise ValueError(
                f"the baseline {learning.baseline} compares whole routes; choose a policy that decides upfront"
            )
        check_shares(learning.num_envs, settings.place.num_learners, baseline)

    def configure(
        self, env_id: str, env_config: dict[str, Any], spec: PolicySpec, steps: int, **place: Any
    ) -> PPOConfig:
        """Configure PPO by `ppo_config` from the settings."""
        learning = self.settings.learning
        return ppo_config(
            env_id, env_config, spec, baseline=learning.baseline, total_steps=steps,
            entropy=entropy_bonus(learning, NUMBERS.entropy, self.backbone),
            learning_rate=learning.learning_rate or NUMBERS.learning_rate, **place,
        )  # fmt: skip
