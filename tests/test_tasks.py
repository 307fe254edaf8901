"""Tasks: likelihoods, divergences and metrics against definitions written otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from dynrl.envs.rewards import distillation
from dynrl.tasks import CLASSIFICATION, PERFECT, TASKS, Classification, Detection, Regression, Restoration, Segmentation


def cases():
    """Task, outputs, targets, other outputs, and its likelihood and divergence by torch's distributions."""
    torch.manual_seed(0)
    logits, other, classes = torch.randn(7, 5), torch.randn(7, 5), torch.randint(0, 5, (7,))
    yield (
        CLASSIFICATION, logits, classes, other,
        Categorical(logits=logits).log_prob(classes),
        kl_divergence(Categorical(logits=other), Categorical(logits=logits)),
    )  # fmt: skip
    rare, weights = torch.tensor([0, 1, 0, 0, 1, 0, 0]), torch.tensor([0.7, 1.75, 0.7, 0.7, 1.75, 0.7, 0.7])
    yield (
        Detection(2 / 7), logits[:, :2], rare, other[:, :2],
        Categorical(logits=logits[:, :2]).log_prob(rare) * weights,
        kl_divergence(Categorical(logits=other[:, :2]), Categorical(logits=logits[:, :2])) * weights,
    )  # fmt: skip
    maps, wanted, others = torch.randn(7, 3, 4, 5), torch.randint(0, 3, (7, 4, 5)), torch.randn(7, 3, 4, 5)
    said, other_said = (Categorical(logits=logits.permute(0, 2, 3, 1)) for logits in (maps, others))
    yield (
        Segmentation(), maps, wanted, others,
        said.log_prob(wanted).mean((1, 2)), kl_divergence(other_said, said).mean((1, 2)),
    )  # fmt: skip
    # A Gaussian whose half precision is 1 / variance: its likelihood up to the constant is what the task pays.
    task, outputs, numbers, other = Regression(0.3), torch.randn(7, 1), torch.randn(7, 1), torch.randn(7, 1)
    scale = math.sqrt(0.3 / 2)
    constant = Normal(0.0, scale).log_prob(torch.tensor(0.0))
    yield (
        task, outputs, numbers, other,
        (Normal(outputs, scale).log_prob(numbers) - constant).squeeze(1),
        kl_divergence(Normal(other, scale), Normal(outputs, scale)).squeeze(1),
    )  # fmt: skip
    # 10 log10 of the mean squared error are decibels; half of its natural logarithm is the likelihood of a Gaussian whose
    # variance it is.
    images, wanted, other = (torch.rand(7, 1, 4, 4) for _ in range(3))
    best = 10 ** (-PERFECT / 10)
    away, between = ((images - to).square().mean((1, 2, 3)) for to in (wanted, other))
    yield Restoration(), images, wanted, other, (best / away).log() / 2, (1 + between / best).log() / 2


@pytest.mark.parametrize("case", [*cases()], ids=TASKS)
def test_likelihood_and_divergence_are_those_of_torchs_distributions(case):
    task, output, target, other, likelihood, divergence = case
    torch.testing.assert_close(task.log_likelihood(output, target), likelihood)
    torch.testing.assert_close(task.divergence(output, other, target), divergence)
    torch.testing.assert_close(distillation(task, output, target, lambda: other), likelihood - divergence)
    assert (task.divergence(output, output, target) == 0).all()
    torch.testing.assert_close(task.loss(output, target), -likelihood.mean())


@pytest.mark.parametrize("case", [*cases()], ids=TASKS)
def test_the_metric_is_right_for_right_answers(case):
    task, output, target, *_ = case
    perfect = target
    if isinstance(task, Classification):
        perfect = torch.nn.functional.one_hot(target, output.shape[1]).movedim(-1, 1).float()
    assert (task.error(task.score(perfect, target)) == 0).all()
    metric, error = task.score(output, target), task.error(task.score(output, target))
    assert metric.shape == error.shape == (7,)
    assert float(error.mean()) == pytest.approx(task.error(float(metric.mean())))
    assert float(error.mean()) > 0


@pytest.mark.parametrize("case", [case for case in cases() if not case[0].pictures], ids=lambda case: case[0].metric)
def test_no_output_without_an_input_is_better_than_the_blind_one(case):
    task, output, target, *_ = case
    blind = task.blind(target)
    assert blind.shape == output.shape and (blind == blind[0]).all()
    constants = torch.eye(output.shape[1]) if target.dim() == 1 else target + torch.linspace(-1, 1, 7).unsqueeze(1)
    errors = [float(task.error(task.score(each.expand_as(output), target)).mean()) for each in constants]
    assert float(task.error(task.score(blind, target)).mean()) <= min(errors) + 1e-6


def test_answering_the_mean_costs_one():
    targets = torch.randn(4000, 3) * torch.tensor([1.0, 5.0, 0.1]) + 7
    task = Regression.of(targets)
    mean = targets.mean(0).expand_as(targets)
    assert float(task.log_likelihood(mean, targets).mean()) == pytest.approx(-1, abs=1e-3)
    assert float(task.loss(mean, targets)) == pytest.approx(1, abs=1e-3)


def test_smoothing_is_for_labels_only():
    (_, logits, classes, *_), _, _, (task, outputs, numbers, *_), _ = cases()
    assert CLASSIFICATION.loss(logits, classes, 0.1) != CLASSIFICATION.loss(logits, classes)
    assert task.loss(outputs, numbers, 0.1) == task.loss(outputs, numbers)


def test_detection_weighs_both_classes_alike():
    """The metric is the mean of the recall and of one less the false alarms; the loss is that of each class, averaged."""
    torch.manual_seed(0)
    logits, target = torch.randn(1000, 2), (torch.arange(1000) % 50 == 0).long()
    task, alarm = Detection(0.02), logits[:, 1] > logits[:, 0]
    recall, false_alarms = float(alarm[target == 1].float().mean()), float(alarm[target == 0].float().mean())
    metric = task.score(logits, target)
    assert float(metric.mean()) == pytest.approx((recall + 1 - false_alarms) / 2, abs=1e-5)
    assert task.rates(metric, target) == pytest.approx({"recall": recall, "false_alarms": false_alarms})
    assert task.rates(metric[:0], target[:0]) == {}
    by_class = [torch.nn.functional.cross_entropy(logits[target == k], target[target == k]) for k in (0, 1)]
    torch.testing.assert_close(task.loss(logits, target), sum(by_class) / 2)
    said, same = task.divergence(logits, -logits), Classification().divergence(logits, -logits)
    assert torch.equal(said, same), "where no target is known, rows weigh alike"
    always = torch.tensor([0.0, 1.0]).expand(1000, 2)
    assert float(task.score(always, target).mean()) == pytest.approx(0.5, abs=1e-5)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="share of class 1"):
            Detection(share)


def test_each_image_has_the_mean_of_its_own_classes_intersections_over_unions():
    """By sets of pixels; a class that is said and is not there takes pixels from those that are, and is none itself."""
    torch.manual_seed(0)
    logits, target = torch.randn(20, 4, 6, 5), torch.randint(0, 4, (20, 6, 5))
    target[:5] = target[:5].clamp_max(1)
    target[0] = 2
    said = logits.argmax(1)
    for image, wanted, metric in zip(said, target, Segmentation().score(logits, target), strict=True):
        shares = []
        for k in set(wanted.flatten().tolist()):
            mine, theirs = (set((to == k).flatten().nonzero().flatten().tolist()) for to in (image, wanted))
            shares.append(len(mine & theirs) / len(mine | theirs))
        assert float(metric) == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    blind = Segmentation().blind(target)
    assert blind.shape == logits.shape
    torch.testing.assert_close(blind[3, 2, 1, 4], (target[:, 1, 4] == 2).float().mean())


def test_targets_of_another_shape_are_refused():
    """[n] targets under [n, 1] outputs would broadcast to [n, n] in silence."""
    for output, target in ((torch.zeros(4, 1), torch.zeros(4)), (torch.zeros(4, 10), torch.zeros(4, 1))):
        with pytest.raises(ValueError, match="expected outputs of the targets' shape"):
            Regression(1.0).loss(output, target)


def test_figures_as_tables_show_them():
    assert CLASSIFICATION.show(0.93631) == "93.63"
    assert [Regression.show(value) for value in (0.1667, 0.00412, 4e-5)] == ["0.17", "0.0041", "4e-05"]
