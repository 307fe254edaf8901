"""Modules of a user's own as backbones; the invariants of the walk are in test_walk."""

from __future__ import annotations

import copy
from itertools import accumulate
from types import SimpleNamespace

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
from dynrl.backbones.module import ROUNDS
from dynrl.cost import count_macs
from dynrl.policies import StaticPolicy
from tests.exported import check_exported
from tests.toys import Bottle, Convolutional, Reader, Transformer

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


def test_what_an_expanded_buffer_holds_is_loaded():
    module = Transformer()
    module.register_buffer("scale", torch.rand(1, 3).expand(4, 3))
    backbone, kept = SkipModule(module, SHAPE, BLOCKS), module.scale.clone()
    other = Transformer()
    other.register_buffer("scale", torch.zeros(1, 3).expand(4, 3))
    SkipModule(other, SHAPE, BLOCKS).load_state_dict(backbone.state_dict())
    assert torch.equal(other.scale, kept)


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


class Normed(nn.Module):
    """Convolutions and batch norms that may be folded, and two that may not: a part lies between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.block, self.apart = Bottle(3, 3), nn.Conv2d(3, 3, 1)
        self.behind, self.head = nn.BatchNorm2d(3), nn.Linear(192, 2)

    def forward(self, x):
        x = self.apart(self.block(self.norm(self.stem(x)).relu()))
        return self.head(self.behind(x).flatten(1))


@torch.no_grad()
def test_batch_norms_are_folded_for_inference():
    module, x = Normed(), images()
    for norm in (module.norm, module.block.norm, module.behind):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
    backbone = SkipModule(module.eval(), SHAPE, ["block", "apart"])
    fast, route = backbone.for_inference(), torch.randint(0, 2, (5, 2))
    torch.testing.assert_close(fast(x, route), backbone(x, route))
    kept = [name for name, part in fast.module.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert kept == ["behind"] and isinstance(backbone.module.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_the_faster_memory_format_is_taken_and_found_once(last, monkeypatch):
    clock = accumulate([0, 2, 0, 1 if last else 3] * ROUNDS)  # both formats in turn, channels_last second
    monkeypatch.setattr("dynrl.backbones.module.time", SimpleNamespace(perf_counter=clock.__next__))
    monkeypatch.setattr("dynrl.backbones.module.LEAST_MACS", 0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 2)
    )
    backbone, x = SkipModule(network.eval(), SHAPE, ["1"]), images()
    for twin in (backbone.for_inference(), backbone.for_inference()):
        assert twin.module[1].weight.is_contiguous(memory_format=torch.channels_last) is last
        torch.testing.assert_close(twin(x), network(x))
    assert network[1].weight.is_contiguous() and next(clock, None) is None


class Heads(nn.Module):
    """Batch norm comes first, so that it cannot be folded, and channels are viewed as heads."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.BatchNorm2d(4), nn.Linear(2, 2)

    def forward(self, x):
        heads = self.norm(x).flatten(2).transpose(1, 2).reshape(x.shape[0], 64, -1, 2)
        y = self.mix(heads).view(x.shape[0], -1, 4).transpose(1, 2)
        return x + y.reshape(x.shape)


@pytest.mark.parametrize(
    ("kind", "file"), [(SkipModule, "model.pt2"), (ExitModule, "model.pt2"), (ExitModule, "model.onnx")]
)
def test_blocks_that_run_on_no_rows_are_exported(kind, file, tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), Heads(), Heads(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)]
    backbone = kind(nn.Sequential(*layers).eval(), SHAPE, ["1", "2"], channels="first")
    check_exported(backbone, images(66), tmp_path / file)


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
    with pytest.raises(ValueError, match=r"unknown family 'my-vit'.*FAMILIES"):
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
        if self.how == "decides" and x.sum() > 1e9:
            x = -x
        x = self.inner(x)
        if self.how == "repeats":
            x = self.inner(x)
        return (x, x) if self.how == "pair" else self.head(x) * scale


@pytest.mark.parametrize(
    ("how", "names", "message"),
    [
        ("", ["inner.2"], r"got 'inner\.2', which it does not have; names are such as .*'inner\.0'"),
        ("", [], r"expected a list of different names of parts of .* got \[\]"),
        ("", "inner.0", "got 'inner.0'; names are"),
        ("", [nn.Linear(4, 4)], "got something of type Linear; names are"),
        ("", ["inner.0", "inner.0"], "got 'inner.0' twice"),
        ("", ["inner", "inner.0"], "got 'inner.0', which lies inside 'inner'"),
        ("", ["inner.1", "inner.0"], r"in the order in which Odd runs them: \['inner\.0', 'inner\.1'\]"),
        ("repeats", ["inner.0"], "run 'inner.0' once for an input, it does so 2 times"),
        ("recurrent", ["inner.0"], r"the compute of \['lstm'\] cannot be counted"),
        ("", ["head"], r"keep their input's shape; 'head' makes \(1, 2\) of \(1, 4\)"),
    ],
)
def test_modules_that_cannot_be_cut_are_refused(how, names, message):
    with pytest.raises(ValueError, match=message):
        SkipModule(Odd(how), (4,), names)


class Mixing(nn.Module):
    """This network's answers depend on all rows, or it takes batches of one only."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.inner, self.head = way, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.inner(x)
        return self.head(x - x.mean(0) if self.way == "mean" else x.view(1, 4) if self.way == "one" else x[:1])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda x: x, "expected a torch module, .* got a function"),
        (Mixing, "got the class Mixing"),
        (Mixing("mean"), "expected what Mixing returns for an input to depend on that input only"),
        (Mixing("one"), r"Mixing fails on .*shape '\[1, 4\]' is invalid"),
        (
            Mixing("first"),
            r"expected Mixing to return a row for each input, got \(1, 2\) for one input and \(1, 2\) for",
        ),
    ],
)
def test_what_is_no_network_of_rows_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        SkipModule(module, (4,), ["inner"])


def test_a_shortcut_around_a_part_is_refused():
    with pytest.raises(
        ValueError, match=r"what 'stage1\.0' made before .*; name the block that has its shortcut inside"
    ):
        SkipModule(Convolutional(), SHAPE, ["stage1.1.norm"])


class Sized(nn.Module):
    """What it computes after its blocks takes more than their features: the number of rows, or what an input says."""

    def __init__(self, further):
        super().__init__()
        self.further, self.blocks = further, nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.place, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, x):
        rows, tokens, _ = x.shape
        known, y = self.head(x).mean(1), x + self.place
        for block in self.blocks:
            y = block(y)
            if self.further == "tokens":
                y = y / tokens + self.place
        said = self.head(y.reshape(rows, -1, 4).mean(1))
        return said + known if self.further == "input" else said


@pytest.mark.parametrize("further", ["rows", "tokens", "input"])
@torch.no_grad()
def test_sizes_and_what_the_inputs_say_may_pass_the_blocks_by(further):
    module, x, route = Sized(further).eval(), torch.randn(4, 5, 4), torch.tensor([[0, 1, 1], [1, 0, 0]]).repeat(2, 1)
    for kind in (SkipModule, ExitModule):
        backbone = kind(module, (5, 4), BLOCKS)
        assert backbone.way == "in place" and "made before 'blocks." in backbone.why
        torch.testing.assert_close(backbone(x), module(x))
        torch.testing.assert_close(backbone(x, route)[1:2], backbone(x[1:2], route[1:2]))


class Around(Sized):
    """The shortcuts of its parts are outside of them; the first one's is the input itself."""

    def forward(self, x):
        x = x * self.place if self.further == "features" else x
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("further", ["features", "input"])
@pytest.mark.parametrize("names", [BLOCKS, BLOCKS[:1]])
def test_shortcuts_around_parts_are_refused(further, names):
    with pytest.raises(ValueError, match=r"made before 'blocks\.\d' after it, too: .* has its shortcut inside"):
        SkipModule(Around(further), (5, 4), names)


def test_options_have_their_defaults():
    module, x = Odd("").eval(), torch.randn(3, 4)
    torch.testing.assert_close(SkipModule(module, (4,), ["inner.0"])(x), module(x))


class Pairs(nn.Module):
    """This network's block returns a pair, which torch.fx can trace."""

    class Block(nn.Linear):
        def forward(self, x, more=None):
            return x + super().forward(x), more

    def __init__(self):
        super().__init__()
        self.inner, self.head = self.Block(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x, _ = self.inner(x)
        return self.head(x)


class Two(Odd):
    def forward(self, x, y):
        return self.head(self.inner(x + y))


def test_what_the_module_cannot_take_is_told_with_its_own_words():
    with pytest.raises(ValueError, match=r"Two fails on inputs of shape \(4,\).*missing 1 required.*'y'.*by name if"):
        SkipModule(Two(""), (4,), ["inner.0"])
    with pytest.raises(ValueError, match=r"Reader fails on inputs of shape \(5,\).*examples.*token ids"):
        SkipModule(Reader(ids=True), (5,), BLOCKS)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Odd("decides"), "torch.fx cannot trace what holds 'inner.0' in Odd"), (Odd("pair"), "Odd.forward returns no tensor, but a tuple"),
        (Reader(), "torch.fx cannot trace"), (Odd(""), ""), (Pairs(), "'inner' returns a tuple"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_which_way_was_taken_and_why_can_be_asked(module, why):
    names, shape = {Odd: (["inner.0", "inner.1"], (4,)), Pairs: (["inner"], (4,)), Reader: (BLOCKS, (5, 8))}[
        type(module)
    ]
    backbone, x = SkipModule(module, shape, names), torch.randn(3, *shape)
    assert (backbone.way, backbone.exports) == (("in place", False) if why else ("traced", True))
    assert backbone.why.startswith(why)
    said = module(x)
    said = said["logits"] if isinstance(said, dict) else said[0] if isinstance(said, tuple) else said
    torch.testing.assert_close(backbone(x), said)


def test_other_classes_than_said_are_refused():
    with pytest.raises(ValueError, match=r"outputs \[batch, 7\], got \(1, 3\)"):
        SkipModule(Transformer(), SHAPE, BLOCKS, classes=7)


class Chain(nn.Module):
    """Blocks one after the other, and a head on the mean of each channel."""

    def __init__(self, block, channels, mean):
        super().__init__()
        self.mean, self.blocks = mean, nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(self.mean))


class Mixing(nn.Module):
    """A convolution over places, and linear layers over channels, which are last in between only."""

    def __init__(self, convolution, last):
        super().__init__()
        self.convolution, self.last = convolution, last
        self.mix = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x):
        if self.last:
            return x + self.convolution(self.mix(x).movedim(-1, 1)).movedim(1, -1)
        return x + self.mix(self.convolution(x).movedim(1, -1)).movedim(-1, 1)


LAID_OUT = {  # a block, the shape of its inputs, the dimensions of places, and the number of channels
    "signal": (lambda: nn.Conv1d(4, 4, 3, padding=1), (4, 40), 2, 4),
    "signal, normed first": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, padding=1)), (4, 40), 2, 4),
    "signal, mixed": (lambda: Mixing(nn.Conv1d(4, 4, 3, padding=1), False), (4, 40), 2, 4),
    "tokens": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (40, 4), 1, 4),
    "tokens, mixed": (lambda: Mixing(nn.Conv1d(4, 4, 3, padding=1), True), (40, 4), 1, 4),
    "tokens, as many as channels": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (4, 4), 1, 4),
    "video": (lambda: nn.Conv3d(4, 4, 3, padding=1), (4, 6, 8, 8), (2, 3, 4), 4),
    "maps": (lambda: Mixing(nn.Conv2d(4, 4, 3, padding=1), False), (4, 8, 6), (2, 3), 4),
    "maps with channels last": (lambda: Mixing(nn.Conv2d(4, 4, 3, padding=1), True), (8, 6, 4), (1, 2), 4),
}


@pytest.mark.parametrize("name", LAID_OUT)
@torch.inference_mode()
def test_routers_see_the_means_of_channels(name):
    block, shape, places, channels = LAID_OUT[name]
    module, x = Chain(block, channels, places).eval().requires_grad_(False), torch.randn(3, *shape)
    skips = SkipModule(module, shape, ["blocks.0", "blocks.1"])
    assert skips.feature_width == channels
    torch.testing.assert_close(skips.observe(skips.begin(x)), x.mean(places))
    exits = ExitModule(module, shape, ["blocks.0", "blocks.1"])
    torch.testing.assert_close(exits.observe(exits.begin(x))[:, 3:], module.blocks[0](x).mean(places))
    assert exits(x).shape == (3, 10) and exits.feature_width == 3 + channels


@pytest.mark.parametrize("kind", [SkipModule, ExitModule])
@pytest.mark.parametrize("backend", [True, False])
def test_frozen_attention_costs_what_it_costs_unfrozen(kind, backend):
    """Torch fuses frozen encoder layers into one op that its counter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(backend)
    try:
        module = Chain(lambda: nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 64, 1).eval()
        names = ["blocks.0", "blocks.1"]
        free = kind(module, (36, 64), names)
        frozen = kind(module.requires_grad_(False), (36, 64), names)
        assert torch.backends.mha.get_fastpath_enabled() is backend
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert torch.equal(frozen.costs, free.costs) and frozen.dense_macs == free.dense_macs
    if kind is SkipModule:
        assert frozen.costs.tolist() == [[0, 1935360], [640, 1936000]]


def through(function):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.other = nn.Parameter(torch.randn(4, 4, 4))

        def forward(self, x):
            return x + function(x, self)

    return Block


@pytest.mark.parametrize(
    ("block", "op"),
    [
        (through(lambda x, b: torch.fft.fft2(x).real), r"aten\._fft_"),
        (through(lambda x, b: (x @ b.weight[0]).unsqueeze(-1)), r"aten\.mv"),
        (through(lambda x, b: nn.functional.bilinear(x, x, b.other)), r"aten\._trilinear"),
        (through(lambda x, b: torch.cdist(x, b.weight.unsqueeze(0))), r"aten\._cdist"),
        (through(lambda x, b: x @ torch.linalg.matrix_exp(b.weight)), r"aten\.linalg_matrix_exp"),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_what_would_count_nothing_is_refused_by_name(block, op, frozen):
    module = Chain(block, 4, 1).eval().requires_grad_(not frozen)
    with pytest.raises(ValueError, match=f"FLOP counter knows, got {op}.*would count 0"):
        SkipModule(module, (5, 4), ["blocks.0", "blocks.1"])


def test_what_only_moves_numbers_or_is_no_product_counts_nothing():
    def block(x, b):
        y = torch.cat([x, x.flip(1)], 1)[:, :5].cumsum(1).softmax(2).sort(1).values.roll(1, 1)
        y = nn.functional.normalize(y, dim=2).index_fill(1, torch.tensor([0]), 1.0)
        y = torch.where(y > 0, y, b.weight[0]).clone()
        y[:, 0] = nn.functional.prelu(y[:, 1], b.weight[0, :1])
        return nn.functional.layer_norm(y, (4,), b.weight[0], b.weight[1])

    backbone = SkipModule(Chain(through(block), 4, 1).eval(), (5, 4), ["blocks.0", "blocks.1"])
    assert backbone.costs.tolist() == [[0, 0], [40, 40]]
