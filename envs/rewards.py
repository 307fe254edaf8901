"""A reward weighs how good an answer is against the price of compute. A plugin adds a row to `REWARDS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
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


def _is_waited_for(x: Tensor) -> bool:
    """Tell whether a look at numbers would wait for their device."""
    return x.is_cuda


def _one_each(name: str, given: Any, output: Tensor) -> Tensor:
    """Return what a reward gives as float32 [n]; refuse, with a ValueError, what environments would pay wrongly.

    A single number would be paid to every row, and NaN would be learned from. On a CUDA device, whether numbers are
    finite is not looked at: each step would wait for it.
    """
    if not isinstance(given, Tensor) or given.shape != output.shape[:1]:
        got = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ValueError(
            f"expected the reward {name!r} to give one number for each of {len(output)} outputs, a tensor of shape "
            f"({len(output)},), got {got}; dimension 0 is that of the outputs, over which nothing is summed"
        )
    given = given.to(output.device, torch.float32)
    if not _is_waited_for(given) and not given.sum(dtype=torch.float64).isfinite():
        whose = f"the reward {name!r} gives" if output.isfinite().all() else "the network's outputs are"
        raise ValueError(
            f"{whose} NaN or infinity, from which nothing can be learned; rewards are finite for all finite outputs "
            "(where there is a logarithm or a quotient, clamp what it takes)"
        )
    return given


def _checked(name: str, accuracy: Any, task: Task, output: Tensor, target: Tensor, dense: Dense) -> Tensor:
    return _one_each(name, accuracy(task, output, target, dense), output)


@dataclass(frozen=True)
class Reward:
    """A reward has an accuracy term. The return of a walk is this term less price x compute.

    A subclass may write `terms`, for a cost of its own. Environments charge it with the last step of a walk. Whoever
    calls `accuracy` or `terms`, what they return is checked: numbers [n] that are finite; they become float32.

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

    def __post_init__(self) -> None:
        given: Any = self.accuracy
        while isinstance(given, partial) and given.func is _checked:  # of the reward that this one replaces
            given = given.args[1]
        object.__setattr__(self, "accuracy", partial(_checked, self.name, given))

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if (own := vars(cls).get("terms")) is None:
            return

        @wraps(own)
        def terms(self: Reward, task: Task, output: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
            earned, paid = own(self, task, output, *more, **named)
            return _one_each(self.name, earned, output), _one_each(self.name, paid, output)

        cls.terms = terms  # type: ignore[method-assign]

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
    if not isinstance(reward, Reward):
        raise ValueError(
            f"expected REWARDS[{name!r}] to be a Reward, got a {type(reward).__name__}; write REWARDS[{name!r}] = "
            f'Reward({name!r}, "what it is worth", the_function)'
        )
    if reward.for_classes and not task.share_right:
        others = [other for other, row in REWARDS.items() if not row.for_classes]
        raise ValueError(
            f"the reward {name!r} is for classes, this task's metric is {task.metric}; choose from {', '.join(others)}"
        )
    if reward.whole_route and not whole_route:
        raise ValueError(f"the reward {name!r} has no share for each step; choose a policy that decides upfront")
    return reward


def try_reward(reward: Reward, task: Task, targets: Tensor, outputs: int) -> None:
    """Ask a reward once, before anything is trained, what outputs drawn at random are worth.

    Args:
        reward: the reward.
        task: what outputs and targets mean.
        targets: some targets [n, ...].
        outputs: the number of outputs that a network has (`Dataset.classes`).

    Raises:
        ValueError: the reward raises an error, or does not give a finite number for each output.
    """
    shape = targets.shape if targets.is_floating_point() else (len(targets), outputs, *targets.shape[1:])
    generator, half = torch.Generator().manual_seed(0), torch.full((len(targets),), 0.5)
    said, dense = (torch.randn(shape, generator=generator) for _ in range(2))
    try:
        reward.terms(task, said, targets, lambda: dense, half, half)
    except Exception as error:  # a reward of one's own may raise anything
        if isinstance(error, ValueError) and "reward" in str(error):
            raise
        raise ValueError(
            f"the reward {reward.name!r} cannot be computed ({type(error).__name__}: {error}); it is a function of the "
            f"task, outputs {tuple(shape)}, targets {tuple(targets.shape)} and a function `dense` without arguments"
        ) from error
