"""Routing networks: each row gets its own modules' results, by rules of its own; what is paid; what tables are for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynrl.backbones import RoutingNet
from dynrl.backbones.routing import LEAST
from dynrl.data import Split, load_dataset
from dynrl.deploy import RoutedModel
from dynrl.evaluation import score
from dynrl.evaluation.by_task import TablePolicy, fit_table
from dynrl.ops.backend import device_counts
from dynrl.policies import PolicySpec
from dynrl.tasks import Regression
from tests.devices import NoHostSync

KERNELS, TASKS, CHANNELS = (0, 1, 3, 3), 3, 6


def network(**settings):
    torch.manual_seed(0)
    given = dict(
        input_shape=(2 + TASKS, 12, 12), classes=4, image_channels=2, channels=CHANNELS, layers=2, kernels=KERNELS
    )
    return RoutingNet(**given | settings).eval()


def told(rows, tasks=TASKS):
    """Inputs whose last channels tell their task, standardised, and the tasks."""
    generator = torch.Generator().manual_seed(1)
    task = torch.randint(tasks, (rows,), generator=generator)
    planes = 3 * F.one_hot(task, tasks).float() - 1
    images = torch.randn(rows, 2, 12, 12, generator=generator)
    return torch.cat([images, planes[:, :, None, None].expand(-1, -1, 12, 12)], 1), task


@torch.no_grad()
def module_by_module(backbone, inputs, task, route):
    """One row at a time, by the network's parts."""
    outputs = []
    for x, k, choices in zip(inputs, task.tolist(), route.tolist(), strict=True):
        network = k if len(backbone.stems) > 1 else 0
        x = backbone.stems[network](x[None, :2]) + backbone.told[k].view(1, -1, 1, 1)
        for layer, choice in zip(backbone.layers, choices, strict=True):
            if KERNELS[choice]:
                module = layer[network * len(KERNELS) + choice]
                x = (x + module.second(module.first(x))).relu()
        head = k if len(backbone.weight) > 1 else 0
        outputs.append(backbone.weight[head] @ x.mean((2, 3))[0] + backbone.bias[head])
    return torch.stack(outputs)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("own", ["nothing", "head", "network"])
@torch.no_grad()
def test_each_row_gets_its_modules_and_its_tasks_own_parts(own, fast):
    backbone, (inputs, task) = network(own=own), told(11)
    torch.nn.init.normal_(backbone.bias)
    run = backbone.for_inference().for_inference() if fast else backbone  # reports copy copies
    assert torch.equal(backbone.task(inputs), task) and backbone.tasks == TASKS
    for route in (*(torch.full((11, 2), e) for e in range(4)), torch.randint(0, 4, (11, 2))):
        expected = module_by_module(backbone, inputs, task, route)
        torch.testing.assert_close(run(inputs, route), expected, atol=1e-5, rtol=1e-5)
        gates = F.one_hot(route, 4).float()
        torch.testing.assert_close(run(inputs, gates), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_modules_cost_by_their_kernels_and_passing_is_free():
    backbone, (inputs, _) = network(), told(5)
    places, head = 9, 4 * CHANNELS
    macs = {kernel: places * CHANNELS**2 * (kernel**2 + 1) for kernel in (1, 3, 5)}
    assert network(kernels=(1, 3, 5)).costs[0].tolist() == list(macs.values())
    modules = [0, *(macs[kernel] for kernel in KERNELS[1:])]
    assert backbone.costs.tolist() == [modules, [each + head for each in modules]]
    state = backbone.begin(inputs)
    before = state.features.clone()
    (after,) = backbone.advance(state, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(after.features, before, rtol=0, atol=0)


@torch.no_grad()
def test_counts_on_the_device_give_the_same_without_a_wait(kernel_case):
    backbone, (inputs, _) = network(layers=1).for_inference().to(kernel_case), told(6)
    inputs, route = inputs.to(kernel_case), torch.tensor([0, 3, 1, 3, 2, 1], device=kernel_case)

    def walk():
        state = backbone.begin(inputs)
        seen = backbone.observe(state)
        backbone.advance(state, route)
        return seen, state.walk

    before, expected = walk()
    with device_counts():
        walk()  # constants are made once
        with NoHostSync():
            seen, got = walk()
    torch.testing.assert_close(seen, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.outputs, expected.outputs, atol=1e-4, rtol=1e-4)
    assert torch.equal(got.macs, expected.macs)


@pytest.mark.parametrize("own", ["nothing", "network"])
def test_a_task_trains_what_it_uses_and_nothing_else(own):
    backbone, (inputs, task) = network(own=own).train(), told(40)
    mine = task == 1
    route = torch.tensor([[2, 0]]).expand(int(mine.sum()), -1)
    backbone(inputs[mine], route).square().sum().backward()
    first = 4 if own == "network" else 0
    for i, layer in enumerate(backbone.layers):
        trained = [j for j, module in enumerate(layer) if any(p.grad is not None for p in module.parameters())]
        assert trained == ([first + 2] if i == 0 else [])
    assert [bool(stem[0].conv.weight.grad is not None) for stem in backbone.stems] == (
        [False, True, False] if own == "network" else [True]
    )


def test_random_routes_replace_what_the_table_prefers_by_cheaper_modules():
    backbone, (inputs, task) = network().train(), told(400)
    with torch.no_grad():
        backbone.table.fill_(-9.0).scatter_(2, torch.tensor([[2, 3], [3, 2], [2, 0]]).unsqueeze(2), 9.0)
    seen = []
    gated = backbone.gated
    backbone.gated = lambda *given: seen.append(gated(*given)) or seen[-1]
    for rate in (1.0, 0.5):
        (answers,) = backbone.training_outputs(inputs, torch.full((400,), rate), torch.Generator().manual_seed(0))
        assert torch.equal(answers[0].rows, torch.arange(400))
    preferred = backbone.table.argmax(2)[task]
    assert torch.equal(seen[0].route, preferred)
    other = seen[1].route != preferred
    assert 0.1 < other.float().mean() < 0.9 and (seen[1].route[other] < 2).all()
    (answers,) = backbone.training_outputs(inputs, None)
    torch.testing.assert_close(answers[0].output, backbone(inputs))


def test_the_table_learns_which_module_is_better_and_no_other_training_moves_it():
    """Of two modules at one layer, one adds what lowers the loss of a task: the table moves towards it."""
    backbone, (inputs, _) = network(layers=1).train(), told(400)
    before = backbone.table.clone()
    targets = backbone(inputs, torch.full((400, 1), 2)).detach()  # the outputs of module 2
    for _ in range(5):
        passes = backbone.training_outputs(inputs, torch.ones(400), torch.Generator().manual_seed(0))
        ((answer,),) = [next(passes)]
        (answer.output - targets).square().mean().backward()
        assert next(passes, None) is None
    shift = (backbone.table.softmax(2) - before.softmax(2))[:, 0]
    assert (shift[:, 2] > 0).all() and (shift[:, 2] >= shift.amax(1) - 1e-6).all()
    after = backbone.table.clone()
    backbone(inputs).sum().backward()
    assert torch.equal(backbone.table, after) and "table" in backbone.state_dict()


@torch.no_grad()
def test_modules_like_the_full_routes_begin_as_good_as_the_trunk():
    backbone, (inputs, _) = network(), told(9)
    alike = [torch.tensor([[a, b]]).expand(9, -1) for a in (2, 3) for b in (2, 3)]
    before, cheap = backbone(inputs), backbone(inputs, torch.ones(9, 2, dtype=torch.int64))
    assert not torch.allclose(backbone(inputs, alike[0]), before)
    backbone.open_up()
    assert all(torch.allclose(backbone(inputs, route), before) for route in alike)
    torch.testing.assert_close(backbone(inputs, torch.ones(9, 2, dtype=torch.int64)), cheap, rtol=0, atol=0)


@torch.no_grad()
def test_policies_are_told_the_task_and_begin_with_the_table():
    backbone, (inputs, task) = network(), told(7)
    state = backbone.begin(inputs)
    for layer in range(2):
        seen = backbone.observe(state)
        torch.testing.assert_close(seen[:, :CHANNELS], state.features.mean((2, 3)))
        assert torch.equal(seen[:, CHANNELS:-4], F.one_hot(task, TASKS).float())
        likely = backbone.table[task, layer].log_softmax(1)
        torch.testing.assert_close(seen[:, -4:], likely.clamp_min(LEAST))
        assert (likely < LEAST).any() and (likely > LEAST).any()
        (state,) = backbone.advance(state, torch.arange(7) % 4)
    router = PolicySpec.of("sequential", backbone, (0.01, 1.0), 8).build()
    for weight in (router.hidden.weight, router.hidden.bias, router.head.weight):
        weight.zero_()
    walk = backbone.run(inputs, router.chooser(backbone, 0.1))
    assert torch.equal(walk.route, backbone.table.argmax(2)[task])
    untold = RoutingNet((1, 12, 12), channels=CHANNELS, layers=2, kernels=KERNELS)
    assert untold.suggested == 0 and untold.feature_width == CHANNELS


def test_the_best_table_is_found_within_each_budget():
    """The targets are what the network says along one route for each task, which no other table reaches."""
    backbone, (inputs, task) = network(), told(300)
    secret = torch.tensor([[2, 3], [3, 1], [0, 2]])
    with torch.no_grad():
        targets = backbone(inputs, secret[task])
    split = Split(inputs, targets, Regression.of(targets))
    policy_for = fit_table(backbone, split)
    best = policy_for(1.0)
    assert isinstance(best, TablePolicy) and torch.equal(best.table, secret)
    assert score(RoutedModel(backbone, best), split).metric == pytest.approx(0, abs=1e-9)
    for budget in (0.9, 0.6, 0.4):
        if (policy := policy_for(budget)) is not None:
            assert score(RoutedModel(backbone, policy), split).macs_fraction <= budget + 1e-6
    assert policy_for(0.01) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers of at least 1"),
        ({"kernels": (3,)}, "at least two modules"),
        ({"kernels": (3, 1)}, "from small to large"),
        ({"kernels": (0, 2)}, "odd sizes"),
        ({"image_channels": 0}, "1 to 5 image_channels, got 0"),
        ({"image_channels": 6}, "1 to 5 image_channels, got 6"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        network(**settings)


def test_each_task_sees_the_digits_in_its_own_way():
    data = load_dataset("digit-tasks")
    for split in (data.train, data.validation, data.test):
        images, task = data.raw(split.inputs), split.difficulty["task"].long()
        assert torch.equal(images[:, 1:].amax((2, 3)).argmax(1), task)
        back = [lambda x: x, *(lambda x, k=k: torch.rot90(x, -k, (1, 2)) for k in (1, 2, 3)), lambda x: x.flip(2)]
        shown = []
        for k in range(5):
            upright = back[k](images[task == k, 0]).mul(1e3).round().flatten(1).tolist()
            shown.append(sorted(zip(upright, split.targets[task == k].tolist(), strict=True)))
        assert all(one == shown[0] for one in shown), "the same digits in each view"
