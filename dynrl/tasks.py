"""A task says what a network's outputs mean: for the loss, for the reward, and for people."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Value = TypeVar("Value", float, Tensor)


class Task:
    """A task says what the outputs [n, outputs] of a network are compared with, and how.

    Attributes:
        metric: the name of the figure for people, one a row, in `info`, reports and TensorBoard.
        heading: the metric's name in tables and on axes.
        factor, digits: the metric times `factor`, in the format `digits`, is the figure under that heading.
        axis: the scale on which the metric is drawn, "linear" or "log".
        perfect: the metric of perfect outputs, which none is better than.
        rises: whether a higher metric is better.
        figures: the names of further figures, which people also want to know (`rates`).
        pictures: whether targets have the images' height and width, so that they are changed with the images and shown:
            [n, channels, height, width], or [n, height, width] int64 if pixels have classes.
        share_right: whether the metric of an input is the share of it that is answered right, from 0 to 1.
        by_class: whether each input is of one class, so that reports tell of each class.
    """

    metric: ClassVar[str]
    heading: ClassVar[str]
    factor: ClassVar[float]
    digits: ClassVar[str]
    axis: ClassVar[str]
    perfect: ClassVar[float]
    rises: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = ()
    pictures: ClassVar[bool] = False
    share_right: ClassVar[bool] = False
    by_class: ClassVar[bool] = False

    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the mean loss that a backbone is trained by; `smoothing` is of labels, if there are labels."""
        raise NotImplementedError

    def log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Return how well each output explains its target: [n], at most 0, in nats."""
        raise NotImplementedError

    def divergence(self, output: Tensor, dense: Tensor, target: Tensor | None = None) -> Tensor:
        """Return how far each output is from the dense network's: [n], at least 0, in nats.

        Rows weigh as much as in `log_likelihood` where the target says how much; without targets, they weigh alike.
        """
        raise NotImplementedError

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the metric of each row, [n] float; reports show its means (`mean`)."""
        raise NotImplementedError

    def mean(self, metric: Tensor, target: Tensor) -> float:
        """Return the metric of any rows of a split together, with that metric [n] and those targets each: its mean."""
        return float(metric.mean())

    def error(self, metric: Value) -> Value:
        """Turn the metric (of a row, or a mean) so that less is better: 0 is perfect, 1 is useless."""
        raise NotImplementedError

    def blind(self, target: Tensor) -> Tensor:
        """Return one output for all rows of `target`, which needs no input: their mean, the best by squared error."""
        return target.mean(0, keepdim=True).expand_as(target)

    def rates(self, metric: Tensor, target: Tensor) -> dict[str, float]:
        """Return the means of `figures`, by name, over rows with that metric [n] and those targets."""
        return {}

    @classmethod
    def show(cls, metric: float) -> str:
        """Return the metric as tables show it."""
        return f"{cls.factor * metric:{cls.digits}}"


@dataclass(frozen=True)
class Classification(Task):
    """In classification, outputs are logits [n, classes], and targets are classes [n] int64."""

    metric, heading, factor, digits, axis, perfect = "accuracy", "accuracy %", 100.0, ".2f", "linear", 1.0
    share_right = by_class = True

    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy, with label smoothing (Szegedy et al. 2016, section 7)."""
        return F.cross_entropy(output, target, label_smoothing=smoothing)

    def log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the logarithm of the target's probability, [n]."""
        return -F.cross_entropy(output, target, reduction="none")

    def divergence(self, output: Tensor, dense: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the Kullback-Leibler divergence [n] from the dense network's distribution over classes to this one."""
        return F.kl_div(output.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="none").sum(1)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Return 1.0 where the likeliest class is the target, else 0.0, [n]."""
        return (output.argmax(1) == target).float()

    def error(self, metric: Value) -> Value:
        """Return the share of wrong answers."""
        return 1 - metric

    def blind(self, target: Tensor) -> Tensor:
        """Return how often each class is the target, for all rows: [n, classes]. So the commonest is answered."""
        return target.bincount().float().expand(len(target), -1)


@dataclass(frozen=True)
class Detection(Classification):
    """In detection, few inputs are of class 1, which is looked for; together they weigh as much as all of class 0.

    Each row is weighted by its class, so that each class weighs one half: in the loss, in rewards and in the metric,
    which is the mean of the recall and of the share of class 0 that raises no alarm. Who always says the same has 0.5.

    Attributes:
        share: the share of class 1 in the split, which may be another in each split of a data set.
    """

    share: float = field(compare=False)

    metric, heading = "balanced_accuracy", "balanced accuracy %"
    share_right = False
    figures = ("recall", "false_alarms")

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"expected a share of class 1 above 0 and below 1, got {self.share}")

    def _weight(self, target: Tensor) -> Tensor:
        return torch.where(target == 1, 0.5 / self.share, 0.5 / (1 - self.share))

    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the mean of the weighted cross-entropies."""
        each = F.cross_entropy(output, target, label_smoothing=smoothing, reduction="none")
        return (self._weight(target) * each).mean()

    def log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the logarithm of the target's probability, times the weight of its class, [n]."""
        return self._weight(target) * super().log_likelihood(output, target)

    def divergence(self, output: Tensor, dense: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the Kullback-Leibler divergence, times the weight of the target's class, [n]."""
        each = super().divergence(output, dense)
        return each if target is None else self._weight(target) * each

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Return 1.0 where the likeliest class is the target; a wrong answer takes off the weight of its class, [n]."""
        return 1 - self._weight(target) * (1 - super().score(output, target))

    def rates(self, metric: Tensor, target: Tensor) -> dict[str, float]:
        """Return the recall, and the share of class 0 that raises an alarm, where there are such rows."""
        right, found = (metric == 1).double(), target == 1
        each = right[found], 1 - right[~found]
        return {name: float(rows.mean()) for name, rows in zip(self.figures, each, strict=True) if len(rows)}

    def mean(self, metric: Tensor, target: Tensor) -> float:
        """Return the mean of the recall and of the share of class 0 that raises no alarm; of one class, its own.

        The rows' weights are those of the whole split. Some of its rows may hold another share of class 1, and the mean
        of their metric would lie anywhere.
        """
        known = self.rates(metric, target.to(metric.device))
        each = [1 - rate if name == "false_alarms" else rate for name, rate in known.items()]
        return sum(each) / len(each)


@dataclass(frozen=True)
class Segmentation(Classification):
    """In segmentation, each pixel has a class.

    Outputs are [n, classes, height, width], and targets [n, height, width] int64.

    Likelihoods and divergences are means over an image's pixels, so that prices mean the same for images of any size.

    The metric of an image is the mean, over the classes that its target shows, of intersection over union: of the
    pixels that have the class in the target or in the answer, the share that has it in both. So each image has a
    metric, as intervals need, and small things count like large ones. The usual metric pools the pixels of a split,
    where large things outweigh small ones.

    Source: Revisiting Evaluation Metrics for Semantic Segmentation (Wang et al. 2023, NeurIPS Datasets and Benchmarks),
    where this is mIoU^I.
    """

    metric, heading = "miou", "mIoU %"
    pictures, by_class = True, False

    def log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean logarithm of the probabilities of the pixels' targets, [n]."""
        return super().log_likelihood(output, target).flatten(1).mean(1)

    def divergence(self, output: Tensor, dense: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the mean Kullback-Leibler divergence [n] from the dense network's distributions to these ones."""
        return super().divergence(output, dense).flatten(1).mean(1)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean intersection over union of the classes that each target shows, [n]."""
        classes = output.shape[1]
        said, wanted = output.argmax(1).flatten(1), target.flatten(1)
        pair, one = wanted * classes + said, torch.ones_like(said, dtype=torch.float32)
        pairs = torch.zeros(len(said), classes * classes, device=output.device).scatter_add(1, pair, one)
        pairs = pairs.unflatten(1, (classes, classes))  # the pixels of each class, by the class that was said
        there, both = pairs.sum(2), pairs.diagonal(dim1=1, dim2=2)
        shares = both / (there + pairs.sum(1) - both).clamp_min(1)
        return shares.sum(1) / (there > 0).sum(1)

    def blind(self, target: Tensor) -> Tensor:
        """Return how often each class is a pixel's target, for all rows: [n, classes, height, width]."""
        counts = F.one_hot(target).float().mean(0)
        return counts.permute(2, 0, 1).expand(len(target), -1, -1, -1)


@dataclass(frozen=True)
class Regression(Task):
    """In regression, outputs and targets are numbers, [n, outputs] float32 both.

    Log-likelihoods are those of a Gaussian with the targets' variance, without constants and without the factor of a
    half. The answer of the mean then costs 1; in classification, knowing nothing about ten classes costs log 10. So the
    same prices make sense for both.

    Attributes:
        variance: the variance of the targets in the training split, averaged over outputs.
    """

    variance: float

    metric, heading, factor, digits, axis, perfect = "mse", "mse", 1.0, ".2g", "log", 0.0
    rises = False

    @classmethod
    def of(cls, targets: Tensor) -> Regression:
        """Return the task of predicting targets like `targets` [n, outputs]."""
        return cls(float(targets.var(0).mean()))

    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the mean squared error over the variance, so that learning rates mean the same on any scale."""
        return -self.log_likelihood(output, target).mean()

    def log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Return minus the squared error over the variance, [n]."""
        return -self.error(self.score(output, target))

    def divergence(self, output: Tensor, dense: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the squared difference over the variance, [n]."""
        return self.error(self.score(output, dense))

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the squared error, averaged over outputs, [n]."""
        if output.shape != target.shape:  # [n, 1] less [n] would be [n, n]
            raise ValueError(
                f"expected outputs of the targets' shape {tuple(target.shape)}, got {tuple(output.shape)}; a backbone "
                "has as many outputs as its data set's `classes`"
            )
        return (output - target).square().flatten(1).mean(1)

    def error(self, metric: Value) -> Value:
        """Return the share of the variance that is not explained."""
        return metric / self.variance


PERFECT = 60.0  # the PSNR in decibels beyond which nothing is gained: a thousandth of the range


@dataclass(frozen=True)
class Restoration(Task):
    """In restoration, outputs and targets are images in 0 to 1, [n, channels, height, width] both.

    Log-likelihoods are those of a Gaussian whose variance is each image's own mean squared error, less the best one.
    So a decibel counts alike on all images, however noisy, and the metric of a mean is a mean.
    """

    metric, heading, factor, digits, axis, perfect = "psnr", "PSNR dB", 1.0, ".2f", "linear", PERFECT
    pictures = True

    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the mean logarithm of the root mean squared errors."""
        return -self.log_likelihood(output, target).mean()

    def log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        """Return minus the logarithm of the root mean squared error over that of `PERFECT`, [n]."""
        return (self.score(output, target) - PERFECT) * (math.log(10) / 20)

    def divergence(self, output: Tensor, dense: Tensor, target: Tensor | None = None) -> Tensor:
        """Return how much a root mean squared error of `PERFECT` grows by the difference of the two images, [n]."""
        return torch.log1p(_mse(output, dense) / 10 ** (-PERFECT / 10)) / 2

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the peak signal-to-noise ratio in decibels, at most `PERFECT`, [n]."""
        return -10 * _mse(output, target).clamp_min(10 ** (-PERFECT / 10)).log10()

    def error(self, metric: Value) -> Value:
        """Return the decibels that are missing, as a share of `PERFECT`."""
        return 1 - metric / PERFECT


def _mse(output: Tensor, target: Tensor) -> Tensor:
    if output.shape != target.shape:
        raise ValueError(f"expected images of the targets' shape {tuple(target.shape)}, got {tuple(output.shape)}")
    return (output - target).square().flatten(1).mean(1)


CLASSIFICATION = Classification()
TASKS: dict[str, type[Task]] = {  # by their metrics
    task.metric: task for task in (Classification, Detection, Segmentation, Regression, Restoration)
}
