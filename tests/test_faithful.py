"""A user's module goes in as it computes, or is refused: whatever its forward does beside calling layers."""

from __future__ import annotations

import copy
import gc
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import dynrl
from dynrl.backbones import ExitModule, ExpertModule, SkipModule, SkipResNet
from dynrl.backbones.modes import Modes
from dynrl.plans import plan
from dynrl.policies import PolicySpec, StaticPolicy
from tests.cases import make_policy
from tests.toys import Bottle

SHAPE = (3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(Bottle(4, 4), Bottle(4, 4))
        self.head = nn.Linear(256, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).flatten(1))


BLOCKS = ["blocks.0", "blocks.1"]


def images(rows=5):
    return torch.randn(rows, *SHAPE)


def plugged(backbone):
    return dynrl.plug(backbone, StaticPolicy(backbone.full_route))


def drawn_norms(module):
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
    return module.eval()


# what stands around the forward


def _pre_hook(net):
    net.register_forward_pre_hook(lambda module, given: ((given[0] - 0.5) / 0.2,))


def _hook(net):
    net.register_forward_hook(lambda module, given, y: y.softmax(1))


@pytest.mark.parametrize("change", [_pre_hook, _hook])
@torch.no_grad()
def test_hooks_of_the_module_run_in_walks_too(change):
    net, x = Net().eval(), images()
    bare = net(x)
    change(net)
    backbone = SkipModule(net, SHAPE, BLOCKS)
    assert not torch.allclose(net(x), bare)
    torch.testing.assert_close(backbone(x), net(x))
    torch.testing.assert_close(plugged(backbone)(x), net(x))


def test_a_forward_that_was_set_on_the_module_is_not_passed_by():
    net = Net()
    net.forward = lambda x: Net.forward(net, x).softmax(1)
    with pytest.raises(ValueError, match=r"make a class of the forward that was set on \['Net'\]"):
        SkipModule(net, SHAPE, BLOCKS)


class Modal(Net):
    """The stem runs in a mode of its own."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        with self.mode():
            x = self.stem(x)
        return self.head(self.blocks(x.float()).flatten(1))


def half():
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def test_a_stem_under_autocast_stays_under_it():
    net, x = Modal(half).eval(), images()
    backbone = SkipModule(net, SHAPE, BLOCKS)
    torch.testing.assert_close(backbone(x), net(x), atol=0, rtol=0)
    full = Net().eval()
    full.load_state_dict(net.state_dict())
    assert not torch.equal(full(x), net(x))


def test_a_stem_without_gradients_is_not_trained():
    net = Modal(torch.no_grad)
    backbone = SkipModule(net, SHAPE, BLOCKS).train()
    backbone(images()).sum().backward()
    assert net.stem.weight.grad is None
    assert net.head.weight.grad is not None


class AllHalf(Net):
    def forward(self, x):
        with half():
            x = self.blocks(self.stem(x))
        return self.head(x.float().flatten(1))


@torch.no_grad()
def test_parts_under_autocast_leave_nothing_outside():
    net, x, outside = AllHalf().eval(), images(), Modes.now()
    backbone = SkipModule(net, SHAPE, BLOCKS)
    assert backbone.way == "in place"
    seen = []

    def choose(state):
        seen.append(Modes.now())
        return torch.ones_like(state.rows)

    torch.testing.assert_close(backbone.run(x, choose).outputs, net(x), atol=0, rtol=0)
    assert seen == [outside] * len(BLOCKS)
    given_up = backbone.begin(x)
    assert Modes.now() == outside
    with torch.autocast("cpu", torch.bfloat16):
        inside = Modes.now()
        del given_up
        gc.collect()
        assert Modes.now() == inside, "the forward that was given up ended its own autocast only"
    assert Modes.now() == outside


def test_a_forward_in_inference_mode_is_refused_and_left():
    class Frozen(Net):
        def forward(self, x):
            with torch.inference_mode():
                return super().forward(x)

    with pytest.raises(ValueError, match=r"use torch.no_grad\(\) there"):
        SkipModule(Frozen(), {"x": SHAPE}, BLOCKS)
    assert not torch.is_inference_mode_enabled()


def test_a_module_that_returns_more_in_training_runs_in_place():
    class Deep(Net):
        def forward(self, x):
            y = super().forward(x)
            return (y, y) if self.training else y

    net, x = Deep(), images()
    backbone = SkipModule(net, SHAPE, BLOCKS)
    assert backbone.way == "in place"
    assert "training" in backbone.why
    torch.testing.assert_close(backbone.train()(x), net(x)[0])
    assert not backbone.eval().training


class Jittered(Net):
    """This network scales its features by chance in training."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        x = self.stem(x)
        if self.training:
            x = x * (1 + self.draw())
        return self.head(F.dropout(self.blocks(x), 0.5, self.training).flatten(1))


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), random.random, np.random.rand])
def test_what_a_forward_draws_in_training_is_drawn_anew(draw):
    net, x = Jittered(draw), images()
    python, numbers = random.getstate(), torch.get_rng_state()
    backbone = SkipModule(net, SHAPE, BLOCKS)
    assert backbone.way == "in place" and "draws random numbers" in backbone.why
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), numbers)
    backbone.train().module.blocks.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", lambda x, *_: x)
        assert not torch.equal(backbone(x), backbone(x))


class Dropping(Net):
    """This network has layer drop: training leaves blocks out by chance."""

    def __init__(self, rate, draw=random.random):
        super().__init__()
        self.rate, self.draw, self.norm = rate, draw, nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            if self.training and self.draw() < self.rate:
                continue
            x = block(x)
        return self.head(x.flatten(1))


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand([]).item()])
@pytest.mark.parametrize("given", [SHAPE, {"x": SHAPE}])
def test_layer_drop_is_refused(draw, given):
    with pytest.raises(ValueError, match=r"Dropping did not run 'blocks\.\d'.*by chance.*rate of layer drop to 0"):
        SkipModule(Dropping(0.1, draw), given, BLOCKS)
    net = Dropping(0.0, draw)
    backbone, statistics = SkipModule(net, given, BLOCKS), copy.deepcopy(net.norm.state_dict())
    assert torch.equal(statistics["running_mean"], torch.zeros(4)) and statistics["num_batches_tracked"] == 0
    assert not net.training and backbone.way == "in place"
    net.rate = 1.0
    with pytest.raises(ValueError, match="rate of layer drop to 0"):
        backbone.train()(images() if given is SHAPE else {"x": images()})


# batch norms


class OneByOne(nn.Module):
    """This module calls the layers of a sequence one by one, with something between, and cannot be traced."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x):
        assert x.shape[1] == 4
        return x + self.body[1](F.gelu(self.body[0](x) * 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        return x + F.conv_transpose2d(y, self.conv.weight, padding=1)


class Reading(Tied):
    def forward(self, x):
        return x + self.norm(self.conv(x)) * self.norm.weight.sum()


class Hooked(Tied):
    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda module, given, y: y.relu())

    def forward(self, x):
        return x + self.norm(self.conv(x))


class Plain(Hooked):
    def __init__(self):
        super().__init__()
        self.conv._forward_hooks.clear()


@pytest.mark.parametrize("block", [OneByOne, Tied, Reading, Hooked])
@torch.no_grad()
def test_norms_are_folded_only_where_nothing_else_sees_the_layers(block):
    net, x = Net(), images()
    net.blocks = nn.Sequential(block(), Bottle(4, 4))
    backbone = SkipModule(drawn_norms(net), SHAPE, BLOCKS)
    torch.testing.assert_close(plugged(backbone)(x), net(x), atol=1e-4, rtol=1e-4)
    assert isinstance(backbone.for_inference().module.blocks[1].norm, nn.Identity), "the other block's is folded"


@torch.no_grad()
def test_norms_that_a_trace_does_not_show_to_be_read_are_kept():
    class Secret(Plain):
        def forward(self, x):
            return x + self.norm(self.conv(x)) + vars(self.conv)["_parameters"]["bias"].sum().item()

    net, x = Net(), images()
    net.blocks = nn.Sequential(Secret(), Bottle(4, 4))
    backbone = SkipModule(drawn_norms(net), SHAPE, BLOCKS)
    torch.testing.assert_close(plugged(backbone)(x), net(x), atol=1e-4, rtol=1e-4)
    net.blocks = nn.Sequential(Plain(), Bottle(4, 4))
    folded = SkipModule(drawn_norms(net), SHAPE, BLOCKS).for_inference()
    assert isinstance(folded.module.blocks[0].norm, nn.Identity)


# rows


class Words(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first) for _ in range(2)))
        self.head = nn.Linear(8, 2)

    def forward(self, ids):
        return self.head(self.blocks(self.embed(ids)).mean(1))


def test_tokens_that_see_those_of_other_rows_are_noticed():
    with pytest.raises(ValueError, match="mixes the rows"):
        SkipModule(Words(False), torch.ones(1, 6, dtype=torch.int64), BLOCKS)
    backbone = SkipModule(Words(True), torch.ones(1, 6, dtype=torch.int64), BLOCKS)
    ids = torch.randint(9, (5, 6))
    torch.testing.assert_close(backbone(ids), backbone.module(ids))


class Centred(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.share, self.inner = share, nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.inner(x)
        return x - self.share * x.mean(0, keepdim=True)


class NormedByBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


def normed_by_batch():
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, 2), NormedByBatch(), NormedByBatch()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("net", "shape", "part"),
    [(normed_by_batch(), (3, 128, 128), "1"), (nn.Sequential(Centred(0.002), nn.Linear(4, 2)), (4,), "0")],
)
def test_rows_that_see_a_little_of_each_other_are_noticed(net, shape, part):
    """Large images of one noise have the same mean and deviation, and a small share of a mean looks like rounding."""
    with pytest.raises(ValueError, match="mixes the rows"):
        SkipModule(net, shape, [part])


def test_a_forward_that_writes_into_its_inputs_is_refused():
    class Writing(Net):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    with pytest.raises(ValueError, match="writes into its inputs"):
        SkipModule(Writing(), SHAPE, BLOCKS)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts, self.top_k = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8) / 3), 2

    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).topk(self.top_k, -1)
        return sum(
            torch.einsum("...i,...ij->...j", x, self.experts[chosen[..., k]]) * weight[..., k : k + 1]
            for k in range(self.top_k)
        )


class MixtureBlock(nn.Module):
    def __init__(self, rows_first):
        super().__init__()
        self.mixture, self.rows_first = Mixture(), rows_first

    def forward(self, x):
        if self.rows_first:
            return x + self.mixture(x)
        return x + self.mixture(x.transpose(0, 1)).transpose(0, 1)


def mixtures(rows_first):
    return nn.Sequential(
        nn.Sequential(MixtureBlock(rows_first), MixtureBlock(rows_first)), nn.Flatten(), nn.LazyLinear(3)
    )


@pytest.mark.parametrize("tokens", [6, 5])
@torch.no_grad()
def test_mixtures_that_are_given_tokens_first_are_refused(tokens):
    ways = [mixtures(True), mixtures(False)]
    for net in ways:
        net(torch.randn(2, tokens, 8))
    ExpertModule(ways[0], (tokens, 8), ["0.0", "0.1"], layer="mixture", channels="last")
    with pytest.raises(ValueError, match="rows first"):
        ExpertModule(ways[1], (tokens, 8), ["0.0", "0.1"], layer="mixture", channels="last")


# copies and training


def test_a_module_that_keeps_what_it_computes_can_be_plugged():
    class Keeping(Bottle):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    net, x = Net().eval(), images()
    net.blocks[0] = Keeping(4, 4).eval()
    copy.deepcopy(net)
    torch.testing.assert_close(plugged(SkipModule(net, SHAPE, BLOCKS))(x), net(x))


def test_exits_before_layers_that_write_in_place_can_be_trained():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    backbone = ExitModule(net, SHAPE, ["0", "2"]).train()
    (answers,) = backbone.training_outputs(images(), torch.tensor(0.5))
    sum(answer.output.sum() for answer in answers).backward()
    assert backbone.heads[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_types_are_not_trained(dtype):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Bottle(4, 4), nn.Flatten(), nn.LazyLinear(10))
    net(torch.zeros(1, 1, 24, 24))
    with pytest.raises(ValueError, match=r"torch.float32.*got torch"):
        plan(SkipModule(net.to(dtype), (1, 24, 24), ["1"]), "digits")


def test_nested_tensors_are_named():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, layer = nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)

        def forward(self, ids, mask):
            return self.head(self.encoder(self.embed(ids), src_key_padding_mask=mask == 0).mean(1))

    examples = {"ids": torch.ones(2, 6, dtype=torch.int64), "mask": torch.ones(2, 6, dtype=torch.int64)}
    with pytest.raises(ValueError, match="enable_nested_tensor=False"):
        SkipModule(Encoder(), examples, ["encoder.layers.0", "encoder.layers.1"])


RUN = 1  # the choice that the untrained policy favours


def other_head(model):
    model.policy.head = copy.deepcopy(model.policy.head)
    model.policy.head.bias.mul_(-1)


EDITS = {
    "in place": lambda model: [parameter.mul_(-1.2) for parameter in model.parameters()],
    "by a vector": lambda model: vector_to_parameters(
        -parameters_to_vector(model.policy.parameters()), model.policy.parameters()
    ),
    "by a new parameter": lambda model: setattr(model.policy.head, "bias", nn.Parameter(-model.policy.head.bias)),
    "by a new layer": other_head,
    "by another policy": lambda model: setattr(model, "policy", make_policy(model.backbone, start=[1 - RUN])),
}


@torch.no_grad()
@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("edit", EDITS)
def test_weights_of_a_plugged_model_may_be_edited(edit, hidden):
    """What a router's tables are made of, too; a copy makes its own."""
    backbone, x = SkipResNet((3, 16, 16), layers=(1, 1), widths=(8, 16)), torch.randn(5, 3, 16, 16)
    model = dynrl.plug(backbone, make_policy(backbone, hidden=hidden, start=[RUN]))
    model(x)
    assert (model.last_route.actions == RUN).all()
    for _ in range(2):  # the second edit may find memory that the first one has left
        before = model.last_route.actions
        EDITS[edit](model)
        copied = copy.deepcopy(model)
        torch.testing.assert_close(model(x), copied(x))
        assert torch.equal(model.last_route.actions, copied.last_route.actions)
        assert edit == "by another policy" or not torch.equal(model.last_route.actions, before)


def test_a_network_of_token_ids_is_exported(tmp_path):
    net = nn.Sequential(nn.Embedding(9, 8), Rows(8), Rows(8), nn.Flatten(), nn.Linear(48, 2))
    backbone = SkipModule(net, torch.ones(2, 6, dtype=torch.int64), ["1", "2"])
    assert backbone.way == "traced"
    assert backbone.random_inputs(3).dtype is torch.int64
    model = dynrl.plug(backbone, PolicySpec.of("sequential", backbone, (0.01, 1.0), 8).build())
    model.export(tmp_path / "words.pt2")
    ids = torch.randint(9, (5, 6))
    torch.testing.assert_close(torch.export.load(tmp_path / "words.pt2").module()(ids), model(ids))


class Rows(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + self.inner(x).relu()
