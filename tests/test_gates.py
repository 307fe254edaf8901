"""Gates trained by gradient: the estimator, known answers for every decision, and that a killed training goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynrl.agents.base import train_policy
from dynrl.agents.gates import Gates, straight_through
from dynrl.deploy import RoutedModel
from dynrl.evaluation import score
from dynrl.settings import Learning, Problem, Settings
from tests.cases import answered_by, make_backbone


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
    """Train gates for an untrained backbone, by iterations, to say what its full route says."""

    def train(backbone, iterations, folder=tmp_path):
        monkeypatch.setattr("dynrl.agents.base.load_dataset", lambda name: answered_by(backbone))
        monkeypatch.setattr("dynrl.agents.gates.load_backbone", lambda path: (backbone, {}))
        steps = iterations * 8 * 16 * backbone.max_steps
        learning = Learning("gate", steps=steps, num_envs=16, price_range=(0.01, 1e6), learning_rate=0.01)
        settings = Settings(Problem("any", "any"), learning)
        return train_policy(settings, Path("any"), folder)

    return train


# Not all of the registry: an untrained network of many choices or steps takes a minute to show it.
@pytest.mark.parametrize("name", ["exiting", "looping", "branching", "skip", "exit"])
def test_a_high_price_takes_the_cheapest_and_no_price_keeps_what_accuracy_needs(name, gates_for):
    """Invariant 5: the same policy, told the two ends of its price range."""
    backbone = make_backbone(name)
    router, finished = gates_for(backbone, 50)
    assert finished
    model, split = RoutedModel(backbone, router), answered_by(backbone).train
    constant = (torch.full((1, backbone.max_steps), choice) for choice in range(backbone.num_choices))
    cheapest = min(int(backbone.run_route(split.inputs[:1], route).macs) for route in constant)
    model.set_price(1e6)
    cheap = score(model, split)
    model.set_price(0.01)
    best = score(model, split)
    assert cheap.macs_fraction - cheap.router_fraction == pytest.approx(cheapest / backbone.dense_macs, abs=0.02)
    assert best.metric < 0.1 * cheap.metric


def test_resumed_gates_end_as_if_never_stopped(gates_for, tmp_path, monkeypatch):
    backbone = make_backbone("exiting")
    whole, _ = gates_for(backbone, 20, tmp_path / "whole")
    descend, calls = Gates._descend, [0]

    def interrupted(self):
        calls[0] += 1
        if calls[0] == 13 * 8 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return descend(self)

    with monkeypatch.context() as patch:
        patch.setattr(Gates, "_descend", interrupted)
        _, finished = gates_for(backbone, 20, tmp_path / "stopped")
        assert not finished
    resumed, finished = gates_for(backbone, 20, tmp_path / "stopped")
    assert finished
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)


def test_tensorboard_shows_what_it_shows_of_ppo(gates_for, tmp_path):
    backbone = make_backbone("branching")
    gates_for(backbone, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    rates = {"rate/way/1", "rate/way/2", "rate/detour", "rate/last"}
    assert set(events.Tags()["scalars"]) == {
        "reward", "mse", "macs_fraction", "price", "routes/distinct", "entropy", "throughput/steps_per_s", *rates,
    }  # fmt: skip
    assert [e.step for e in events.Scalars("reward")] == [8 * 16 * 3 * (i + 1) for i in range(3)]
    assert all(0 <= e.value <= 1 for tag in rates for e in events.Scalars(tag))


def test_gates_need_no_ray():
    code = "import sys, dynrl.agents.gates; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
