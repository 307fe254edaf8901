"""DQN, by RLlib, as an agent of `dynrl train`."""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.dqn.default_dqn_rl_module import QF_NEXT_PREDS, QF_PREDS, QF_TARGET_NEXT_PREDS
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import QNetAPI, TargetNetworkAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from dynrl.agents.rllib import EpisodesRunner, RLlibAgent, RouterModule, routing_config
from dynrl.agents.training import EXPLORATION, build_q


class QRouterModule(RouterModule, QNetAPI, TargetNetworkAPI):
    """A router whose scores are what each choice is expected to return, beside its former self."""

    def setup(self) -> None:
        """Build the network."""
        super().setup()
        settings: Any = self.model_config
        self.net = build_q(*settings["router"])
        del self.value

    def get_non_inference_attributes(self) -> list[str]:
        """Runners do not need the former network."""
        return ["_old"]

    def logits(self, observation: Tensor) -> Tensor:
        """[n, choices], without the cap: returns have none."""
        scores: Tensor = self.net.scores(observation)
        return scores

    def explore(self, log_probs: Tensor, steps: int) -> Tensor:
        """The best choice, or now and then any."""
        settings: Any = self.model_config
        (first, last), falling = EXPLORATION, settings["total_steps"] / 5
        rate = last + (first - last) * max(0.0, 1 - steps / falling)
        # Among those that are open: a closed one's score is far below any return, and would be learned from.
        any_choice = (log_probs > -1e8).float().multinomial(1).squeeze(1)
        return torch.where(torch.rand(len(log_probs), device=log_probs.device) < rate, any_choice, log_probs.argmax(1))

    def make_target_networks(self) -> None:
        """Copy the network."""
        self._old = make_target_network(self.net)

    def _former(self, observation: Tensor) -> Tensor:
        old: Any = self._old
        scores: Tensor = old.scores(observation)
        return scores

    def get_target_network_pairs(self) -> list[Any]:
        """Which network follows which."""
        return [(self.net, self._old)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the former network expects."""
        return {QF_PREDS: self._former(batch[Columns.OBS])}

    def compute_q_values(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the network expects."""
        return {QF_PREDS: self.logits(batch[Columns.OBS])}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        following = batch[Columns.NEXT_OBS]
        return {
            QF_PREDS: self.logits(batch[Columns.OBS]),
            QF_NEXT_PREDS: self.logits(following),
            QF_TARGET_NEXT_PREDS: self._former(following),
        }


class DQN(RLlibAgent):
    """Double Q-learning (van Hasselt et al. 2016) from a buffer of replayed episodes.

    For one choice a step only. Training that is resumed begins with an empty buffer.
    """

    def configure(
        self, env_id: str, env_config: dict[str, Any], router: tuple[str, dict[str, Any]], steps: int, **place: Any
    ) -> DQNConfig:
        """Each step sampled is learned from about twice; a sample is one walk of each sub-environment."""
        place["rollout"], rate = self._walk, self.settings.learning_rate or 1e-3
        model = {"router": list(router), "total_steps": steps}
        spec = RLModuleSpec(module_class=QRouterModule, model_config=model)
        config: DQNConfig = routing_config(DQNConfig(), env_id, env_config, spec, EpisodesRunner, **place)
        return config.training(
            train_batch_size_per_learner=64,
            replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 100_000},
            num_steps_sampled_before_learning_starts=min(10_000, steps // 10),
            target_network_update_freq=1_000,
            # Its replay never begins in the last n - 1 steps of an episode, and walks are short: with 3 nothing is
            # learned of their last points (measured: 5 to 40 % of the gap on known answers, 65 % with 1). SB3's, which
            # begins everywhere, does better with 3.
            n_step=1,
            double_q=True,
            dueling=False,
            lr=[[0, rate], [steps, rate / 10]],
            gamma=1.0,
            grad_clip=10,
            training_intensity=2.0,
        ).reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=8 * self._walk * place["num_envs"])
