"""APPO, by RLlib, as an agent of `dynrl train`: runners sample while the learner learns."""

from __future__ import annotations

from typing import Any

from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS, TargetNetworkAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from dynrl.agents.rllib import EpisodesRunner, RLlibAgent, RouterModule, routing_config


class OldRouterModule(RouterModule, TargetNetworkAPI):
    """A router beside its former self, which APPO measures its samples' age by."""

    def make_target_networks(self) -> None:
        """Copy the policy."""
        self._old = make_target_network(self.net)

    def get_non_inference_attributes(self) -> list[str]:
        """Runners need neither values nor the former policy."""
        return [*super().get_non_inference_attributes(), "_old"]

    def get_target_network_pairs(self) -> list[Any]:
        """Which network follows which."""
        return [(self.net, self._old)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Logits of the former policy."""
        return {TARGET_NETWORK_ACTION_DIST_INPUTS: self._old(batch[Columns.OBS])}


class APPO(RLlibAgent):
    """Asynchronous PPO: V-trace corrects for what was sampled by an older policy (Espeholt et al. 2018, IMPALA).

    It scales to many runners, which need not wait for each other. On one machine of few cores PPO learns more from as
    many steps.
    """

    def configure(
        self, env_id: str, env_config: dict[str, Any], router: tuple[str, dict[str, Any]], steps: int, **place: Any
    ) -> APPOConfig:
        """Each batch is one walk of each sub-environment of one runner, learned from four times."""
        place["rollout"], rate = self._walk, self.settings.learning_rate or 2e-3
        batch = place["num_envs"] * place["rollout"]
        spec = RLModuleSpec(module_class=OldRouterModule, model_config={"router": list(router)})
        config: APPOConfig = routing_config(APPOConfig(), env_id, env_config, spec, EpisodesRunner, **place)
        # RLlib's own runner would ask a server for weights when it samples; ours are sent them. Where all remote
        # runners have died and are not back yet, this process samples: it needs an environment.
        return (
            config.env_runners(use_env_runner_state_server=False, create_env_on_local_worker=True)
            .training(
                train_batch_size_per_learner=batch,
                circular_buffer_num_batches=2,
                circular_buffer_iterations_per_batch=4,
                lr=[[0, rate], [steps, rate / 10]],
                entropy_coeff=[[0, self._entropy], [steps, self._entropy / 10]],
                gamma=1.0,
                clip_param=0.2,
                grad_clip=0.5,
                vf_loss_coeff=0.5,
            )
            .reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=8 * batch)
        )
