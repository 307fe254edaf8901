"""Unrolled networks beyond what every backbone is tested for."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dynrl
from dynrl.backbones import END, Unrolled
from dynrl.ops.exit_scores import exit_scores
from dynrl.policies import StaticPolicy, ThresholdPolicy
from tests.cases import make_backbone, make_policy

PLACES, NUMBERS, STEPS = 5, 3, 6


@pytest.fixture
def network():
    return Unrolled((PLACES, PLACES + NUMBERS), classes=4, hidden=7, steps=STEPS).eval()


def inputs_of(rows=6):
    return torch.randn(rows, PLACES, PLACES + NUMBERS)


def answers_by_hand(network, inputs, steps):
    """Place by place: a gated recurrent unit on the sum of what comes in along links, and the answer after each step."""
    links, known, said = inputs[:, :, :PLACES], network.stem(inputs[:, :, PLACES:]).tanh(), []
    for _ in range(steps):
        told = torch.stack([sum(links[:, a, b, None] * known[:, a] for a in range(PLACES)) for b in range(PLACES)], 1)
        keep, use = network.update(torch.cat([told, known], 2)).sigmoid().split(7, 2)
        new = network.candidate(torch.cat([told, use * known], 2)).tanh()
        known = keep * new + (1 - keep) * known
        said.append(network.head(known.flatten(1)))
    return said


@torch.no_grad()
def test_each_step_is_a_gated_graph_step_and_costs_what_ran(network):
    inputs, before = inputs_of(), 0
    for k, expected in enumerate(answers_by_hand(network, inputs, STEPS)):
        route = (torch.arange(STEPS - 1) < k).long().expand(6, -1)
        with FlopCounterMode(display=False) as counter:
            walk = network.run_route(inputs, route)
        torch.testing.assert_close(walk.outputs, expected, atol=1e-5, rtol=1e-5)
        assert counter.get_total_flops() == 2 * int(walk.macs.sum()) > before
        before = counter.get_total_flops()
    assert (walk.macs == network.dense_macs).all()


def test_all_steps_are_trained_alike_and_the_plain_network_on_its_last(network):
    inputs = inputs_of(3)
    (answers,) = network.training_outputs(inputs, torch.rand(3))
    for answer, expected in zip(answers, answers_by_hand(network, inputs, STEPS), strict=True):
        torch.testing.assert_close(answer.output, expected, atol=1e-5, rtol=1e-5)
        assert answer.rows.tolist() == [0, 1, 2] and answer.weight == 1
    ((last,),) = network.training_outputs(inputs, None)
    torch.testing.assert_close(last.output, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_step_shows_how_sure_it_is_and_how_far_it_moved(network):
    state = network.begin(inputs_of(20))
    before = state.features[0]
    stopped, state = network.advance(state, (torch.arange(20) % 3 > 0).long())
    assert stopped.point == END and stopped.rows.tolist() == list(range(0, 20, 3))
    seen, known = network.observe(state), state.features[0]
    torch.testing.assert_close(seen[:, :3], exit_scores(network.output(state)))
    torch.testing.assert_close(seen[:, 3], (known - before[state.rows]).square().mean((1, 2)).sqrt())
    torch.testing.assert_close(seen[:, 4:], known.mean(1))
    assert seen.shape[1] == network.feature_width and {column for column, _ in network.scores.values()} == set(range(4))


@torch.no_grad()
def test_a_walk_may_be_longer_than_those_it_was_trained_for(network):
    model = dynrl.plug(network, make_policy(network, (0.01, 1.0), hidden=0))
    inputs, trained = inputs_of(), STEPS - 1
    assert model.max_steps == trained and (model(inputs) == network(inputs)).all()
    curve, whole = model.curve, network.dense_macs
    model.max_steps = 2 * trained + 1
    torch.testing.assert_close(
        model(inputs), answers_by_hand(network, inputs, 2 * STEPS)[-1], atol=1e-5, rtol=1e-5
    )  # untrained, a policy goes on
    assert model.last_route.actions.shape == (6, 2 * trained + 1) and (model.last_route.actions == 1).all()
    assert model.last_route.dense_macs == whole and (model.last_route.macs > whole).all() and model.curve == curve
    torch.testing.assert_close(model.backbone(inputs), network(inputs))  # the dense network is as long as before
    model.max_steps = trained
    torch.testing.assert_close(model(inputs), network(inputs))
    assert network.max_steps == trained, "the model has a network of its own"


def test_walks_that_cannot_be_longer_are_refused(network):
    for backbone in (network, make_backbone("exit")):
        for policy in (StaticPolicy(backbone.full_route), make_policy(backbone)):
            model = dynrl.plug(backbone, policy)
            if backbone is network:
                with pytest.raises(ValueError, match="expected max_steps of at least 5"):
                    model.max_steps = 4
            else:
                with pytest.raises(ValueError, match="a walk through ExitResNet takes at most 3 decisions"):
                    model.max_steps = 9
            assert model.max_steps == backbone.max_steps
    model = dynrl.plug(network, ThresholdPolicy(network, "change", torch.zeros(5)))
    with pytest.raises(ValueError, match="thresholds for 5 columns, not 9"):
        model.max_steps = 9
    model(inputs_of())
    assert model.max_steps == 5


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"input_shape": (5, 5)}, "expected inputs of shape (places, places + numbers of a place), got (5, 5)"),
        ({"input_shape": (1, 5, 8)}, "expected inputs of shape (places"), ({"steps": 1}, "expected steps of at least 2"),
        ({"hidden": 0}, "expected hidden of at least 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, reason):
    with pytest.raises(ValueError) as refused:
        Unrolled(**{"input_shape": (5, 8), **settings})
    assert reason in str(refused.value)
