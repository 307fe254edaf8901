"""This agent trains by RLlib's DQN."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.dqn.default_dqn_rl_module import QF_NEXT_PREDS, QF_PREDS, QF_TARGET_NEXT_PREDS
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import QNetAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from dynrl.agents.base import Agent
from dynrl.agents.numbers import DQN as NUMBERS
from dynrl.agents.numbers import check_one_choice, q_network
from dynrl.agents.ppo import falling
from dynrl.agents.rllib import FormerModule, RLlibAgent, routing_config
from dynrl.agents.slab import EpisodesRunner
from dynrl.backbones import Backbone
from dynrl.policies import PolicySpec
from dynrl.settings import Settings

BATCH, TIMES = 64, 2.0  # the steps of a batch, and how often each sampled step is learned from
# RLlib's replay never begins in the last n - 1 steps of an episode. Walks are short, so with n = 3 nothing would be
# learned about their last decisions. SB3's replay begins everywhere, and does better with 3.
N_STEP = 1
REPORTED = 8  # how many walks of each sub-environment a training iteration has


class QRouterModule(FormerModule, QNetAPI):
    """This module holds a policy whose scores are the returns expected of each choice, and its former self."""

    def setup(self) -> None:
        """Build the policy, without a value network."""
        super().setup()
        settings: Any = self.model_config
        self.net = q_network(settings["spec"])
        del self.value

    def get_non_inference_attributes(self) -> list[str]:
        """Name what runners do not need: the former network."""
        return ["_old"]

    def logits(self, scores: Tensor) -> Tensor:
        """Return the scores [n, choices] as they are, without the cap on logits, since returns have no such bound."""
        return scores

    def explore(self, log_probs: Tensor, steps: int) -> Tensor:
        """Return the best choice of each row, or at random any open one."""
        settings: Any = self.model_config
        rate = NUMBERS.rate(steps, settings["total_steps"])
        # Only open choices may be explored: a closed choice's score is far below any return, and would be learned from.
        any_choice = (log_probs > -1e8).float().multinomial(1).squeeze(1)
        return torch.where(torch.rand(len(log_probs), device=log_probs.device) < rate, any_choice, log_probs.argmax(1))

    def _former(self, observation: Tensor) -> Tensor:
        old: Any = self._old
        scores: Tensor = old.scores(observation)
        return scores

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the returns that the former network expects."""
        return {QF_PREDS: self._former(batch[Columns.OBS])}

    def compute_q_values(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the returns that the network expects."""
        return {QF_PREDS: self.net.scores(batch[Columns.OBS])}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        following = batch[Columns.NEXT_OBS]
        return {
            QF_PREDS: self.net.scores(batch[Columns.OBS]),
            QF_NEXT_PREDS: self.net.scores(following),
            QF_TARGET_NEXT_PREDS: self._former(following),
        }


class DQN(RLlibAgent):
    """This agent is double Q-learning (van Hasselt et al. 2016) from a buffer of replayed episodes.

    Training that is resumed begins with an empty buffer.
    """

    cannot = {
        **RLlibAgent.cannot,
        "entropy": Agent.cannot["entropy"],
        "finetune": "Q-learning would replay episodes from the backbone before fine-tuning",
    }

    @classmethod
    def refuse(cls, settings: Settings, backbone: Backbone) -> None:
        """Also refuse policies that answer with several choices."""
        super().refuse(settings, backbone)
        check_one_choice(settings.learning, backbone)

    def start(self) -> None:
        """Also seed what is drawn from the buffer, which RLlib leaves unseeded."""
        super().start()
        self._algorithm.local_replay_buffer.rng = np.random.default_rng((self.settings.problem.seed, self.steps))

    def configure(
        self, env_id: str, env_config: dict[str, Any], spec: PolicySpec, steps: int, **place: Any
    ) -> DQNConfig:
        """Configure DQN with our runner; a sample has one walk of each sub-environment."""
        place["rollout"] = self.ground.looks
        rate = self.settings.learning.learning_rate or NUMBERS.learning_rate
        module = RLModuleSpec(module_class=QRouterModule, model_config={"spec": spec, "total_steps": steps})
        config: DQNConfig = routing_config(DQNConfig(), env_id, env_config, module, EpisodesRunner, **place)
        reported = REPORTED * place["rollout"] * place["num_envs"]
        return config.training(
            train_batch_size_per_learner=BATCH,
            replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": NUMBERS.buffer},
            num_steps_sampled_before_learning_starts=min(NUMBERS.warm_up, steps // 10),
            target_network_update_freq=NUMBERS.target_every,
            n_step=N_STEP,
            double_q=True,
            dueling=False,
            lr=falling(rate, steps),
            gamma=NUMBERS.gamma,
            grad_clip=NUMBERS.gradient_norm,  # type: ignore[arg-type]  # RLlib's hint says int
            training_intensity=TIMES,
        ).reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=reported)
