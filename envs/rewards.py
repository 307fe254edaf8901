"""A reward weighs how good an answer is against the price of compute. A plugin adds a row to `REWARDS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dynrl.schema import check_known
from dynrl.tasks import Task

Dense = Callable[[], Tensor]  # it returns the dense network's outputs [n, ...] for the same inputs


def distillation(task: Task, output: Tensor, target: Tensor, dense: Dense) -> Tensor:
    """Return the log-likelihood of the target less the divergence from the dense network: [n], in nats, at most 0.

    These are the two terms of knowledge distillation (Hinton et al. 2015, section 2), with equal weights. With the
    first alone, blocks that only add confidence are skipped at any price, and no price leads to the upper part of the
    accuracy-compute front. With the second alone, routes imitate the dense network's uncertainty at the expense of the
    class.
    """
    return task.log_likelihood(output, target) - task.divergence(output, dense(), target)


def log_likelihood(task: Task, output: Tensor, target: Tensor, dense: Dense) -> Tensor:
    """Return how well the output explains the target: [n], in nats, at most 0."""
    return task.log_likelihood(output, target)


def probability(task: Task, output: Tensor, target: Tensor, dense: Dense) -> Tensor:
    """Return the probability of the target: [n]. Unlike its logarithm, it does not reward answers that say nothing."""
    return task.log_likelihood(output, target).exp()


def correct(task: Task, output: Tensor, target: Tensor, dense: Dense) -> Tensor:
    """Return 1 where the likeliest class is the target, else 0; the intersection over union of pixels' classes: [n]."""
    return task.score(output, target)


@dataclass(frozen=True)
class Reward:
    """A reward has an accuracy term. The return of a walk is this term less price x compute.

    A subclass may write `terms`, for a cost of its own. Environments charge it with the last step of a walk.

    Attributes:
        name: the name in `REWARDS`.
        about: one line for help texts and pages.
        accuracy: a function from (task, output [n, ...], target [n, ...], dense) to the accuracy term [n].
        for_classes: whether the reward makes sense only for classes, of inputs or of pixels (`Task.share_right`).
        has_gradient: whether gates can be trained by this reward.
        per_step: whether the term is paid along the walk. Each output then pays what the term has gained since the last
            one, and the first output pays the term itself. The sum is the term at the end.
        whole_route: whether the reward is only for policies that decide a whole walk at one look.
    """

    name: str
    about: str
    accuracy: Callable[[Task, Tensor, Tensor, Dense], Tensor]
    for_classes: bool = False
    has_gradient: bool = True
    per_step: bool = False
    whole_route: bool = False

    @property
    def own_cost(self) -> bool:
        """Whether the cost term is another than price x compute, so that steps have no share of it."""
        return type(self).terms is not Reward.terms

    def terms(
        self, task: Task, output: Tensor, target: Tensor, dense: Dense, price: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the accuracy term [n] and the cost term [n] of whole walks; their sum is the return.

        Args:
            task: what outputs and targets mean.
            output, target: [n, ...], in the form of `task`.
            dense: a function that returns the dense network's outputs [n, ...]; it is called only if the term needs
                them.
            price: [n], the price of the dense network's compute.
            share: [n], the compute as a share of the dense network's.
        """
        return self.accuracy(task, output, target, dense), -price * share


class BlockDrop(Reward):
    """This is BlockDrop's reward (Wu et al. 2018, equation 2), scaled so that a wrong answer costs 1.

    The paper pays 1 - share^2 for a right answer and -gamma for a wrong one. Here, both are multiplied by the price,
    which is 1 / gamma. A right answer earns more the less it spends. `share` is the share of the dense MACs, not of the
    blocks.
    """

    def terms(
        self, task: Task, output: Tensor, target: Tensor, dense: Dense, price: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the accuracy term [n] and the cost term [n], which depends on whether the answer is right."""
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
        Reward(
            "probability", "probability of the target, paid as it grows from output to output of a walk (GFNet)",
            probability, for_classes=True, per_step=True,
        ),
        Reward(
            "correct", "1 for a right answer, 0 for a wrong one; mIoU of pixels' classes", correct, for_classes=True,
            has_gradient=False,
        ),
        BlockDrop(
            "blockdrop", "a right answer earns price x (1 - (share of MACs)^2), a wrong one costs 1 (BlockDrop)",
            correct, for_classes=True, has_gradient=False, whole_route=True,
        ),
    )
}  # fmt: skip


def check_reward(name: str, task: Task, whole_route: bool) -> Reward:
    """Return the reward of that name.

    Args:
        name: a name in `REWARDS`.
        task: what outputs and targets mean.
        whole_route: whether one look decides a whole walk.

    Raises:
        ValueError: the name is unknown, or the reward makes no sense for `task` or for a policy that looks at every
            step.
    """
    check_known("reward", name, REWARDS)
    reward = REWARDS[name]
    if reward.for_classes and not task.share_right:
        others = [other for other, row in REWARDS.items() if not row.for_classes]
        raise ValueError(
            f"the reward {name!r} is for classes, this task's metric is {task.metric}; choose from {', '.join(others)}"
        )
    if reward.whole_route and not whole_route:
        raise ValueError(f"the reward {name!r} has no share for each step; choose a policy that decides upfront")
    return reward
