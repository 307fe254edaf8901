"""Attacks: within their ball, along the walk that is deployed, and only ever upward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dynrl.data import load_dataset
from dynrl.deploy import RoutedModel
from dynrl.perturb import SMALL, Ball, check_attackable, spending, uncertainty
from dynrl.tasks import CLASSIFICATION
from tests.cases import EXAMPLES, GATED, answered_by, make_backbone, make_policy
from tests.test_limit import learned
from tests.toys import Exiting

WIDE = Ball(1.0, -3.0, 3.0)


def test_a_ball_is_in_raw_units_within_the_range_of_the_data():
    digits = load_dataset("digits")
    ball = Ball.of(digits)
    assert ball.radius == pytest.approx(8 / 255) and ball.reach(digits.train.inputs) == pytest.approx(
        8 / 255 / digits.deviation
    )
    raw = torch.tensor([ball.low, ball.high])
    torch.testing.assert_close(raw, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    assert Ball.of(digits, 0.1).radius == pytest.approx(0.1)
    numbers = answered_by(Exiting())
    own, inputs = Ball.of(numbers), numbers.train.inputs
    assert (own.low, own.high) == (float(inputs.min()), float(inputs.max()))
    assert own.radius == pytest.approx(SMALL * (own.high - own.low))
    with pytest.raises(ValueError, match="answered are whole numbers \\(int64\\)"):
        Ball.of(replace(numbers, dtype="int64"))
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected an epsilon above 0"):
            Ball.of(digits, bad)


def test_noise_moves_every_number_as_far_as_it_may():
    inputs = torch.tensor([[0.0, 2.9, -3.0, 1.0]]).repeat(50, 1)
    noisy = WIDE.noise(inputs, torch.Generator().manual_seed(0))
    assert noisy[:, 0].unique().tolist() == [-1.0, 1.0] and noisy[:, 1].max() == 3.0 and noisy[:, 2].min() == -3.0


def test_a_number_beyond_the_range_moves_no_farther_than_others():
    inputs = torch.tensor([[5.0, -9.0, 2.5]])
    assert WIDE.clamp(inputs + 2, inputs).tolist() == [[5.0, -8.0, 3.0]]
    assert WIDE.clamp(inputs - 2, inputs).tolist() == [[4.0, -9.0, 1.5]]
    pictures = Ball(0.5, 0.0, 1.0, (1.0, 2.0), (0.5, 0.25))  # for each channel its own
    seen = torch.tensor([-2.0, -8.0]).view(1, 2, 1, 1)  # both are black
    assert pictures.clamp(seen + 9, seen).flatten().tolist() == [-1.0, -6.0]
    assert torch.equal(pictures.clamp(seen - 9, seen), seen)


def test_a_climb_finds_the_top_of_the_ball_and_keeps_the_best():
    inputs = torch.tensor([[0.0, 2.5], [1.0, 0.0]])
    best = WIDE.climb(inputs, lambda x: (x.sum(1), x.sum(1).detach()), 4)
    assert best.tolist() == [[1.0, 3.0], [2.0, 1.0]]
    stays = WIDE.climb(inputs, lambda x: (x.sum(1), -x.sum(1).detach()), 4)
    assert torch.equal(stays, inputs), "the climb may pass worse points, but does not return them"


@pytest.mark.parametrize("name", [name for name in GATED if EXAMPLES[name].input_dtype is None])
def test_what_is_climbed_is_what_is_deployed(name):
    backbone = make_backbone(name).requires_grad_(False)
    policy = learned(backbone, "sequential").eval()
    policy.head.bias.data.zero_()
    model, inputs = RoutedModel(backbone, policy), torch.randn(6, *backbone.input_shape)
    goal = spending(backbone, policy, model.price)
    climbed, worth = goal(inputs.clone())
    assert torch.equal(worth, model.walk(inputs).macs)
    torch.testing.assert_close(climbed * backbone.dense_macs, worth.float())
    moved = WIDE.climb(inputs, goal, 2)
    assert torch.equal(moved, WIDE.clamp(moved, inputs))
    assert (model.walk(moved).macs >= worth).all()


@pytest.mark.parametrize(("name", "kind"), [("exit", "sequential"), ("skip", "upfront"), ("exiting", "sequential")])
def test_attacked_inputs_cost_more_than_noisy_ones(name, kind):
    backbone = make_backbone(name).requires_grad_(False)
    policy = make_policy(backbone, hidden=8, kind=kind).eval()
    nn.init.normal_(policy.head.weight)
    nn.init.zeros_(policy.head.bias)
    inputs = torch.randn(16, *backbone.input_shape)
    with torch.no_grad():
        policy.head.bias -= policy._scores(policy.sight.see(backbone, backbone.begin(inputs), 0.1)).mean(0)
    model = RoutedModel(backbone, policy)
    clean = model.walk(inputs).macs.sum()
    noisy = model.walk(WIDE.noise(inputs, torch.Generator().manual_seed(0))).macs.sum()
    moved = model.walk(WIDE.climb(inputs, spending(backbone, policy, model.price), 8)).macs.sum()
    assert moved > clean and moved > noisy


def test_deepsloth_makes_exits_and_last_layers_unsure():
    for backbone in map(make_backbone, ("exit", "skip")):
        backbone.requires_grad_(False)
        for head in (*getattr(backbone, "heads", ()), backbone.fc):
            head.weight.data *= 30  # sure of itself
        inputs, goal = torch.randn(6, *backbone.input_shape), uncertainty(backbone, CLASSIFICATION)
        moved = WIDE.climb(inputs, goal, 8)
        assert (goal(moved.clone())[0] > 0.8 * goal(inputs.clone())[0]).all()
    assert uncertainty(make_backbone("channel"), CLASSIFICATION) is None


def test_walks_without_a_gradient_are_refused():
    class Rough(Exiting):
        gates = False

    check_attackable(Exiting())
    with pytest.raises(ValueError, match="Rough has no differentiable walk"):
        check_attackable(Rough())
