"""What PPO compares a reward with. A baseline says what the runner must do for it and how advantages come of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from dynrl.envs.core import RoutingVectorEnv


class Baseline:
    """A learned value: advantages are as `gae` estimates them. Other baselines change some of its moments."""

    name: ClassVar[str] = "value"
    group: ClassVar[int] = 1  # neighbouring rows of the environment that meet the same inputs
    one_look: ClassVar[bool] = False  # whether it is only for walks of one look

    def begins_anew(self, lengths: Tensor) -> bool:
        """Whether a rollout must begin with new episodes, where rows are `lengths` [N] steps into theirs."""
        return False

    def replace(self, actions: Tensor, likeliest: Tensor, decisions: int) -> Tensor:
        """The actions to take, [N * decisions] as drawn and as the policy finds likeliest."""
        return actions

    def columns(self, env: RoutingVectorEnv, likeliest: Tensor) -> dict[str, Tensor]:
        """What a slab keeps of each step for `advantages`, [N] each, asked for before the step.

        Args:
            likeliest: the policy's likeliest actions, as the environment takes them.
        """
        return {}

    def advantages(self, slab: Any, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, N] advantages, and [T, N] bool, which steps to learn from; None: from all.

        Args:
            slab: what was sampled.
            estimates: [T, N], by `gae`.
        """
        return estimates, None


class Group(Baseline):
    """What eight routes of one input earn on average, the likeliest route among them (see `group_advantages`)."""

    name = "group"
    group = 8

    def begins_anew(self, lengths: Tensor) -> bool:
        """Whether some episode is under way.

        Rows whose walks differ in length drift apart, until none of a group meet the same input in a slab.
        """
        return bool(lengths.any())

    def replace(self, actions: Tensor, likeliest: Tensor, decisions: int) -> Tensor:
        """The likeliest action in the first row of each group."""
        rows = torch.arange(len(actions) // decisions, device=actions.device)
        return torch.where((rows % self.group == 0).repeat_interleave(decisions), likeliest, actions)

    def columns(self, env: RoutingVectorEnv, likeliest: Tensor) -> dict[str, Tensor]:
        """The number of each row's episode, all of which began in the slab."""
        return {"episodes": env.episodes}

    def advantages(self, slab: Any, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `group_advantages` says."""
        return group_advantages(slab.rewards, slab.terminateds, slab.episodes, self.group)


class Greedy(Baseline):
    """What the likeliest route alone earns (self-critical training, Rennie et al. 2017, CVPR; BlockDrop uses it)."""

    name = "greedy"
    one_look = True

    def columns(self, env: RoutingVectorEnv, likeliest: Tensor) -> dict[str, Tensor]:
        """What the likeliest routes would have earned."""
        return {"greedy": env.foresee(likeliest)}

    def advantages(self, slab: Any, estimates: Tensor) -> tuple[Tensor, Tensor | None]:
        """The reward less that."""
        return slab.rewards - slab.greedy, None


BASELINES: dict[str, Baseline] = {each.name: each for each in (Baseline(), Group(), Greedy())}


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
