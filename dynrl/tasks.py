"""Tasks: what a network's outputs mean, for the loss, for the reward, and for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch.nn.functional as F
from torch import Tensor

Value = TypeVar("Value", float, Tensor)


class Task:
    """What the outputs [n, outputs] of a network are compared with, and how.

    Attributes:
        metric: the figure for people, one a row, in `info`, reports and TensorBoard by this name.
        heading: what tables and axes call it.
        factor, digits: from the metric to the figure under that heading, and the format of that.
        axis: the scale on which it is drawn, "linear" or "log".
    """

    metric: ClassVar[str]
    heading: ClassVar[str]
    factor: ClassVar[float]
    digits: ClassVar[str]
    axis: ClassVar[str]

    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean loss that a backbone is trained by; `smoothing` of labels, where there are labels."""
        raise NotImplementedError

    def log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """[n] how well each output explains its target: at most 0, in nats."""
        raise NotImplementedError

    def divergence(self, output: Tensor, dense: Tensor) -> Tensor:
        """[n] how far each output is from what the dense network says: at least 0, in nats."""
        raise NotImplementedError

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """[n] float, the metric of each row; means of it are what reports show."""
        raise NotImplementedError

    def error(self, metric: Value) -> Value:
        """The metric (of a row, or a mean) turned so that less is better: 0 is perfect, 1 is useless."""
        raise NotImplementedError

    @classmethod
    def show(cls, metric: float) -> str:
        """The metric as a table shows it."""
        return f"{cls.factor * metric:{cls.digits}}"


@dataclass(frozen=True)
class Classification(Task):
    """Outputs are logits [n, classes], targets are classes [n] int64."""

    metric, heading, factor, digits, axis = "accuracy", "accuracy %", 100.0, ".2f", "linear"

    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, label smoothing as in Szegedy et al. 2016, section 7."""
        return F.cross_entropy(output, target, label_smoothing=smoothing)

    def log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """[n] the logarithm of the target's probability."""
        return -F.cross_entropy(output, target, reduction="none")

    def divergence(self, output: Tensor, dense: Tensor) -> Tensor:
        """[n] Kullback-Leibler, from the dense network's distribution over classes to this one."""
        return F.kl_div(output.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="none").sum(1)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """[n] 1.0 where the likeliest class is the target, else 0.0."""
        return (output.argmax(1) == target).float()

    def error(self, metric: Value) -> Value:
        """The share of wrong answers."""
        return 1 - metric


@dataclass(frozen=True)
class Regression(Task):
    """Outputs and targets are numbers, [n, outputs] float32 both.

    Likelihoods are a Gaussian's whose variance is the targets', without constants and the factor of a half: answering
    the mean costs 1, as knowing nothing of ten classes costs log 10, so that the same prices make sense for both.

    Attributes:
        variance: of the targets in the training split, mean over outputs.
    """

    variance: float

    metric, heading, factor, digits, axis = "mse", "mse", 1.0, ".2g", "log"

    @classmethod
    def of(cls, targets: Tensor) -> Regression:
        """The task of predicting the likes of `targets` [n, outputs]."""
        return cls(float(targets.var(0).mean()))

    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean squared error in units of the variance, so that learning rates mean the same on any scale."""
        return -self.log_likelihood(output, target).mean()

    def log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """[n] minus the squared error over the variance."""
        return -self.error(self.score(output, target))

    def divergence(self, output: Tensor, dense: Tensor) -> Tensor:
        """[n] the squared difference over the variance."""
        return self.error(self.score(output, dense))

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """[n] the squared error, mean over outputs."""
        if output.shape != target.shape:  # [n, 1] less [n] would be [n, n]
            raise ValueError(
                f"expected outputs of the targets' shape {tuple(target.shape)}, got {tuple(output.shape)}; a backbone "
                "has as many outputs as its data set's `classes`"
            )
        return (output - target).square().flatten(1).mean(1)

    def error(self, metric: Value) -> Value:
        """The share of the variance that is not explained."""
        return metric / self.variance


CLASSIFICATION = Classification()
TASKS: dict[str, type[Task]] = {task.metric: task for task in (Classification, Regression)}  # by their metrics
