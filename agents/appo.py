"""This agent trains by RLlib's APPO: runners sample while the learner learns."""

from __future__ import annotations

from typing import Any

from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from dynrl.agents.base import entropy_bonus
from dynrl.agents.numbers import PPO as NUMBERS
from dynrl.agents.ppo import falling
from dynrl.agents.rllib import FormerModule, RLlibAgent, routing_config
from dynrl.agents.slab import EpisodesRunner
from dynrl.policies import PolicySpec

BATCHES, TIMES = 2, 4  # how many batches the learner holds at a time, and how often it learns from each
REPORTED = 8  # how many batches a training iteration has


class OldRouterModule(FormerModule):
    """This module holds a policy and its former self; APPO compares the two to correct for old samples."""

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the logits of the former policy."""
        return {TARGET_NETWORK_ACTION_DIST_INPUTS: self._old(batch[Columns.OBS])}


class APPO(RLlibAgent):
    """APPO is asynchronous PPO: V-trace corrects for samples of an older policy (Espeholt et al. 2018, IMPALA).

    APPO scales to many runners, which need not wait for each other. On one machine of few cores, PPO learns more from
    the same number of steps.
    """

    def configure(
        self, env_id: str, env_config: dict[str, Any], spec: PolicySpec, steps: int, **place: Any
    ) -> APPOConfig:
        """Configure APPO with our runner; a batch has one walk of each sub-environment of one runner."""
        learning = self.settings.learning
        rate = learning.learning_rate or NUMBERS.learning_rate
        entropy = entropy_bonus(learning, NUMBERS.entropy, self.backbone)
        place["rollout"] = self.ground.looks
        batch = place["num_envs"] * place["rollout"]
        module = RLModuleSpec(module_class=OldRouterModule, model_config={"spec": spec})
        config: APPOConfig = routing_config(APPOConfig(), env_id, env_config, module, EpisodesRunner, **place)
        # RLlib's own runner asks a server for weights when it samples; ours are sent the weights. If all remote
        # runners have died and are not back yet, this process samples, and needs an environment for that.
        return (
            config.env_runners(use_env_runner_state_server=False, create_env_on_local_worker=True)
            .training(
                train_batch_size_per_learner=batch,
                circular_buffer_num_batches=BATCHES,
                circular_buffer_iterations_per_batch=TIMES,
                lr=falling(rate, steps),
                entropy_coeff=falling(entropy, steps),
                gamma=NUMBERS.gamma,
                clip_param=NUMBERS.clip,
                grad_clip=NUMBERS.gradient_norm,
                vf_loss_coeff=NUMBERS.value_weight,
            )
            .reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=REPORTED * batch)
        )
