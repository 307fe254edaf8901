"""RLlib's and Stable-Baselines3's agents of one algorithm share its numbers and the networks beside the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynrl.agents.base import sight_of
from dynrl.backbones import Backbone
from dynrl.policies import LearnedPolicy, PolicySpec
from dynrl.settings import Learning


@dataclass(frozen=True)
class PPONumbers:
    """These are the numbers of proximal policy optimisation (Schulman et al. 2017)."""

    learning_rate: float = 2e-3
    entropy: float = 0.01
    epochs: int = 4
    minibatches: int = 8
    gamma: float = 1.0
    lambda_: float = 0.95
    clip: float = 0.2
    value_weight: float = 0.5
    gradient_norm: float = 0.5


@dataclass(frozen=True)
class DQNNumbers:
    """These are the numbers of double Q-learning (van Hasselt et al. 2016) from a buffer of earlier steps."""

    learning_rate: float = 1e-3
    gamma: float = 1.0
    buffer: int = 100_000  # how many steps the buffer holds
    warm_up: int = 10_000  # the steps before learning begins, or a tenth of all steps if that is less
    target_every: int = 1_000  # the steps between copies of the network
    gradient_norm: float = 10.0
    exploration: tuple[float, float] = (1.0, 0.05)  # the share of random choices, at the first step and in the end
    exploring: float = 0.2  # the share of all steps over which `exploration` falls

    def rate(self, steps: int, total: int) -> float:
        """Return the share of random choices after `steps` of `total` steps."""
        first, last = self.exploration
        return last + (first - last) * max(0.0, 1 - steps / (self.exploring * total))


PPO, DQN = PPONumbers(), DQNNumbers()
# Adam's epsilon; torch and RLlib use 1e-8. A policy that has found the best routes has next to no gradient for a long
# time. Then one draw of a rare, costly choice gives a gradient about a thousand times as large as those that Adam
# remembers. With a smaller epsilon, its step would flip the policy for good.
ADAM_EPSILON = 1e-5
VALUE_UNITS = 64


def value_network(net: LearnedPolicy) -> nn.Sequential:
    """Return a new network that estimates returns from what `net.trunk` gives."""
    return nn.Sequential(nn.Linear(net.sight.price + 1, VALUE_UNITS), nn.Tanh(), nn.Linear(VALUE_UNITS, 1))


def q_network(spec: PolicySpec) -> LearnedPolicy:
    """Return a new policy whose scores are expected returns; its bias is zero, since a bias would promise a return."""
    net = spec.build()
    head: Any = net.head
    torch.nn.init.zeros_(head.bias)
    return net


def check_one_choice(learning: Learning, backbone: Backbone) -> None:
    """Refuse, with a ValueError, policies whose answer holds several choices, because Q-learning needs one."""
    decisions = sight_of(learning.policy, backbone).decisions
    if decisions > 1:
        raise ValueError(
            f"{learning.agent} takes one choice a step, the policy {learning.policy} gives {decisions}; choose "
            "another agent or policy"
        )
