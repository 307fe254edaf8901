"""A baseline is what PPO compares a reward with. It says what runners must do and how advantages are computed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from dynrl.envs.core import RoutingVectorEnv


class Baseline:
    """This baseline is a learned value, whose advantages are those of `gae`. Subclasses change some of its methods."""

    name: ClassVar[str] = "value"
    group: ClassVar[int] = 1  # how many neighbouring rows of the environment meet the same input
    one_look: ClassVar[bool] = False  # whether the baseline is only for walks of one look
    begins_anew: ClassVar[bool] = False  # whether each rollout begins with new episodes

    def drawn(self, count: int) -> Tensor:
        """Return which of `count` rows take actions that are drawn from the policy, and so tell its means: bool."""
        return torch.ones(count, dtype=torch.bool)

    def replace(self, actions: Tensor, likeliest: Tensor, decisions: int) -> Tensor:
        """Return the actions to take [N * decisions], given those drawn and those that the policy finds likeliest."""
        return actions

    def columns(self, env: RoutingVectorEnv, likeliest: Tensor) -> dict[str, Tensor]:
        """Return the columns [N] that a slab keeps of each step for `advantages`; called before the step.

        Args:
            env: the environment that is about to step.
            likeliest: the policy's likeliest actions, in the shape that the environment takes.
        """
        return {}

    def advantages(self, slab: Any, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return [T, N] advantages, and [T, N] bool that marks the steps to learn from; None stands for all steps.

        Args:
            slab: the `Slab` that was sampled.
            estimates: [T, N], the advantages that `gae` estimates.
        """
        return estimates, None


class Group(Baseline):
    """This baseline is the mean reward of eight routes of one input, one of them the likeliest route."""

    name = "group"
    group = 8
    # Rows whose walks differ in length drift apart, until no two rows of a group meet the same input in a slab.
    begins_anew = True

    def drawn(self, count: int) -> Tensor:
        """Return all rows but the first of each group."""
        return torch.arange(count) % self.group > 0

    def replace(self, actions: Tensor, likeliest: Tensor, decisions: int) -> Tensor:
        """Put the likeliest action into the first row of each group."""
        drawn = self.drawn(len(actions) // decisions).to(actions.device)
        return torch.where(drawn.repeat_interleave(decisions), actions, likeliest)

    def columns(self, env: RoutingVectorEnv, likeliest: Tensor) -> dict[str, Tensor]:
        """Keep the number of each row's episode; all these episodes began in the slab."""
        return {"episodes": env.episodes}

    def advantages(self, slab: Any, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the advantages of `group_advantages`."""
        return group_advantages(slab.rewards, slab.terminateds, slab.episodes, self.group)


class Greedy(Baseline):
    """This baseline is the reward of the likeliest route: self-critical training (Rennie et al. 2017, CVPR).

    BlockDrop uses it.
    """

    name = "greedy"
    one_look = True

    def columns(self, env: RoutingVectorEnv, likeliest: Tensor) -> dict[str, Tensor]:
        """Keep what the likeliest routes would have earned."""
        return {"greedy": env.foresee(likeliest)}

    def advantages(self, slab: Any, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return each reward less what the likeliest route would have earned."""
        return slab.rewards - slab.greedy, None


BASELINES: dict[str, Baseline] = {each.name: each for each in (Baseline(), Group(), Greedy())}


def gae(rewards: Tensor, values: Tensor, ended: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Return generalised advantage estimates (Schulman et al. 2016, equation 16), cut where episodes `ended`.

    Args:
        rewards, ended: [T, N], the rewards, and whether the episode ended with that step.
        values: [T + 1, N], the value of each observation and of the one after the last.
        gamma, lambda_: the discount, and the weight of later estimates.

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
    """Return what each route earned less what its group earned on average; a group is of one input, at one price.

    This is the estimate of Shao et al. 2024 ("DeepSeekMath", section 4.1) without their division by the group's spread:
    inputs whose routes differ little should not count as much as others. The first row of each group takes the greedy
    route. It counts in the mean but is not learned from, because it was not drawn from the policy.

    Args:
        rewards, ended: [T, N], the rewards, and whether the episode ended with that step.
        episodes: [T, N] int64, the numbers of the episodes; all of them began in this slab.
        group: the number of rows of a group.

    Returns:
        advantages [T, N], the same for all steps of a route; and [T, N] bool that marks the steps to learn from, those
        of groups whose routes all end in the slab.

    Raises:
        ValueError: no group has all its routes in the slab.
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
