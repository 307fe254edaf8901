"""Gates trained by gradient: the estimator, known answers for every decision, and that a killed training goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynrl.agents.gates import BATCHES, straight_through
from dynrl.agents.training import Settings, train_policy
from dynrl.evaluation import score
from dynrl.routed import RoutedModel
from tests.cases import BACKBONES, answered_by, make_backbone


def test_draws_are_choices_and_gradients_those_of_a_softmax():
    logits = torch.tensor([[0.5, -1.0, 2.0, -1e9]]).repeat(4000, 1).requires_grad_()
    gates = straight_through(logits, torch.Generator().manual_seed(0))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(gates.sum(1), torch.ones(4000))
    assert not gates[:, 3].any()
    torch.testing.assert_close(gates.mean(0), logits[0].softmax(0), atol=0.03, rtol=0)
    weights = torch.tensor([1.0, 3.0, -2.0, 5.0])
    (gradient,) = torch.autograd.grad((gates * weights).sum(), logits)
    noise = -torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(0)).log()
    (expected,) = torch.autograd.grad(((logits + noise).softmax(1) * weights).sum(), logits)
    torch.testing.assert_close(gradient, expected)


@pytest.fixture
def gates_for(monkeypatch, tmp_path):
    """Train gates for an untrained backbone, by iterations, on inputs whose targets are what its full route says."""

    def train(backbone, iterations, folder=tmp_path, **changes):
        monkeypatch.setattr("dynrl.agents.gates.load_dataset", lambda name: answered_by(backbone))
        monkeypatch.setattr("dynrl.agents.gates.load_backbone", lambda path: (backbone, {}))
        steps = iterations * BATCHES * 32 * backbone.max_steps
        settings = Settings("any", "any", steps, agent="gate", num_envs=32, price_range=(1e-2, 100.0))
        router, finished = train_policy(replace(settings, **changes), Path("any"), folder)
        assert finished
        return router

    return train


@pytest.mark.parametrize("name", BACKBONES)
def test_a_high_price_takes_the_cheapest_and_no_price_keeps_what_accuracy_needs(name, gates_for):
    """Invariant 5: the same policy, told the two ends of its price range."""
    backbone = make_backbone(name)
    model = RoutedModel(backbone, gates_for(backbone, 25))
    split = answered_by(backbone).train
    constant = (torch.full((1, backbone.max_steps), choice) for choice in range(backbone.num_choices))
    cheapest = min(int(backbone.run_route(split.inputs[:1], route).macs) for route in constant)
    model.set_price(100.0)
    cheap = score(model, split)
    model.set_price(1e-2)
    best = score(model, split)
    assert cheap.macs_fraction - cheap.router_fraction == pytest.approx(cheapest / backbone.dense_macs, abs=0.02)
    assert best.metric < 0.1 * cheap.metric


def test_resumed_gates_end_as_if_never_stopped(gates_for, tmp_path):
    backbone = make_backbone("exiting")
    total = 4 * BATCHES * 32 * backbone.max_steps
    whole = gates_for(backbone, 4, tmp_path / "whole")
