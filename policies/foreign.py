"""A policy that Stable-Baselines3 trained on a routing environment decides on a walk, as it did there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynrl.policies.base import Policy
from dynrl.policies.sight import Sight


class ForeignPolicy(Policy):
    """This policy takes the likeliest choices of an `MlpPolicy` of Stable-Baselines3, which is not imported.

    Args:
        layers: from observations [n, width] to a score for each choice of each decision, one decision after the other.
        sight: what the policy was shown in training.
        price_range: the lowest and highest price in training.
    """

    sight: Sight

    def __init__(self, layers: nn.Module, sight: Sight, price_range: tuple[float, float]) -> None:
        super().__init__()
        self.layers, self.sight, self.price_range = layers, sight, price_range

    @classmethod
    def of(cls, algorithm: Any) -> ForeignPolicy:
        """Return the policy of an algorithm, for example `stable_baselines3.PPO("MlpPolicy", RoutingVecEnv(...))`.

        Raises:
            ValueError: it is no such algorithm, has no routing environment, or its policy saw other observations than
                the environment's own, normalised or stacked ones.
        """
        layers = _layers(algorithm)
        env = algorithm.get_env()
        if env is None:
            raise ValueError(
                "the algorithm has no environment, which says what its policy saw: give it one like that of its "
                "training by algorithm.set_env(dynrl.agents.sb3.RoutingVecEnv(...))"
            )
        around = env
        while around is not None:
            if getattr(around, "norm_obs", False):
                raise ValueError(
                    "the policy saw normalised observations (VecNormalize): train it with norm_obs=False, and plug that"
                )
            around = getattr(around, "venv", None)
        try:
            sight, prices = (env.get_attr(name)[0] for name in ("sight", "price_range"))
        except AttributeError:
            raise ValueError(
                "expected an algorithm that was trained on dynrl.agents.sb3.RoutingVecEnv, got one that "
                f"saw observations of shape {env.observation_space.shape} in a {type(env.unwrapped).__name__}"
            ) from None
        if env.observation_space.shape != (sight.width,):
            raise ValueError(
                f"the policy saw observations of shape {env.observation_space.shape}, expected {(sight.width,)}, which "
                "the environment shows: train it without what changes them (VecFrameStack, for example), and plug that"
            )
        return cls(layers, sight, prices)

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """Return a `Policy.chooser` that takes the likeliest choices."""
        return self.sight.follow(backbone, self, price)

    def forward(self, observation: Tensor) -> Tensor:
        """Map [n, width] float32 to the likeliest choices [n, decisions]."""
        scores = self.layers(observation).split(self.sight.counts, 1)
        return torch.stack([each.argmax(1) for each in scores], 1)


def _layers(algorithm: Any) -> nn.Module:
    """Return the layers from observations to scores of actors (PPO, A2C) and of Q-networks (DQN).

    SB3's own way to a choice keeps a distribution in the policy, which threads would take from one another.
    """
    policy = getattr(algorithm, "policy", None)
    if policy is not None and type(policy) is getattr(algorithm, "policy_aliases", {}).get("MlpPolicy"):
        q = getattr(policy, "q_net", None)
        try:
            if q is not None:
                return nn.Sequential(q.features_extractor, q.q_net)
            return nn.Sequential(policy.pi_features_extractor, policy.mlp_extractor.policy_net, policy.action_net)
        except AttributeError:  # another package's policy of that name
            pass
    raise ValueError(
        "expected a policy file, a policy of dynrl, or an algorithm of Stable-Baselines3 with its MlpPolicy that was "
        f"trained on dynrl.agents.sb3.RoutingVecEnv, got {type(algorithm).__name__}"
    )
