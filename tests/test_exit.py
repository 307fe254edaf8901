"""Early exit beyond what every backbone is tested for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dynrl.backbones import END, ExitResNet, SkipResNet, load_backbone
from dynrl.deploy import RoutedModel
from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.move import take_rows
from tests.cases import make_policy, trained

SHAPES = {
    "basic": dict(input_shape=(1, 16, 16), layers=(2, 1, 2), widths=(4, 8, 8), exits=(0, 3)),
    "bottleneck": dict(
        input_shape=(3, 32, 32),
        classes=7,
        block="bottleneck",
        layers=(1, 2),
        widths=(4, 8),
        stem="imagenet",
        exits=(1,),
    ),
}


def head(x, layer):
    """Means over 4x4 cells, where the map has as many pixels, each pixel's channels together."""
    count = min(4, x.shape[-1])
    edges = [(i * x.shape[-1] // count, -(-(i + 1) * x.shape[-1] // count)) for i in range(count)]
    return layer(torch.cat([x[:, :, a:b, c:d].mean((2, 3)) for a, b in edges for c, d in edges], 1))


def make(shape) -> ExitResNet:
    return trained(ExitResNet(**SHAPES[shape]))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_going_on_is_the_plain_resnet_and_stopping_is_its_first_part(shape):
    """Block after block by name, and the torchvision layout of a network without early exits."""
    backbone = make(shape)
    settings = {name: value for name, value in SHAPES[shape].items() if name != "exits"}
    plain = SkipResNet(**settings).eval()
    missing, unexpected = backbone.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing == [name for name in backbone.state_dict() if name.startswith("heads.")]
    inputs = torch.randn(6, *backbone.input_shape)
    x, said = backbone.maxpool(F.relu(backbone.bn1(backbone.conv1(inputs)))), []
    blocks = [block for name, stage in backbone.named_children() if name.startswith("layer") for block in stage]
    for i, block in enumerate(blocks):
        x = block(x)
        if i in backbone.config["exits"]:
            said.append(head(x, backbone.heads[len(said)]))
    said.append(backbone.fc(x.mean((2, 3))))
    for network in (backbone, backbone.for_inference()):
        for k, expected in enumerate(said):
            route = (torch.arange(backbone.max_steps) < k).long().expand(6, -1)
            torch.testing.assert_close(network(inputs, route), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(backbone(inputs), plain(inputs))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_each_exit_costs_what_ran_up_to_it(shape):
    backbone, before = make(shape), 0
    for k in range(backbone.max_steps + 1):
        route = (torch.arange(backbone.max_steps) < k).long().expand(1, -1)
        with FlopCounterMode(display=False) as counter:
            walk = backbone.run_route(torch.randn(1, *backbone.input_shape), route)
        assert 2 * int(walk.macs) == counter.get_total_flops() > before
        assert walk.route.tolist() == [[1] * k + [0] * (k < backbone.max_steps) + [-1] * (backbone.max_steps - k - 1)]
        before = counter.get_total_flops()
    assert int(walk.macs) == backbone.dense_macs


def test_training_outputs_are_those_of_all_exits():
    backbone, inputs = make("basic"), torch.randn(5, 1, 16, 16)
    (together,) = backbone.training_outputs(inputs, torch.rand(5))
    for k, answer in enumerate(together):
        route = (torch.arange(2) < k).long().expand(5, -1)
        torch.testing.assert_close(answer.output, backbone(inputs, route))
        assert answer.rows.tolist() == [0, 1, 2, 3, 4] and answer.weight == 1
    assert len(together) == 3
    ((full,),) = backbone.training_outputs(inputs, None)
    torch.testing.assert_close(full.output, backbone(inputs))


@torch.no_grad()
def test_an_exit_shows_how_sure_it_is_and_its_maps():
    backbone = make("basic").for_inference()
    state = backbone.begin(torch.randn(20, 1, 16, 16))
    going = torch.arange(20) % 3 > 0
    stopped, state = backbone.advance(state, going.long())
    assert stopped.point == END
    assert torch.equal(stopped.rows, (~going).nonzero().squeeze(1))
    seen = backbone.observe(state)
    torch.testing.assert_close(seen[:, :3], exit_scores(backbone.output(state)))
    assert backbone.output(state).shape == (13, 10)


@torch.no_grad()
def test_a_policy_may_see_scores_alone(tmp_path):
    backbone = trained(ExitResNet(**SHAPES["basic"], sees="scores"))
    inputs = torch.randn(5, *backbone.input_shape)
    backbone.save(tmp_path / "backbone.safetensors")
    again, _ = load_backbone(tmp_path / "backbone.safetensors")
    state = again.begin(inputs)
    assert torch.equal(again.observe(state), exit_scores(again.output(state)))
    policy = make_policy(again)
    torch.nn.init.normal_(policy.hidden.weight)
    torch.nn.init.normal_(policy.head.weight)
    walk = again.run(inputs, lambda state: policy.act(policy.sight.see(again, state, 1.0)).squeeze(1))
    model = RoutedModel(backbone, policy)
    model.set_price(1.0)
    assert torch.equal(model.walk(inputs).route, walk.route)
    assert "sees" not in make("basic").config
    with pytest.raises(ValueError, match=r"unknown sees 'all'; expected one of scores\+features, scores"):
        ExitResNet(**SHAPES["basic"], sees="all")


@torch.no_grad()
def test_no_rows_walk_to_the_end():
    backbone = make("basic")
    assert backbone(torch.zeros(0, 1, 16, 16), torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 10)


@torch.no_grad()
def test_rows_taken_keep_their_memory_format():
    index = torch.tensor([1, 3, 4])
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(6, 4, 5, 5).contiguous(memory_format=form)
        rows = take_rows(x, index)
        assert torch.equal(rows, x[index])
        assert rows.is_contiguous(memory_format=form)
    assert torch.equal(take_rows(x[:, 0, 0], index), x[index, 0, 0])


@pytest.mark.parametrize("exits", [(), (5,), (1, 1), (2, 0), (-1,), (4,)])
def test_bad_exits_are_refused(exits):
    with pytest.raises(ValueError, match=r"expected rising exits in 0\.\.3"):
        ExitResNet(**{**SHAPES["basic"], "exits": exits})
