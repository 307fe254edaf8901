"""Unrolled networks beyond what every backbone is tested for."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dynrl
from dynrl.backbones import END, RecallNet, Restorer, Unrolled
from dynrl.backbones.unroll import noise_level
from dynrl.data import Augmentation, Dataset, Split
from dynrl.evaluation.scores import pictures
from dynrl.ops.exit_scores import exit_scores
from dynrl.policies import StaticPolicy, ThresholdPolicy
from dynrl.pretraining import Recipe, loss_of_best
from dynrl.tasks import Restoration
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


@torch.no_grad()
def test_a_cell_sees_two_neighbours_each_way_a_step_and_the_last_one_answers():
    """By products of shifted cells; the answer is read where the row's last numbers are."""
    network, given = RecallNet((9, 2), classes=3, width=4, steps=3).eval(), torch.randn(5, 9, 2)
    network.second.weight.normal_(std=0.3)
    lengths = [9, 1, 4, 6, 9]
    for row, length in enumerate(lengths):
        given[row, length:] = 0

    def convolved(layer, x):
        padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
        return sum(padded[:, i : i + 9] @ layer.weight[:, :, i].t() for i in range(3)) + layer.bias

    known, before = convolved(network.stem, given).relu(), 0
    for k in range(3):
        moved = convolved(network.second, convolved(network.first, torch.cat([known, given], 2)).relu())
        known = (known + moved).relu()
        route = (torch.arange(2) < k).long().expand(5, -1)
        with FlopCounterMode(display=False) as counter:
            walk = network.run_route(given, route)
        ends = torch.stack([known[row, length - 1] for row, length in enumerate(lengths)])
        torch.testing.assert_close(walk.outputs, network.head(ends), atol=1e-5, rtol=1e-5)
        assert counter.get_total_flops() == 2 * int(walk.macs.sum()) > before
        before = counter.get_total_flops()
    state = network.begin(given)
    seen = network.observe(state)
    torch.testing.assert_close(seen[:, :3], exit_scores(network.output(state)))
    torch.testing.assert_close(seen[:, 4:], state.features[0].mean(2))
    assert seen.shape[1] == network.feature_width


def test_a_plain_network_with_recall_is_trained_at_an_early_step_too():
    network, given = RecallNet((9, 2), width=4, steps=5), torch.randn(3, 9, 2)
    (every,) = network.training_outputs(given, torch.rand(3))
    assert [answer.weight for answer in every] == [1.0] * 5
    generator, early = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        ((first, last),) = network.training_outputs(given, None, generator)
        assert first.weight == last.weight == 0.5 and torch.equal(last.output, every[-1].output)
        early |= {k for k, answer in enumerate(every) if torch.equal(answer.output, first.output)}
    assert early == set(range(4))


@pytest.mark.parametrize("settings", [{"input_shape": (9,)}, {"width": 0}, {"classes": 0}, {"steps": 1}])
def test_bad_settings_of_a_network_with_recall_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        RecallNet(**{"input_shape": (9, 2), **settings})


def restorer(**settings):
    return Restorer((2, 9, 9), classes=2, width=3, **{"steps": 4, **settings}).eval()


@torch.no_grad()
def test_a_restorer_adds_what_its_unit_says_is_missing():
    network, given = restorer(), torch.rand(5, 2, 9, 9)
    for parameter in network.parameters():
        parameter.normal_(std=0.2)
    image = given
    for k in range(4):
        missing = network.unit(torch.cat([image, given], 1))
        image = image + missing
        route = (torch.arange(3) < k).long().expand(5, -1)
        walk = network.run_route(given, route)
        torch.testing.assert_close(walk.outputs, image, atol=1e-5, rtol=1e-5)
        with FlopCounterMode(display=False) as counter:
            network.run_route(given, route)
        assert counter.get_total_flops() == 2 * int(walk.macs.sum())
    state = network.begin(given)
    first = network.output(state) - given
    seen = network.observe(state)
    assert seen.shape == (5, network.feature_width)
    sizes = [first.square().mean((1, 2, 3)).sqrt(), noise_level(given + first), noise_level(given)]
    torch.testing.assert_close(seen[:, [0, 1, 3]].exp(), torch.stack(sizes, 1))
    torch.testing.assert_close(seen[:, 2], seen[:, 0])  # after one step, all that was taken off is its change


def test_noise_is_told_from_edges_and_slopes():
    generator = torch.Generator().manual_seed(0)
    picture = torch.linspace(0, 1, 64).expand(40, 1, 64, 64).clone()
    picture[:, :, 20:] += 1  # an edge
    assert noise_level(picture).max() < 1e-5
    for deviation in (0.05, 0.2):
        noisy = picture + deviation * torch.randn(picture.shape, generator=generator)
        assert noise_level(noisy).mean() == pytest.approx(deviation, rel=0.03)


def test_walk_and_gates_of_a_restorer_agree():
    network, given = restorer(), torch.rand(6, 2, 9, 9)
    route = torch.randint(2, (6, 3), generator=torch.Generator().manual_seed(1))
    gates = torch.nn.functional.one_hot(route, 2).float().requires_grad_()
    torch.testing.assert_close(network(given, gates), network(given, route), atol=1e-6, rtol=1e-5)
    network(given, gates).square().sum().backward()
    assert gates.grad.abs().sum() > 0


def test_each_image_is_trained_at_its_best_step():
    network, task = restorer(), Restoration()
    given, clean = torch.rand(5, 2, 9, 9), torch.rand(5, 2, 9, 9)
    (answers,) = network.training_outputs(given, torch.rand(5))
    worth = torch.stack([task.log_likelihood(answer.output, clean) for answer in answers])
    assert network.hindsight
    torch.testing.assert_close(loss_of_best(answers, clean, task), -worth.max(0).values.mean())


def test_an_upfront_policy_sees_the_image_and_keeps_its_number_of_steps():
    network = restorer()
    model = dynrl.plug(network, make_policy(network, kind="upfront"))
    assert model(torch.rand(3, 2, 9, 9)).shape == (3, 2, 9, 9) and model.last_route.router_macs.min() > 0
    with pytest.raises(ValueError, match="the policy is for RouteSight"):
        model.max_steps = 9
    assert model.max_steps == 3


@pytest.mark.parametrize("settings", [{"input_shape": (1, 2, 9)}, {"input_shape": (1, 9, 9)}, {"input_shape": (9, 9)}])
def test_bad_images_are_refused(settings):
    with pytest.raises(ValueError, match=r"expected images \[channels, height, width\] of at least 3x3 pixels"):
        Restorer(**settings, classes=2)


def noisy(count=120):
    """A data set of stripes in noise, some of it loud."""
    generator = torch.Generator().manual_seed(0)
    clean = (torch.arange(12) // 3 % 2).float().expand(count, 1, 12, 12)
    level = 0.02 + 0.3 * (torch.arange(count) % 2).float()
    inputs = clean + level.view(-1, 1, 1, 1) * torch.randn(clean.shape, generator=generator)
    splits = [Split(inputs.clone(), clean.clone(), Restoration(), {"noise": level}) for _ in range(3)]
    return Dataset("stripes in noise", 1, *splits, Augmentation(flip=True, shift=2))


def test_a_report_shows_what_was_restored(tmp_path):
    data = noisy()
    backbone = Restorer((1, 12, 12), width=2, steps=3)
    run = dynrl.train(
        backbone, data, out=tmp_path / "run", pretrain=Recipe(epochs=1, batch_size=20, optimizer="adam", learning_rate=0.01),
        agent="sb3-ppo", reward="gain", steps=300, price_range=(0.1, 1.0), hidden=0,
    )  # fmt: skip
    report = dynrl.evaluate(run, out=tmp_path / "report", batch_size=8, budgets=(0.7,))
    assert report["metric"] == "psnr" and report["usage"]["difficulty"]["noise"]["bins"]
    assert report["dense"]["psnr"] > 0 and (tmp_path / "report" / "report.png").stat().st_size > 10_000
    shown = pictures(run.model, data.test, [3, 1])
    assert list(shown) == ["input", "routed", "full route", "target"]
    assert torch.equal(shown["input"], data.test.inputs[[3, 1]])
    assert torch.equal(shown["routed"], run.model(data.test.inputs[[3, 1]]))
    torch.testing.assert_close(shown["full route"], run.model.backbone(data.test.inputs[[3, 1]]))


def test_targets_turn_with_their_images():
    data = noisy()
    rows, generator = torch.arange(40), torch.Generator().manual_seed(0)
    clean = Split(data.train.targets, data.train.targets, data.task)
    inputs, targets = data.augmentation.rows(clean, rows, generator)
    assert torch.equal(inputs, targets) and not torch.equal(targets, data.train.targets[:40])
    labels = Split(data.train.inputs, torch.arange(120))
    assert data.augmentation.rows(labels, rows, generator)[1].tolist() == list(range(40))
