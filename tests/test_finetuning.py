"""Backbone and policy trained in turn: what fine-tuning does, the rounds, and that nothing is lost by a kill."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

from dynrl.agents.base import Agent
from dynrl.agents.joint import train_jointly
from dynrl.backbones import FAMILIES, load_backbone
from dynrl.data import load_dataset
from dynrl.deploy import RoutedModel
from dynrl.evaluation import score
from dynrl.files import load_tensors
from dynrl.finetuning import Finetuner, Finetuning
from dynrl.perturb import Ball
from dynrl.pretraining import make_optimizer
from dynrl.settings import Learning, Problem, Settings
from tests.cases import BACKBONES, answered_by, full_metric, make_backbone, make_policy
from tests.toys import Exiting, dropping

PRICES = (0.01, 1.0)


def untrained_policy(backbone):
    return make_policy(backbone, PRICES, start=[0]).eval()


def random_policy(backbone):
    """Its routes hang on the input, for a quarter of all at least, and spare some MACs."""
    router, inputs = untrained_policy(backbone), backbone.random_inputs(64)
    for _ in range(100):
        with torch.no_grad():
            router.head.bias.zero_()
            router.head.weight.normal_(std=3)
        route = RoutedModel(backbone, router).walk(inputs)
        commonest = int(route.route.unique(dim=0, return_counts=True)[1].max())
        if commonest <= 48 and route.macs.double().mean() < 0.9 * backbone.dense_macs:
            return router
    raise AssertionError("100 draws, and none that spares MACs")


@pytest.mark.parametrize("name", BACKBONES)
def test_the_policys_routes_come_nearer_to_the_reference(name, tmp_path):
    backbone, reference = make_backbone(name), make_backbone(name)
    data, router = answered_by(reference), random_policy(backbone)
    before = score(RoutedModel(backbone, router), data.train).metric
    plan = Finetuning(rounds=1, epochs=8, batch_size=32)
    if backbone.input_dtype is not None:  # each token's embedding is in few rows, so its gradients are small
        plan = replace(plan, optimizer="adam", learning_rate=0.01)
    scalars = Finetuner(backbone, reference, data, plan, PRICES, 0, tmp_path / "c.safetensors").train(router, 1)
    assert not backbone.training
    assert score(RoutedModel(backbone, router), data.train).metric < 0.8 * before
    assert set(scalars) == {"loss", "divergence", "mse", "macs_fraction"}
    assert 0 < scalars["macs_fraction"] <= 1


def test_full_routes_in_each_batch_keep_the_dense_network(small_backbone, tmp_path):
    """Fine-tuned for a policy that skips all: it gains, and what it costs the full route is up to `full_share`."""
    data = load_dataset("digits")
    reference, _ = load_backbone(small_backbone)
    router = untrained_policy(reference)  # its `start` is choice 0
    found = {}
    for share in (0.0, 0.5):
        backbone, _ = load_backbone(small_backbone)
        plan = Finetuning(rounds=1, epochs=4, batch_size=64, learning_rate=0.1, full_share=share)
        tuner = Finetuner(backbone, reference, data, plan, PRICES, 0, tmp_path / f"{share}.safetensors")
        scalars = tuner.train(router, 1)
        routed = score(RoutedModel(backbone, router), data.test).metric
        found[share] = routed, full_metric(backbone, data.test), scalars["macs_fraction"]
    before = score(RoutedModel(reference, router), data.test).metric, full_metric(reference, data.test)
    assert found[0.5][0] > before[0] + 0.03
    assert found[0.5][1] > before[1] - 0.01 > found[0.0][1]
    assert found[0.5][2] == pytest.approx((1 + found[0.0][2]) / 2)


def test_routes_are_drawn_from_the_policy_where_the_plan_says_so(tmp_path):
    backbone = make_backbone("skip")
    data, router = answered_by(backbone), untrained_policy(backbone)  # which favours choice 0
    spent = {}
    for sampled in (False, True):
        plan = Finetuning(rounds=1, epochs=1, batch_size=32, full_share=0.0, sampled=sampled)
        tuner = Finetuner(make_backbone("skip"), backbone, data, plan, PRICES, 0, tmp_path / f"{sampled}.safetensors")
        spent[sampled] = tuner.train(router, 1)["macs_fraction"]
    floor = (backbone.start_macs + int(backbone.costs[:, 0].sum())) / backbone.dense_macs
    assert spent[False] == pytest.approx(floor)
    assert spent[True] - floor == pytest.approx((1 - floor) / (1 + math.exp(2)), rel=0.1)


def test_routes_are_those_that_are_deployed_beyond_the_cap_of_logits(tmp_path):
    backbone = make_backbone("skip")
    data, router = answered_by(backbone), untrained_policy(backbone)
    with torch.no_grad():
        router.head.weight.zero_()
        router.head.bias.copy_(torch.tensor([300.0, 400.0]))
    assert float(RoutedModel(backbone, router).walk(data.train.inputs).macs.float().mean()) == backbone.dense_macs
    plan = Finetuning(rounds=1, epochs=1, batch_size=32, full_share=0.0)
    tuner = Finetuner(make_backbone("skip"), backbone, data, plan, PRICES, 0, tmp_path / "c.safetensors")
    assert tuner.train(router, 1)["macs_fraction"] == 1.0


def test_a_network_that_draws_for_itself_is_tuned_by_the_seed(tmp_path):
    backbone = make_backbone("skip")
    data, router, found = answered_by(backbone), random_policy(backbone), []
    for name in ("first", "second"):
        tuned = dropping(make_backbone("skip"))
        torch.rand(1)  # what a program has drawn before changes nothing
        plan = Finetuning(rounds=1, epochs=1, batch_size=32)
        Finetuner(tuned, backbone, data, plan, PRICES, 0, tmp_path / f"{name}.safetensors").train(router, 1)
        found.append(tuned.fingerprint())
    assert found[0] == found[1]


def test_each_epoch_has_inputs_of_its_own_where_they_can_be_drawn(tmp_path):
    """They do not hang on where rounds end, nor on where a run was killed."""
    backbone, drawn = make_backbone("exiting"), []
    data = answered_by(backbone)
    data = replace(data, anew=lambda seed: drawn.append(seed) or data.train)
    plan = Finetuning(rounds=3, epochs=0.75, batch_size=32)  # of 8 batches each, 6 a round
    make = partial(Finetuner, backbone, backbone, data, plan, PRICES, 5, tmp_path / "c.safetensors")
    make().train(untrained_policy(backbone), 1)
    make().train(untrained_policy(backbone), 3)
    assert len(drawn) == 4 and drawn[0] == drawn[1] and len(set(drawn)) == 3


@pytest.mark.parametrize("count", [64, 200, 256])
def test_fine_tuning_ends_on_more_or_fewer_inputs_than_it_began_on(count, tmp_path):
    """At a learning rate of 0, after as many batches as it was begun for."""
    backbone = make_backbone("exiting")
    whole, plan = answered_by(backbone), Finetuning(rounds=2, epochs=2, batch_size=32)

    def tuner(images):
        data = replace(whole, train=whole.train.head(images))
        return Finetuner(make_backbone("exiting"), backbone, data, plan, PRICES, 0, tmp_path / "c.safetensors")

    first = tuner(160)
    first.train(untrained_policy(backbone), 1)
    again = tuner(count)
    assert (first.batches, first.total, again.batches, again.total) == (10, 20, 10, 20)
    again.train(untrained_policy(backbone), 1)
    assert again.batches == 10, "the round is over"
    again.train(untrained_policy(backbone), 2)
    assert again.batches == 20 and again._schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
    assert tuner(count).batches == 20


def test_a_checkpoint_of_more_batches_than_there_are_is_refused(tmp_path):
    backbone = make_backbone("exiting")
    make = partial(
        Finetuner, backbone, backbone, answered_by(backbone), Finetuning(batch_size=32), PRICES, 0,
        tmp_path / "c.safetensors",
    )  # fmt: skip
    tuner = make()
    tuner._checkpoint.save(tuner.total + 1)
    with pytest.raises(
        ValueError, match=r"c.safetensors is damaged \(expected at most 32 batches, got 33\); take it away"
    ):
        make()


def test_both_optimizers_descend_and_others_are_refused():
    for name in ("sgd", "adam"):
        backbone = make_backbone("exiting")
        optimizer = make_optimizer(backbone, name, 1e-2, 0.0)
        losses = []
        for _ in range(20):
            loss = backbone(torch.ones(2, 4)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="expected one of sgd, adam"):
        make_optimizer(backbone, "nosuch", 1e-2, 0.0)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    backbone = make_backbone("exiting")
    with pytest.raises(ValueError, match="larger than the 256"):
        Finetuner(
            backbone, backbone, answered_by(backbone), Finetuning(batch_size=300), PRICES, 0, tmp_path / "c.safetensors"
        )


@pytest.mark.parametrize("name", ["exiting", "looping", "skip"])
def test_attacked_rows_take_the_routes_of_before(name, tmp_path):
    backbone = make_backbone(name)
    router, data = random_policy(backbone), answered_by(backbone)
    plan = Finetuning(batch_size=32, attacked=0.5, full_share=0.25)
    tuner = Finetuner(backbone, backbone, data, plan, PRICES, 0, tmp_path / "c.safetensors")
    inputs, prices = data.train.inputs[:32], torch.full((32,), 0.1)
    backbone.train()
    moved, fixed, route = tuner._planned(router, inputs, prices)
    model = RoutedModel(backbone, router)
    model.set_price(0.1)
    assert backbone.training and fixed.tolist() == [True] * 8 + [False] * 8 + [True] * 16
    assert torch.equal(moved[:16], inputs[:16])
    assert torch.equal(moved, tuner._ball.clamp(moved, inputs)) and not torch.equal(moved[16:], inputs[16:])
    taken = model.walk(inputs[16:]).route
    assert torch.equal(route[16:], taken.clamp_min(0)) and len(taken.unique(dim=0)) > 1
    assert torch.equal(route[:8], backbone.dense_actions(8))


def test_what_attacked_rows_spend_beyond_before_is_a_loss(tmp_path):
    """It is counted as the deployed model spends, nothing else is in it, and a step along its gradient lowers it."""
    backbone, reference = make_backbone("exit"), make_backbone("exit")
    router, inputs = random_policy(backbone), backbone.random_inputs(64)
    plan = Finetuning(batch_size=32, attacked=0.5)
    tuner = Finetuner(backbone, reference, answered_by(reference), plan, PRICES, 0, tmp_path / "c.safetensors")
    prices, model = torch.full((64,), 0.1), RoutedModel(backbone, router)
    model.set_price(0.1)
    tuner._ball = Ball(0.5, -5.0, 5.0)
    moved, _, _ = tuner._planned(router, inputs, prices)
    excess = tuner._excess(router, inputs, moved, prices)
    assert backbone.training
    before, after = (model.walk(part[32:]).macs for part in (inputs, moved))
    counted = float(excess.detach())
    assert counted == pytest.approx(
        float((after - before).clamp_min(0).double().mean() / backbone.dense_macs), abs=1e-5
    )
    assert counted > 0.01 and float(tuner._excess(router, inputs, inputs, prices).detach()) == 0
    excess.backward()
    size = math.sqrt(sum(float(p.grad.square().sum()) for p in backbone.parameters() if p.grad is not None))
    found = [counted]
    for _ in range(8):
        with torch.no_grad():
            for parameter in backbone.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad / size
        found.append(float(tuner._excess(router, inputs, moved, prices).detach()))
    assert min(found) < found[0]


def test_policies_learn_on_attacked_inputs_beside_others(jointly, monkeypatch, tmp_path):
    from dynrl.agents.gates import Gates

    agents, counts, reload, climb = [], [], Gates.reload, Ball.climb
    monkeypatch.setattr(Gates, "reload", lambda agent: reload(agent) or agents.append(agent))
    monkeypatch.setattr(Ball, "climb", lambda ball, inputs, *a: counts.append(len(inputs)) or climb(ball, inputs, *a))
    jointly("attacked", 0.25)
    # Gates attack a quarter of each batch of 16, against what they are by then; the network, of each batch of 32.
    assert counts.count(4) == 8 + 16 * 3 and counts.count(8) >= 4 * 3
    file = tmp_path / "attacked" / "checkpoints" / "attacked.safetensors"
    assert not file.exists(), "gates attack what they learn on themselves"
    monkeypatch.setattr(Gates, "attacks", False)
    file = tmp_path / "other" / "checkpoints" / "attacked.safetensors"  # for agents whose inputs an environment has
    jointly("other", 0.25)
    plain = agents[-1]._split
    moved = load_tensors(file, "attacked inputs")[0]["inputs"]
    changed = (plain.inputs != plain.beginning_with(moved).inputs).flatten(1).any(1)
    count = round(0.25 * len(plain))
    assert changed[:count].float().mean() > 0.9 and not changed[count:].any()
    with pytest.raises(ValueError, match="expected at most"):
        plain.beginning_with(torch.zeros(1, 5))


# In turn ----------------------------------------------------------------------------------------------------

PLAN = Finetuning(rounds=3, epochs=0.5, steps=2 * 8 * 16 * 2, batch_size=32)  # rounds of 4 batches and 2 iterations
SETTINGS = Settings(
    Problem("toy", "answered"), Learning("gate", steps=8 * 16 * 2, num_envs=16, price_range=(0.002, 2.0))
)


@pytest.fixture
def jointly(monkeypatch, tmp_path):
    """Train a toy and its gates in turn: exact, and in no time. `jointly(folder)` gives what `train_jointly` does."""
    data, reference = answered_by(make_backbone("exiting")), make_backbone("exiting")
    monkeypatch.setitem(FAMILIES, Exiting.family, Exiting)
    monkeypatch.setattr("dynrl.finetuning.CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(Agent, "checkpoint_every", 1)
    for module in ("base", "joint"):
        monkeypatch.setattr(f"dynrl.agents.{module}.load_dataset", lambda name: data)

    def train(folder, attacked=0.0):
        file = tmp_path / folder / "checkpoints" / "backbone.safetensors"
        if not file.exists():
            torch.manual_seed(3)
            Exiting().save(file)
        settings = replace(SETTINGS, learning=replace(SETTINGS.learning, attacked=attacked))
        return *train_jointly(settings, PLAN, file, reference, tmp_path / folder), *load_backbone(file)

    return train


def at_call(monkeypatch, target, number, act):
    """Call `act` once, when the method `target` is called for the `number`-th time."""
    owner, name = target
    method, calls = getattr(owner, name), [0]

    def counted(*args, **settings):
        calls[0] += 1
        if calls[0] == number:
            act()
        return method(*args, **settings)

    monkeypatch.setattr(owner, name, counted)


def fail():
    raise RuntimeError("killed")


def test_rounds_follow_each_other(jointly, monkeypatch):
    from dynrl.agents.gates import Gates

    done = []
    step, descend = Finetuner._step, Gates._descend
    monkeypatch.setattr(Finetuner, "_step", lambda *a: done.append("backbone") or step(*a))
    monkeypatch.setattr(Gates, "_descend", lambda *a: done.append("policy") or descend(*a))
    _, finished, backbone, notes = jointly("whole")
    assert finished
    assert notes["rounds"] == 3
    assert done == ["policy"] * 8 + (["backbone"] * 4 + ["policy"] * 16) * 3
    torch.manual_seed(3)
    assert backbone.fingerprint() != Exiting().fingerprint()


@pytest.mark.parametrize(("part", "attacked"), [("backbone", 0), ("policy", 0), ("version", 0), ("policy", 0.5)])
def test_killed_and_resumed_in_turn_ends_as_if_never_stopped(part, attacked, jointly, monkeypatch):
    from dynrl.agents.gates import Gates

    router, _, backbone, _ = jointly("whole", attacked)
    target, number = {
        "backbone": ((Finetuner, "_step"), 7), "policy": ((Gates, "_descend"), 37), "version": ((Exiting, "save"), 2),
    }[part]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        at_call(patch, target, number, fail)
        jointly("killed", attacked)
    again, finished, same, _ = jointly("killed", attacked)
    assert finished
    for one, other in ((router, again), (backbone, same)):
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize("number", [7, 8])
def test_curves_of_rounds_that_were_interrupted_are_those_of_whole_ones(number, jointly, monkeypatch):
    """A value a round, the mean over all its batches, also where it was stopped within it or at its end."""
    write, written = Agent.write, {}

    def noted(agent, scalars):
        if any(tag.startswith("finetuning/") for tag in scalars):
            written.setdefault(agent.checkpoints.parent.name, []).append((agent.steps, scalars))
        write(agent, scalars)

    monkeypatch.setattr(Agent, "write", noted)
    jointly("whole")
    with monkeypatch.context() as patch:
        at_call(patch, (Finetuner, "_step"), number, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert not jointly("stopped")[1]
    assert jointly("stopped")[1]
    assert len(written["stopped"]) == len(written["whole"]) == PLAN.rounds
    for (step, scalars), (at, expected) in zip(written["stopped"], written["whole"], strict=True):
        assert step == at and scalars == pytest.approx(expected)


@pytest.mark.parametrize("part", ["backbone", "policy"])
def test_ctrl_c_in_turn_leaves_a_version_and_its_policy(part, jointly, monkeypatch):
    from dynrl.agents.gates import Gates

    target, number = {"backbone": ((Finetuner, "_step"), 7), "policy": ((Gates, "_descend"), 37)}[part]
    with monkeypatch.context() as patch:
        at_call(patch, target, number, lambda: os.kill(os.getpid(), signal.SIGINT))
        router, finished, backbone, notes = jointly("stopped")
    assert not finished
    assert notes["rounds"] == (1 if part == "backbone" else 2)
    RoutedModel(backbone, router)(torch.randn(3, 4))
    *_, whole = jointly("stopped")
    assert whole["rounds"] == 3
