"""Rewards: each term by a plain loop, and what makes no sense is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dynrl.envs.core import RoutingVectorEnv
from dynrl.envs.rewards import REWARDS, Reward, check_reward, try_reward
from dynrl.plans import plan
from dynrl.tasks import CLASSIFICATION, Detection, Regression, Segmentation

LOGITS, DENSE = [[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]], [[3.0, 0.0, 0.0], [0.0, 2.0, 1.0]]
TARGETS, PRICES, SHARES = [0, 2], [0.5, 2.0], [0.25, 0.75]


def log_softmax(row):
    return [x - math.log(sum(map(math.exp, row))) for x in row]


def expected(name, i):
    """The accuracy and the cost term of row i."""
    said, dense = log_softmax(LOGITS[i]), log_softmax(DENSE[i])
    likely, right = said[TARGETS[i]], float(max(range(3), key=LOGITS[i].__getitem__) == TARGETS[i])
    away = sum(math.exp(d) * (d - s) for d, s in zip(dense, said, strict=True))
    price, share = PRICES[i], SHARES[i]
    accuracy = {
        "distillation": likely - away, "log_likelihood": likely, "gain": likely, "correct": right,
        "probability": math.exp(likely),
        "blockdrop": right - 1 + price * right,
    }[name]  # fmt: skip
    return accuracy, -price * right * share**2 if name == "blockdrop" else -price * share


def terms(reward, dense=lambda: torch.tensor(DENSE)):
    return reward.terms(
        CLASSIFICATION, torch.tensor(LOGITS), torch.tensor(TARGETS), dense, torch.tensor(PRICES), torch.tensor(SHARES)
    )


@pytest.mark.parametrize("name", REWARDS)
def test_terms_by_a_plain_loop(name):
    got = terms(REWARDS[name])
    for i in range(2):
        assert [float(term[i]) for term in got] == pytest.approx(expected(name, i), abs=1e-6)


def test_blockdrops_reward_is_equation_2():
    earned, paid = terms(REWARDS["blockdrop"])
    for i in range(2):
        gamma = 1 / PRICES[i]
        right = LOGITS[i].index(max(LOGITS[i])) == TARGETS[i]
        paper = 1 - SHARES[i] ** 2 if right else -gamma
        # At the scale where a wrong answer costs 1; and a right one is worth the same at all prices but for its share.
        assert float(earned[i] + paid[i]) == pytest.approx(paper / gamma)


def test_the_dense_network_is_asked_only_where_it_is_needed():
    def asked():
        raise AssertionError

    for name, reward in REWARDS.items():
        if name == "distillation":
            with pytest.raises(AssertionError):
                terms(reward, asked)
        else:
            terms(reward, asked)


@pytest.mark.parametrize("name", [name for name, reward in REWARDS.items() if reward.has_gradient])
def test_what_is_said_to_have_a_gradient_has_one(name):
    output = torch.tensor(LOGITS, requires_grad=True)
    earned, _ = REWARDS[name].terms(
        CLASSIFICATION,
        output,
        torch.tensor(TARGETS),
        lambda: torch.tensor(DENSE),
        torch.tensor(PRICES),
        torch.tensor(SHARES),
    )
    (gradient,) = torch.autograd.grad(earned.sum(), output)
    assert (gradient != 0).any(1).all()


def test_what_makes_no_sense_is_refused():
    numbers = Regression(1.0)
    with pytest.raises(
        ValueError, match="unknown reward 'nosuch'; expected one of blockdrop, correct, distillation, gain"
    ):
        check_reward("nosuch", CLASSIFICATION, True)
    for name, reward in REWARDS.items():
        assert reward.name == name and reward.about
        if reward.for_classes:
            with pytest.raises(ValueError, match="for classes, this task's metric is mse; choose from distillation"):
                check_reward(name, numbers, True)
        if reward.whole_route:
            with pytest.raises(ValueError, match="decides upfront"):
                check_reward(name, CLASSIFICATION, False)
        assert check_reward(name, CLASSIFICATION, True) is reward
    assert [name for name, reward in REWARDS.items() if reward.per_step] == ["gain", "probability"]
    with pytest.raises(ValueError, match="this task's metric is balanced_accuracy"):
        check_reward("correct", Detection(0.1), False)


def test_pixels_right_answers_are_paid_by_their_intersection_over_union():
    task = Segmentation()
    output, target = torch.randn(5, 3, 4, 4), torch.randint(0, 3, (5, 4, 4))
    price, share = torch.full((5,), 0.5), torch.full((5,), 0.4)
    earned, cost = check_reward("correct", task, False).terms(task, output, target, lambda: output, price, share)
    torch.testing.assert_close(earned, task.score(output, target))
    torch.testing.assert_close(cost, torch.full((5,), -0.2))


def test_a_reward_of_ones_own_is_one_row(monkeypatch):
    mine = Reward(
        "mine", "twice the log-likelihood", lambda task, output, target, dense: 2 * task.log_likelihood(output, target)
    )
    monkeypatch.setitem(REWARDS, "mine", mine)
    earned, paid = terms(check_reward("mine", Regression(1.0), False))
    torch.testing.assert_close(earned, 2 * terms(REWARDS["log_likelihood"])[0])
    torch.testing.assert_close(paid, -torch.tensor(PRICES) * torch.tensor(SHARES))


def right(output, target):
    return (output.argmax(1) == target).float()


WRONG = {  # what functions of (output, target) give instead of a finite number for each row
    "one for all": (lambda o, t: right(o, t).mean(), r"a tensor of shape \(2,\), got a tensor of shape \(\)"),
    "a column": (lambda o, t: right(o, t).unsqueeze(1), r"got a tensor of shape \(2, 1\)"),
    "each with each": (lambda o, t: right(o, t) - t.unsqueeze(1), r"got a tensor of shape \(2, 2\)"),
    "a float": (lambda o, t: 1.0, "got a float"), "an array": (lambda o, t: right(o, t).numpy(), "got a ndarray"),
    "nan": (lambda o, t: right(o, t) * math.nan, "the reward 'mine' gives NaN or infinity"),
    "infinity": (lambda o, t: right(o, t).log(), "the reward 'mine' gives NaN or infinity"),
}  # fmt: skip


def of(function, kind=Reward, **more):
    return kind("mine", "mine", lambda task, output, target, dense: function(output, target), **more)


class Doubled(Reward):
    """It charges nothing."""

    def terms(self, task, output, target, dense, price, share):
        """Return both terms."""
        return target * 2.0, self.accuracy.args[1](task, output, target, dense)


@pytest.mark.parametrize("kind", [Reward, Doubled])
@pytest.mark.parametrize(("function", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_finite_number_for_each_output_is_refused(function, message, kind):
    """Whoever asks: by either term, by the accuracy alone, and once before anything is trained."""
    reward = of(function, kind)
    asked = CLASSIFICATION, torch.tensor(LOGITS), torch.tensor(TARGETS)
    for ask in (
        lambda: terms(reward), lambda: reward.accuracy(*asked, None),
        lambda: replace(reward, name="mine").accuracy(*asked, None), lambda: try_reward(reward, *asked[::2], 3),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ask()


def test_one_row_is_one_row_and_outputs_that_are_nan_are_the_networks_fault():
    one = torch.randn(1, 3), torch.zeros(1).long()
    for name in ("one for all", "a column", "each with each"):
        with pytest.raises(ValueError, match="expected the reward 'mine' to give one number for each of 1 outputs"):
            of(WRONG[name][0]).accuracy(CLASSIFICATION, *one, None)
    with pytest.raises(ValueError, match="the network's outputs are NaN or infinity"):
        REWARDS["log_likelihood"].accuracy(CLASSIFICATION, one[0] / 0, one[1], None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.float16])
def test_numbers_of_any_type_are_float32(dtype):
    earned, paid = terms(of(lambda output, target: right(output, target).to(dtype)))
    assert earned.dtype == paid.dtype == torch.float32 and torch.equal(earned, terms(REWARDS["correct"])[0])


def test_a_function_is_no_reward_and_its_mistakes_are_told_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(REWARDS, "mine", lambda task, output, target, dense: right(output, target))

    class Any(RoutingVectorEnv):
        """Its page is made while the function is there."""

        decision = "skip"

    with pytest.raises(ValueError, match=r"expected REWARDS\['mine'\] to be a Reward, got a function; write"):
        plan("skip", "digits", reward="mine")
    monkeypatch.setitem(REWARDS, "mine", Reward("mine", "mine", lambda task, output, target: right(output, target)))
    with pytest.raises(ValueError, match=r"reward 'mine' cannot be computed \(TypeError: .* outputs \(64, 10\)"):
        plan("skip", "digits", reward="mine")
