"""The choice between whole models, beyond what every backbone is tested for."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynrl
from dynrl.backbones import END, ExitResNet, Members, Models, Resolutions, SkipResNet, load_backbone
from dynrl.data import Augmentation, Dataset, Split
from dynrl.ops.exit_scores import exit_scores
from dynrl.policies import StaticPolicy
from dynrl.pretraining import Recipe, pretrain

SHAPE = (1, 16, 16)


def network(width: int) -> nn.Module:
    """A network as a user has it, on images of any size."""
    norm = nn.BatchNorm2d(width)
    nn.init.normal_(norm.running_mean, std=0.1)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 5),
    ).eval()  # fmt: skip


def models(sizes=None) -> Models:
    torch.manual_seed(1)
    return Models([network(2), network(3), network(8)], SHAPE, sizes)


@pytest.mark.parametrize("sizes", [None, (8, 16, 16)])
@torch.no_grad()
def test_each_row_gets_the_answer_of_the_last_model_it_asked_and_pays_for_all(sizes):
    """Every route, row by row, with the models called by hand."""
    backbone = models(sizes)
    inputs = torch.randn(16, *SHAPE)
    seen = [inputs if size in (None, 16) else F.interpolate(inputs, (size, size), mode="bilinear", antialias=True)
            for size in sizes or [None] * 3]  # fmt: skip
    said = [model(images) for model, images in zip(backbone.members, seen, strict=True)]
    macs = backbone.costs[0].tolist()
    assert macs == [2 * 9 * (64 if sizes else 256) + 40, 3 * 9 * 256 + 60, 8 * 9 * 256 + 160]
    routes = torch.tensor([*product(range(3), repeat=3)])[:16]
    walk = backbone.run_route(inputs, routes)
    for row, route in enumerate(routes.tolist()):
        at, asked = route[0], [route[0]]
        while at < 2 and (step := min(route[at + 1], 2 - at)):
            at += step
            asked.append(at)
        torch.testing.assert_close(walk.outputs[row], said[at][row])
        assert int(walk.macs[row]) == sum(macs[k] for k in asked)
    assert backbone.dense_macs == macs[2]


def test_models_whose_rows_see_each_other_are_refused():
    def normed(**settings):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, **settings), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
        )

    networks = [network(2), normed(), normed(track_running_stats=False)]
    for each in networks:
        each(torch.randn(2, *SHAPE))
    Models(networks[:2], SHAPE)
    with pytest.raises(ValueError, match="expected what model 1 returns for an input to depend on that input only"):
        Models(networks[::2], SHAPE)


@torch.no_grad()
def test_a_model_runs_once_a_walk_on_all_rows_that_ask_it():
    """Wherever they come from; a walk step by step runs it as often as rows come, and says the same."""
    backbone, inputs, calls = models(), torch.randn(27, *SHAPE), []
    routes = torch.tensor([*product(range(3), repeat=3)])
    for k, model in enumerate(backbone.members):
        model.register_forward_hook(lambda _, given, __, k=k: calls.append((k, len(given[0]))))
    walk = backbone.run_route(inputs, routes)
    asked = (walk.route[:, 0] == 0, (walk.route[:, 0] == 1) | (walk.route[:, 1] == 1))
    assert calls[:2] == [(0, 9), (1, int(asked[1].sum()))] and [k for k, _ in calls] == [0, 1, 2]
    state = backbone.begin(inputs)
    pending, alone = [state], state.walk
    while pending:
        at = pending.pop()
        pending += [reached for reached in backbone.advance(at, at.along(routes)) if reached.point != END]
    assert len(calls) > 6
    for name in ("outputs", "route", "macs"):
        torch.testing.assert_close(getattr(alone, name), getattr(walk, name))


@torch.no_grad()
def test_what_a_policy_is_told_of_the_answers():
    backbone = models()
    inputs = torch.randn(7, *SHAPE)
    state = backbone.begin(inputs)
    first = backbone.observe(state)
    assert not first[:, :7].any()
    cells = F.adaptive_avg_pool2d(inputs, 4).flatten(1)
    torch.testing.assert_close(first[:, 7:], torch.cat([cells, inputs.flatten(1).std(1, correction=0).unsqueeze(1)], 1))
    (state,) = backbone.advance(state, torch.zeros(7, dtype=torch.int64))
    weak, strong = (model(inputs) for model in backbone.members[:2])
    torch.testing.assert_close(backbone.observe(state)[:, :3], exit_scores(weak))
    assert not backbone.observe(state)[:, 3:7].any()
    *ended, state = sorted(backbone.advance(state, torch.tensor([1, 0, 1, 1, 2, 1, 1])), key=lambda of: of.point)
    assert [of.rows.tolist() for of in ended if of.point == END] == [[1], [4]]
    rows = state.rows
    agreed = weak[rows].softmax(1).gather(1, strong[rows].argmax(1, keepdim=True))
    torch.testing.assert_close(
        backbone.observe(state)[:, :7], torch.cat([exit_scores(strong[rows]), exit_scores(weak[rows]), agreed], 1)
    )
    assert state.point == 2


def test_models_are_trained_each_alone():
    """The plain network is the last one; the others learn afterwards, and nothing of one moves another."""
    torch.manual_seed(0)
    backbone, inputs = models(), torch.randn(64, *SHAPE)
    split = Split(inputs, (inputs.mean((1, 2, 3)) > 0).long())
    data = Dataset("signs", 5, split, split, split, Augmentation())
    recipe = Recipe(epochs=1, batch_size=32)

    def moved(random_routes):
        before = [{n: t.clone() for n, t in model.state_dict().items()} for model in backbone.members]
        pretrain(backbone, data, recipe, random_routes=random_routes)
        after = [model.state_dict() for model in backbone.members]
        return [any(not torch.equal(old[n], new[n]) for n in old) for old, new in zip(before, after, strict=True)]

    assert moved(False) == [False, False, True]
    assert moved(True) == [True, True, False]


def test_one_network_at_several_sizes_has_statistics_for_each():
    """All else is shared, and statistics are those of the images at that size."""
    module, images = network(6), torch.randn(600, *SHAPE)
    backbone = Models.at_sizes(module, SHAPE, (4, 8, 16), images)
    kernels, norms = [m[0].weight for m in backbone.members], [m[1] for m in backbone.members]
    assert all(kernel is kernels[0] for kernel in kernels) and kernels[0] is not module[0].weight
    for norm, size in zip(norms, (4, 8, 16), strict=True):
        seen = images if size == 16 else F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        torch.testing.assert_close(norm.running_mean, module[0](seen).mean((0, 2, 3)), atol=0.02, rtol=0.02)
        assert not norm.training and norm.momentum == module[1].momentum
    assert float((norms[0].running_var - norms[2].running_var).abs().max()) > 0.1
    assert len(list(backbone.parameters())) == 3 + 2 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_images_of_fewer_bits_are_resized_too(dtype):
    backbone, inputs = models((8, 12, 16)), torch.randn(4, *SHAPE)
    said = [backbone.run_route(inputs, torch.tensor([[k, 0, 0]] * 4)).outputs for k in range(3)]
    backbone.to(dtype)
    for k, expected in enumerate(said):
        outputs = backbone.run_route(inputs.to(dtype), torch.tensor([[k, 0, 0]] * 4)).outputs
        assert outputs.dtype is dtype
        torch.testing.assert_close(outputs.float(), expected, atol=0.05, rtol=0.05)


class NormAndReLU(nn.BatchNorm2d):
    """As timm has it."""

    def forward(self, x):
        return super().forward(x).relu()


@torch.no_grad()
def test_norms_that_do_more_are_left_as_they_are():
    modules, inputs = [network(2), network(8)], torch.randn(5, *SHAPE)
    for module in modules:
        norm, module[2] = NormAndReLU(len(module[1].weight)), nn.Identity()
        norm.load_state_dict(module[1].state_dict())
        module[1] = norm.eval()
    for k, model in enumerate(modules):
        plugged = dynrl.plug(Models(modules, SHAPE), StaticPolicy((k, 0)))
        torch.testing.assert_close(plugged(inputs), model(inputs))


RESNET = {"family": "skip_resnet", "layers": [1, 1], "widths": [4, 8]}


def test_resolutions_are_one_network_trained_at_all_sizes(tmp_path):
    """At each size it is the network that its file's weights make alone; only batch norm differs between sizes."""
    torch.manual_seed(0)
    backbone, inputs = Resolutions(SHAPE, 5, RESNET, (8, 16)), torch.randn(64, *SHAPE)
    split = Split(inputs, (inputs.mean((1, 2, 3)) > 0).long())
    pretrain(backbone, Dataset("signs", 5, split, split, split, Augmentation()), Recipe(epochs=2, batch_size=32))
    small, large = (model.state_dict() for model in backbone.members)
    differ = {name for name in small if not torch.equal(small[name], large[name])}
    assert differ == {name for name in small if ".bn" in name or "bn1" in name or "downsample.1" in name} - {
        name for name in small if "num_batches" in name
    }
    backbone.save(tmp_path / "sizes.safetensors")
    loaded, _ = load_backbone(tmp_path / "sizes.safetensors")
    assert loaded.members[0].conv1.weight is loaded.members[1].conv1.weight
    for k, size in enumerate((8, 16)):
        alone = SkipResNet((1, size, size), 5, layers=(1, 1), widths=(4, 8)).eval()
        alone.load_state_dict(backbone.members[k].state_dict())
        seen = inputs if size == 16 else F.interpolate(inputs, (size, size), mode="bilinear", antialias=True)
        plugged = dynrl.plug(loaded, StaticPolicy((k, 0)))
        torch.testing.assert_close(plugged(inputs), alone(seen), atol=1e-4, rtol=1e-4)
        assert plugged.last_route.macs.tolist() == [alone.dense_macs] * 64


def test_folders_join_to_one_backbone(tmp_path):
    """Cheap to dear, with the weights they were trained to."""
    networks = [SkipResNet(SHAPE, 5, layers=(1,), widths=(width,)).eval() for width in (8, 4)]
    joined = Members.joined(networks)
    inputs = torch.randn(6, *SHAPE)
    joined.save(tmp_path / "joined.safetensors")
    loaded, _ = load_backbone(tmp_path / "joined.safetensors")
    for k, model in enumerate(reversed(networks)):
        plugged = dynrl.plug(loaded, StaticPolicy((k, 0)))
        torch.testing.assert_close(plugged(inputs), model(inputs), atol=1e-5, rtol=1e-5)
        assert plugged.last_route.macs.tolist() == [model.whole_macs] * 6
    with pytest.raises(ValueError, match="models of one data set, got inputs and outputs"):
        Members.joined([networks[0], SkipResNet((1, 8, 8), 5, layers=(1,), widths=(4,))])
    with pytest.raises(ValueError, match="expected one folder with a backbone of 'skip', got 2"):
        SkipResNet.joined(networks)


def test_models_are_in_the_order_of_what_each_costs_alone():
    """A walk through the network with exits costs more than the other network; alone it has no exits, and costs less.

    Files of earlier versions have the order of the walks.
    """
    shape = {"layers": (2, 1), "widths": (4, 8)}
    exits = ExitResNet(SHAPE, 5, exits=(0, 1), **shape).eval()
    other = SkipResNet(SHAPE, 5, attention="squeeze", **shape).eval()
    assert exits.dense_macs > other.dense_macs
    assert [type(member) for member in Members.joined([other, exits]).members] == [ExitResNet, SkipResNet]
    settings = [
        {"family": "skip_resnet", "attention": "squeeze", **shape},
        {"family": "exit_resnet", "exits": (0, 1), **shape},
    ]
    for order in (settings, settings[::-1]):
        posed = Members(SHAPE, 5, tuple(order))
        alone = {SkipResNet: other.dense_macs, ExitResNet: exits.dense_macs - 2 * 4 * 16 * 5}
        assert posed.costs[0].tolist() == [alone[type(member)] for member in posed.members]
    with pytest.raises(ValueError, match="from cheap to dear"):
        Members(SHAPE, 5, (RESNET, {**RESNET, "widths": [2, 4]}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Models([network(2)], SHAPE), "at least two models"),
        (lambda: Models([network(8), network(2)], SHAPE), "from cheap to dear"),
        (lambda: Models([network(2), nn.Sequential(network(8), nn.Linear(5, 4))], SHAPE), r"got \[\(5,\), \(4,\)\]"),
        (lambda: Models([network(2), network(8)], SHAPE, classes=3), r"outputs \[batch, 3\]"),
        (lambda: Models([network(2), network(8)], SHAPE, (8,)), "a size of images for each of 2 models"),
        (lambda: Members(SHAPE, 5, ({"family": "nosuch"},)), r"members\[0\].family: expected one of"),
        (lambda: Members(SHAPE, 5, ({"family": "skip_resnet", "wide": 3},)), r"members\[0\].wide: unknown setting"),
        (lambda: Resolutions(SHAPE, 5, {}, (8, 16)), r"network.family: expected one of"),
        (lambda: Resolutions(SHAPE, 5, RESNET, (16,)), "at least two models"),
        (
            lambda: Resolutions(SHAPE, 5, {**RESNET, "family": "exit_resnet", "exits": [0]}, (2, 16)),
            "weights are the same at all sizes",
        ),
    ],
)  # fmt: skip
def test_models_that_do_not_go_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_alone_is_a_route_that_reports_show():
    names = [name for name, _ in models().constant_routes()]
    assert names == ["model 2 alone", "model 1 alone", "model 0 alone"]
