"""Modules of a user's own as backbones; the invariants of the walk are in test_walk."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dynrl
from dynrl.backbones import (
    FAMILIES,
    ExitModule,
    ExitResNet,
    SkipGRU,
    SkipLSTM,
    SkipModule,
    SkipResNet,
    SlimmableResNet,
    load_backbone,
)
from dynrl.cost import count_macs
from dynrl.policies import StaticPolicy
from tests.toys import Bottle, Convolutional, Transformer

SHAPE = (1, 8, 8)
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def images(rows=5):
    return torch.randn(rows, *SHAPE)


@pytest.mark.parametrize(
    ("family", "module", "names"),
    [
        (SkipModule, Transformer, BLOCKS), (SkipModule, Convolutional, ["stage1.2"]),
        (ExitModule, Transformer, BLOCKS[:1]), (ExitModule, Convolutional, ["stage1", "stage2"]),
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_full_route_is_the_module_by_its_own_weights(family, module, names):
    module = module().eval()
    backbone, x = family(module, SHAPE, names), images()
    torch.testing.assert_close(backbone(x), module(x), atol=0, rtol=0)
    plugged = dynrl.plug(backbone, StaticPolicy(backbone.full_route))
    torch.testing.assert_close(plugged(x), module(x))
    for parameter in module.parameters():
        parameter.mul_(1.5)
    torch.testing.assert_close(backbone(x), module(x), atol=0, rtol=0)
    assert not torch.allclose(plugged(x), module(x))


@torch.no_grad()
def test_skipped_blocks_are_left_out_and_inputs_stay_as_they_are():
    module = Convolutional().eval()
    backbone, x = SkipModule(module, SHAPE, ["stage1.1", "stage2.2"]), images()
    kept = x.clone()
    shorter = copy.deepcopy(module)
    shorter.stage1[1] = nn.Identity()
    torch.testing.assert_close(backbone(x, torch.tensor([[0, 1]]).expand(5, -1)), shorter(x))
    assert torch.equal(x, kept)
    first = nn.Sequential(nn.Sequential(Bottle(1, 1)), nn.Flatten(), nn.Linear(64, 2)).eval()
    SkipModule(first, SHAPE, ["0.0"])(x, torch.tensor([[1], [0], [1], [0], [0]]))
    assert torch.equal(x, kept), "the block's input is the user's tensor"


class Reshaped(nn.Module):
    """What stands before the first block hands on the very memory of its input."""

    def __init__(self, lead):
        super().__init__()
        self.lead, self.block = lead, Bottle(3, 3)
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))

    def forward(self, x):
        return self.out(self.block(self.lead(x)))


class Channels(nn.Module):
    def forward(self, x):
        return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("lead", "shape"), [(nn.Flatten(1, 2), (3, 1, 8, 8)), (Channels(), (3, 8, 8))])
@torch.inference_mode()
def test_views_of_the_inputs_are_not_written_to(lead, shape):
    backbone, x = SkipModule(Reshaped(lead).eval(), shape, ["block"]), torch.randn(6, *shape)
    if isinstance(lead, Channels):  # so laid out already: nothing is copied, though it is for the example
        x = x.contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    backbone.for_inference()(x, torch.tensor([[1], [0], [1], [0], [0], [1]]))
    assert torch.equal(x, kept)


class Placed(nn.Module):
    """A parameter that is no layer's stands before the block."""

    def __init__(self):
        super().__init__()
        self.place, self.block = nn.Parameter(torch.randn(1, 8, 8)), Bottle(1, 1)
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    def forward(self, x):
        return self.out(self.block(x + self.place))


@torch.no_grad()
def test_parameters_that_are_put_in_place_are_used():
    backbone, other, x = SkipModule(Placed().eval(), SHAPE, ["block"]), Placed().eval(), images()
    backbone.module.load_state_dict(other.state_dict())
    torch.testing.assert_close(backbone(x), other(x))
    other.place.mul_(3.0)
    backbone.load_state_dict(
        {f"module.{name}": value.clone() for name, value in other.state_dict().items()}, assign=True
    )
    torch.testing.assert_close(backbone(x), other(x))


def test_attention_is_counted():
    block, tokens, width = Transformer().blocks[0], 5, 8
    layers = sum(count_macs(layer, (tokens, width))[0] for layer in (block.qkv, block.out, block.mlp[0]))
    layers += count_macs(block.mlp[2], (tokens, 2 * width))[0]
    backbone = SkipModule(Transformer(), SHAPE, BLOCKS)
    assert backbone.costs[0].tolist() == [0, layers + 2 * tokens * tokens * width]


def test_training_mode_and_moves_reach_what_lies_between_the_blocks():
    backbone, x = SkipModule(Transformer(dropout=0.5), SHAPE, BLOCKS), images()
    assert torch.equal(backbone(x), backbone(x))
    backbone.train()
    assert not torch.equal(backbone(x), backbone(x)), "dropout in the forward of what holds the blocks"
    backbone.eval().double()
    torch.testing.assert_close(backbone(x.double()), backbone.module(x.double()))


def test_files_need_a_function_that_builds_the_module(tmp_path, monkeypatch):
    backbone = SkipModule(Transformer(), SHAPE, BLOCKS, family="my-vit")
    backbone.save(tmp_path / "mine.safetensors", note=1)
    with pytest.raises(ValueError, match=r"unknown backbone family 'my-vit'.*FAMILIES"):
        load_backbone(tmp_path / "mine.safetensors")
    monkeypatch.setitem(FAMILIES, "my-vit", lambda **config: SkipModule(Transformer(), family="my-vit", **config))
    loaded, notes = load_backbone(tmp_path / "mine.safetensors")
    assert (loaded.fingerprint(), notes) == (backbone.fingerprint(), {"note": 1})
    x = images()
    torch.testing.assert_close(loaded(x), backbone(x), atol=0, rtol=0)


def resnet():
    """With statistics as a trained network has them."""
    network = SkipResNet((1, 8, 8), 3, layers=(2, 2), widths=(4, 8)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    return network


@pytest.mark.parametrize(
    ("family", "settings"),
    [(SkipResNet, {}), (ExitResNet, {"exits": (0, 2)}), (SlimmableResNet, {"shares": (0.5, 1.0)})],
)
@torch.no_grad()
def test_a_resnet_becomes_a_family(family, settings):
    network, x = resnet(), images()
    backbone = family.from_module(network, SHAPE, **settings)
    torch.testing.assert_close(backbone(x), network(x))
    assert backbone.config["layers"] == network.config["layers"]
    assert all(backbone.config[name] == list(value) for name, value in settings.items())


@torch.no_grad()
def test_a_slimmable_copy_has_slices_of_the_batch_norms():
    network = resnet()
    block = SlimmableResNet.from_module(network, SHAPE, shares=(0.5, 1.0)).layer1[0]
    inner = network.layer1[0]
    assert torch.equal(block.bn1[0].running_var, inner.bn1.running_var[:2])
    assert torch.equal(block.bn2[0].running_var, inner.bn2.running_var)


class Squeezed(SkipResNet):
    def _head(self, x):
        return super()._head(x.sigmoid())


def test_what_is_no_resnet_is_refused():
    with pytest.raises(ValueError, match="Transformer is no ResNet with torchvision's names"):
        SkipResNet.from_module(Transformer(), SHAPE)
    with pytest.raises(ValueError, match="Squeezed has a ResNet's weights, but computes something else"):
        SkipResNet.from_module(Squeezed((1, 8, 8), 3, layers=(2,), widths=(4,)), SHAPE)
    more = resnet()
    more.layer1[0].attention = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"is no plain ResNet: it lacks \[\] and has \['layer1\.0\.attention"):
        SkipResNet.from_module(more, SHAPE)
    other = resnet()
    other.layer1[1].conv2 = nn.Conv2d(4, 4, 1, bias=False)
    with pytest.raises(ValueError, match="has other shapes than a ResNet of"):
        SkipResNet.from_module(other, SHAPE)


@torch.no_grad()
def test_a_trained_gru_becomes_a_backbone():
    gru, head, x = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 2), torch.randn(4, 7, 3)
    backbone = SkipGRU.from_module(gru, head, steps=7, sees="state+input")
    torch.testing.assert_close(backbone(x), head(gru(x)[0][:, -1]))
    assert backbone.sees_input
    for bad, match in ((nn.GRU(3, 5, 2), "of one layer"), (nn.LSTM(3, 5), "nn.LSTM for SkipLSTM")):
        with pytest.raises(ValueError, match=match):
            SkipGRU.from_module(bad, head, steps=7)
    with pytest.raises(ValueError, match="a linear head on 5 units"):
        SkipGRU.from_module(gru, nn.Linear(4, 2), steps=7)
    with pytest.raises(ValueError, match="unprojected"):
        SkipLSTM.from_module(nn.LSTM(3, 5, proj_size=2), head, steps=7)


class Odd(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner, self.head = how, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2)
        self.lstm = nn.LSTM(4, 4) if how == "recurrent" else None

    def forward(self, x, mask=None, scale=1):
        if mask is not None:
            x = x * mask
        if self.how == "decides" and x.sum() > 0:
            x = -x
        x = self.inner(x)
        if self.how == "repeats":
            x = self.inner(x)
        return (x, x) if self.how == "pair" else self.head(x) * scale


@pytest.mark.parametrize(
    ("how", "names", "message"),
    [
        ("", ["inner.2"], r"expected different names of parts.*'inner\.0'"),
        ("", [], "expected different names of parts"),
        ("", ["inner.0", "inner.0"], "expected different names of parts"),
        ("", ["inner.1", "inner.0"], r"in the order in which Odd runs them: \['inner\.0', 'inner\.1'\]"),
        ("repeats", ["inner.0"], "run 'inner.0' once for an input, it does so 2 times"),
        ("decides", ["inner.0"], "cannot be traced by torch.fx"),
        ("pair", ["inner.0"], "return one tensor, it returns tuple"),
        ("recurrent", ["inner.0"], r"the compute of \['lstm'\] cannot be counted"),
        ("", ["head"], r"keep their input's shape; 'head' makes \(1, 2\) of \(1, 4\)"),
    ],
)
def test_modules_that_cannot_be_cut_are_refused(how, names, message):
    with pytest.raises(ValueError, match=message):
        SkipModule(Odd(how), (4,), names)


def test_a_shortcut_around_a_part_is_refused():
    with pytest.raises(ValueError, match=r"such a part is no whole block; name the block that has its shortcut inside"):
        SkipModule(Convolutional(), SHAPE, ["stage1.1.norm"])


def test_options_have_their_defaults():
    module, x = Odd("").eval(), torch.randn(3, 4)
    torch.testing.assert_close(SkipModule(module, (4,), ["inner.0"])(x), module(x))


def test_two_inputs_are_refused():
    class Two(Odd):
        def forward(self, x, y):
            return self.head(self.inner(x + y))

    with pytest.raises(ValueError, match=r"expected Two\.forward to take one tensor"):
        SkipModule(Two(""), (4,), ["inner.0"])


def test_other_classes_than_said_are_refused():
    with pytest.raises(ValueError, match=r"outputs \[batch, 7\], got \(1, 3\)"):
        SkipModule(Transformer(), SHAPE, BLOCKS, classes=7)
