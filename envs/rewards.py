"""Rewards: what an episode pays for its answer, and what compute costs it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dynrl.tasks import CLASSIFICATION, Task


class Reward:
    name: str
    about: str
    for_classes = False
    has_gradient = True
    per_step = False
    whole_route = False

    def accuracy(self, task: Task, output: Tensor, target: Tensor, dense: Callable[[], Tensor]) -> Tensor:
        raise NotImplementedError

    def terms(
        self, task: Task, output: Tensor, target: Tensor, dense: Callable[[], Tensor], price: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.accuracy(task, output, target, dense), -price * share


class Distillation(Reward):
    name, about = "distillation", "log-likelihood of the target minus the divergence from the dense network's output"

    def accuracy(self, task, output, target, dense):  # type: ignore
        return task.log_likelihood(output, target) - task.divergence(output, dense())


class LogLikelihood(Reward):
    name, about = "log_likelihood", "log-likelihood of the target"

    def accuracy(self, task, output, target, dense):  # type: ignore
        return task.log_likelihood(output, target)


class Gain(LogLikelihood):
    name, about, per_step = "gain", "log-likelihood gained at each step with an output", True


class Correct(Reward):
    name, about, for_classes, has_gradient = "correct", "1 if right", True, False

    def accuracy(self, task, output, target, dense):  # type: ignore
        return task.score(output, target)


class BlockDrop(Reward):
    name, about, for_classes, has_gradient, whole_route = "blockdrop", "BlockDrop's", True, False, True

    def terms(self, task, output, target, dense, price, share):  # type: ignore
        right = task.score(output, target)
        return right - 1 + price * right, -price * right * share**2


REWARDS: dict[str, Reward] = {r.name: r for r in (Distillation(), LogLikelihood(), Gain(), Correct(), BlockDrop())}


def check_reward(name: str, task: Task, whole_route: bool) -> Reward:
    if name not in REWARDS:
        raise ValueError(f"unknown accuracy term {name!r}; expected one of {tuple(REWARDS)}")
    reward = REWARDS[name]
    if reward.for_classes and task != CLASSIFICATION:
        raise ValueError(
            f"the accuracy term {name!r} is for classes, this task's metric is {task.metric}; choose 'distillation' "
            "or 'log_likelihood'"
        )
    if reward.whole_route and not whole_route:
        raise ValueError(f"the reward {name!r} has no share for each step: it is for deciding upfront")
    return reward
