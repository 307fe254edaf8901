"""Layers that differ from row to row against their papers' formulas, and blocks of residual networks made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dynrl.backbones import CellResNet, ExitResNet, SkipResNet, SlimmableResNet, load_backbone
from dynrl.backbones.layers import DynamicReLU, GivenConv2d, MixedConv2d, PredictedConv2d, SqueezeExcitation
from dynrl.cost import count_macs
from tests.cases import trained

ROWS, SHAPE = 5, dict(input_shape=(2, 8, 8), classes=4, layers=(2, 1), widths=(6, 10))
KINDS = [
    {"attention": "squeeze"}, {"activation": "dynamic"}, {"kernels": "mixed"},
    {"kernels": "predicted", "attention": "squeeze", "activation": "dynamic", "block": "bottleneck"}, {"factors": 1},
]  # fmt: skip


def squeezed(layer, x):
    weight = torch.sigmoid(layer.second.weight @ F.relu(layer.first(x.mean((1, 2)))) + layer.second.bias)
    return x * weight.view(-1, 1, 1)


def dynamic(layer, x):
    """Equations 3 and 4 of the paper, channel by channel, with the numbers of its section 3.2."""
    theta = (2 * torch.sigmoid(layer.second(F.relu(layer.first(x.mean((1, 2)))))) - 1).view(4, len(x))
    a, b = [1.0 + 1.0 * theta[0], 0.0 + 1.0 * theta[1]], [0.5 * theta[2], 0.5 * theta[3]]
    lines = [[a[k][c] * x[c] + b[k][c] for k in (0, 1)] for c in range(len(x))]
    return torch.stack([torch.max(*of) for of in lines])


def mixed(layer, x):
    share = torch.sigmoid(layer.router(x.mean((1, 2))))
    kernels = layer.weight.view(len(share), layer.out_channels, len(x), layer.kernel, layer.kernel)
    weight = sum(a * w for a, w in zip(share, kernels, strict=True))
    return F.conv2d(x, weight, stride=layer.stride, padding=weight.shape[-1] // 2)


def predicted(layer, x):
    numbers = torch.sigmoid(layer.second(layer.first(x.mean((1, 2))))).view(-1, 2)
    kernels = layer.weight.view(2, len(numbers), len(x), layer.kernel, layer.kernel)
    weight = torch.stack([sum(numbers[k, m] * kernels[m, k] for m in (0, 1)) for k in range(len(numbers))])
    return F.conv2d(x, weight, stride=layer.stride, padding=weight.shape[-1] // 2)


def given(layer, x):
    """The weights are those of two linear layers; the factor is the same number in all places."""
    factor = x[-3:, 2, 1]
    hidden = F.relu(layer.first.weight @ factor + layer.first.bias)
    weight = (layer.second.weight @ hidden + layer.second.bias).view(layer.out_channels, 6, layer.kernel, layer.kernel)
    return F.conv2d(x[:6], weight, stride=layer.stride, padding=weight.shape[-1] // 2)


LAYERS = {
    "squeeze": (lambda: SqueezeExcitation(9), squeezed),
    "dynamic": (lambda: DynamicReLU(9), dynamic),
    "mixed": (lambda: MixedConv2d(9, 7, 3, 2), mixed),
    "mixed 1x1": (lambda: MixedConv2d(9, 4, 1, kernels=3), mixed),
    "predicted": (lambda: PredictedConv2d(9, 7, 3, 2), predicted),
    "given": (lambda: GivenConv2d(9, 7, 3, 2, factors=3), given),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_each_row_gets_what_the_formula_says_and_its_macs_are_counted(name):
    make, formula = LAYERS[name]
    layer, x = make(), torch.randn(ROWS, 9, 6, 5)
    x[:, 6:] = x[:, 6:, :1, :1]  # the last channels may be a factor, one number each
    expected = torch.stack([formula(layer, row) for row in x])
    for given in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(layer(given), expected, atol=1e-5, rtol=1e-5)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * ROWS * count_macs(layer, (9, 6, 5))[0] > 0


@pytest.mark.parametrize("kinds", KINDS)
def test_rows_alone_together_by_gates_and_for_inference_are_one_and_all_weights_learn(kinds):
    torch.manual_seed(0)
    backbone = trained(SkipResNet(**SHAPE, **kinds))
    inputs, route = torch.randn(ROWS, 2, 8, 8), torch.randint(0, 2, (ROWS, backbone.columns))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        walk = backbone.run_route(inputs, route)
    assert counter.get_total_flops() == 2 * int(walk.macs.sum())
    alone = torch.cat([backbone(inputs[i : i + 1], route[i : i + 1]) for i in range(ROWS)])
    gated = backbone(inputs, F.one_hot(route, 2).float())
    fast = backbone.for_inference().for_inference()(inputs, route)
    for got in (walk.outputs, gated, fast):
        torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)
    backbone.train()(inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


@pytest.mark.parametrize("family", [SkipResNet, ExitResNet, SlimmableResNet, CellResNet])
@torch.no_grad()
def test_any_residual_network_takes_a_factor_and_hears_of_it_by_its_first_weights_only(family, tmp_path):
    torch.manual_seed(0)
    own = {"exits": (0,)} if family is ExitResNet else {}
    backbone = trained(family(**(SHAPE | {"input_shape": (5, 8, 8)}), **own, factors=3))
    inputs, route = torch.randn(ROWS, 5, 8, 8), torch.randint(0, backbone.num_choices, (ROWS, backbone.columns))
    with FlopCounterMode(display=False) as counter:
        walk = backbone.run_route(inputs, route)
    assert counter.get_total_flops() == 2 * int(walk.macs.sum())
    backbone.save(tmp_path / "backbone.safetensors")
    again, _ = load_backbone(tmp_path / "backbone.safetensors")
    inputs[:, 2:] = inputs[:, 2:, :1, :1]  # as a factor is meant to be: elsewhere, its channels are not looked at
    for network in (again, backbone.for_inference()):
        torch.testing.assert_close(network(inputs, route), walk.outputs, atol=1e-4, rtol=1e-4)
    inputs[0, 2:] += 1
    changed = (backbone(inputs, route) != walk.outputs).any(1)
    assert changed[0] and not backbone.exports and "kernels" not in backbone.captures
    with pytest.raises(ValueError, match="expected factors of at least 0 and below 2"):
        family(**SHAPE, **own, factors=2)


@torch.no_grad()
def test_a_block_is_made_of_the_layers_of_its_settings():
    torch.manual_seed(0)
    backbone = trained(SkipResNet(**SHAPE, attention="squeeze", activation="dynamic", kernels="mixed"))
    block, x = backbone._blocks[0], torch.randn(ROWS, 6, 8, 8)

    def by_rows(formula, layer, x):
        return torch.stack([formula(layer, row) for row in x])

    y = by_rows(dynamic, block.activations[0], block.bn1(by_rows(mixed, block.conv1, x)))
    y = by_rows(squeezed, block.attention, block.bn2(by_rows(mixed, block.conv2, y)))
    torch.testing.assert_close(block(x), F.relu(x + y), atol=1e-5, rtol=1e-5)


def test_a_file_brings_such_a_network_back_and_that_of_a_plain_one_says_nothing_of_it(tmp_path):
    backbone = ExitResNet(**SHAPE, exits=(0,), kernels="mixed").eval()
    backbone.save(tmp_path / "backbone.safetensors")
    again, _ = load_backbone(tmp_path / "backbone.safetensors")
    inputs = torch.randn(ROWS, 2, 8, 8)
    torch.testing.assert_close(again(inputs), backbone(inputs))
    assert "kernels" not in again.captures and not again.exports
    plain = ExitResNet(**SHAPE, exits=(0,))
    assert "kernels" not in plain.config and "factors" not in plain.config and plain.exports


@pytest.mark.parametrize("name", ["attention", "activation", "kernels"])
def test_unknown_layers_are_refused_and_all_others_where_blocks_run_in_parts(name):
    with pytest.raises(ValueError, match=f"unknown {name} 'other'"):
        SkipResNet(**SHAPE, **{name: "other"})
    kind = {"attention": "squeeze", "activation": "dynamic", "kernels": "mixed"}[name]
    for family in (SlimmableResNet, CellResNet):
        with pytest.raises(ValueError, match="expected plain blocks"):
            family(**SHAPE, **{name: kind})
