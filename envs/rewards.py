"""Rewards: what is set against the price of compute. `REWARDS` is the registry; a plugin adds a row to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dynrl.tasks import CLASSIFICATION, Task

Dense = Callable[[], Tensor]  # gives [n, ...], what the dense network says of the same inputs


def distillation(task: Task, output: Tensor, target: Tensor, dense: Dense) -> Tensor:
    """[n] log-likelihood of the target, minus the divergence from what the dense network says; in nats, at most 0.

    The two terms of knowledge distillation (Hinton et al. 2015, section 2), weighted alike. With the first alone,
    blocks whose only use is to copy the dense network's confidence are skipped at any price, and no price leads to
    the upper part of the accuracy-compute front; with the second alone, routes imitate the dense network's
    uncertainty at the expense of the class.
    """
    return task.log_likelihood(output, target) - task.divergence(output, dense())


def log_likelihood(task: Task, output: Tensor, target: Tensor, dense: Dense) -> Tensor:
    """[n] how well the output explains the target; in nats, at most 0."""
    return task.log_likelihood(output, target)


def correct(task: Task, output: Tensor, target: Tensor, dense: Dense) -> Tensor:
    """[n] 1 where the likeliest class is the target, else 0."""
    return task.score(output, target)


@dataclass(frozen=True)
class Reward:
    """An accuracy term and what it is for. The return of a walk is this term, less price times compute.

    Attributes:
        name: its name in `REWARDS`.
        about: one line for help texts and pages.
        accuracy: from (task, output [n, ...], target [n, ...], dense) to the accuracy term [n].
        for_classes: whether it makes sense for classes only.
        has_gradient: whether gates can be trained by it.
        per_step: whether it is paid along the walk: at each output what the term has gained since the last one, at the
            first output the term itself. The sum is the term at the end.
        whole_route: whether it is only for policies that decide a whole walk at one look.
    """

    name: str
    about: str
    accuracy: Callable[[Task, Tensor, Tensor, Dense], Tensor]
    for_classes: bool = False
    has_gradient: bool = True
    per_step: bool = False
    whole_route: bool = False

    def terms(
        self, task: Task, output: Tensor, target: Tensor, dense: Dense, price: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[n] accuracy and [n] cost term of whole walks; their sum is the return.

        Args:
            output, target: [n, ...], as `task` has them.
            dense: gives [n, ...], what the dense network says; called only where the term needs it.
            price: [n], of the dense network's compute.
            share: [n], compute over that of the dense network.
        """
        return self.accuracy(task, output, target, dense), -price * share


class BlockDrop(Reward):
    """BlockDrop's reward (Wu et al. 2018, equation 2), at the scale at which a wrong answer costs 1.

    The paper pays 1 - share^2 where the answer is right and -gamma where it is wrong. Here this is multiplied by the
    price, which is 1 / gamma, and less 1 throughout: a right answer earns more the less it spent. `share` is that of
    the dense MACs, not of the blocks.
    """

    def terms(
        self, task: Task, output: Tensor, target: Tensor, dense: Dense, price: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[n] accuracy and [n] cost term; the second depends on whether the answer is right."""
        right = self.accuracy(task, output, target, dense)
        return right - 1 + price * right, -price * right * share**2


REWARDS: dict[str, Reward] = {
    row.name: row
    for row in (
        Reward(
            "distillation", "log-likelihood of the target less the divergence from the dense network's answer, in nats",
            distillation,
        ),
        Reward("log_likelihood", "log-likelihood of the target, in nats", log_likelihood),
        Reward(
            "gain", "log-likelihood of the target, paid as it grows from output to output of a walk, in nats",
            log_likelihood, per_step=True,
        ),
        Reward("correct", "1 for a right answer, 0 for a wrong one", correct, for_classes=True, has_gradient=False),
        BlockDrop(
            "blockdrop", "BlockDrop's: a right answer earns 1 - (share of MACs)^2 times the price, a wrong one costs 1",
            correct, for_classes=True, has_gradient=False, whole_route=True,
        ),
    )
}  # fmt: skip


def check_reward(name: str, task: Task, whole_route: bool) -> Reward:
    """The reward of that name.

    Args:
        whole_route: whether one look decides a whole walk.

    Raises:
        ValueError: an unknown name, or a reward that makes no sense for `task` or for these looks.
    """
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; expected one of {', '.join(REWARDS)}")
    reward = REWARDS[name]
    if reward.for_classes and task != CLASSIFICATION:
        others = [other for other, row in REWARDS.items() if not row.for_classes]
        raise ValueError(
            f"the reward {name!r} is for classes, this task's metric is {task.metric}; choose from {', '.join(others)}"
        )
    if reward.whole_route and not whole_route:
        raise ValueError(f"the reward {name!r} has no share for each step; choose a policy that decides upfront")
    return reward
