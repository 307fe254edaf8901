"""torch.compile and torch.export carry the ops: one graph, new inputs, another batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.library import opcheck

from dynrl.backbones import ExitResNet, Models, SkipModule, SkipResNet, SlimmableResNet, Unrolled
from dynrl.deploy import RoutedModel
from dynrl.ops.gated_cell import gated_cell
from dynrl.ops.gated_positions import gated_positions
from dynrl.ops.partition import partition
from dynrl.ops.routed_linear import routed_linear
from dynrl.ops.sliced_conv import SlicedBlock, sliced_conv
from dynrl.ops.sliced_linear import SlicedLinear, sliced_linear
from dynrl.policies import StaticPolicy
from tests.cases import make_backbone, make_policy
from tests.exported import as_exported
from tests.ops_cases import Mixing, Told


class Everything(nn.Module):
    """The ops behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 12, 8))
        self.layer = SlicedLinear(nn.Linear(12, 16), nn.Linear(16, 36), (4, 8, 16))
        convolutions = [nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)]
        norms = [[nn.BatchNorm2d(width).eval() for width in (2, 4, 8)], [nn.BatchNorm2d(4).eval() for _ in range(3)]]
        self.block = SlicedBlock(convolutions, norms, (2, 4, 8))
        self.mix = Told(Mixing(4))
        self.cell = nn.GRUCell(36, 6)

    def forward(self, x, choice, update):
        y = sliced_linear(routed_linear(x, self.experts, partition(choice, 3)), choice, self.layer)
        y = sliced_conv(y.view(-1, 4, 3, 3), choice, self.block).flatten(1)
        tokens = y.view(-1, 9, 4)
        scores = tokens.mean(2)
        order = scores.argsort(1)
        y = gated_positions(tokens, choice, order, scores.sigmoid(), (0, 4, 9), self.mix).flatten(1)
        cell = self.cell
        return gated_cell(y, y[:, :6], update, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)


class Walk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = SkipResNet((1, 8, 8), layers=(2, 2), widths=(4, 8)).eval().for_inference()

    def forward(self, inputs, route):
        return self.backbone(inputs, route)


def arguments(module, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(module, Walk):
        steps = module.backbone.columns
        return torch.randn(rows, 1, 8, 8, generator=generator), torch.randint(0, 2, (rows, steps), generator=generator)
    choice = torch.randint(0, 3, (rows,), generator=generator)
    return torch.randn(rows, 8, generator=generator), choice, choice > 0


@pytest.fixture(autouse=True)
def _counts_may_be_data():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [Everything, Walk])
@torch.no_grad()
def test_compiled_in_one_graph(kind):
    module = kind().requires_grad_(False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, seed in ((9, 0), (9, 1), (14, 2)):
        given = arguments(module, rows, seed)
        torch.testing.assert_close(compiled(*given), module(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Everything, Walk])
@torch.no_grad()
def test_exported_for_any_batch_size(kind):
    module = kind().requires_grad_(False)
    given = arguments(module, 9)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(module, given, dynamic_shapes=tuple({0: batch} for _ in given)).module()
    for rows in (9, 5, 30):
        given = arguments(module, rows, rows)
        torch.testing.assert_close(exported(*given), module(*given), atol=1e-5, rtol=1e-5)


def inputs_for(backbone, rows):
    return torch.randn(rows, *backbone.input_shape) + 4 * torch.randn(rows, *[1] * len(backbone.input_shape))


class Network(nn.Sequential):
    """A user's own."""

    def __init__(self, width: int) -> None:
        layers = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Flatten()
        super().__init__(*layers, nn.Linear(16 * width, 10))


def decided(name, hidden=8):
    """A plugged model whose rows take routes of their own."""
    torch.manual_seed({"exit": 7}.get(name, 0))  # with these, its rows take more than two routes
    own = {
        "skip": lambda: SkipResNet((1, 8, 8), layers=(2, 2), widths=(4, 8)),
        "exit": lambda: ExitResNet((1, 8, 8), layers=(2, 2), widths=(4, 8), exits=(0, 1, 2)),
        "model": lambda: Models(
            [
                Network(4),
                SkipResNet((1, 4, 4), layers=(1,), widths=(4,)),
                SkipResNet((1, 8, 8), layers=(1,), widths=(8,)),
            ],
            (1, 8, 8),
            sizes=(4, 4, 8),
        ),
        "channel": lambda: SlimmableResNet((1, 8, 8), layers=(2,), widths=(32,)),
        "unroll": lambda: Unrolled((5, 8), hidden=6, steps=4),  # one point, in a loop
    }
    backbone = own[name]().eval() if name in own else make_backbone(name)
    router = make_policy(backbone, (0.01, 1.0), hidden)
    inputs = inputs_for(backbone, 64)
    with torch.no_grad():
        seen = torch.cat([router.sight.see(backbone, backbone.begin(inputs), price) for price in (0.01, 1.0)])
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
        scores = router._scores(seen)
        router.head.bias[1] += (scores[:, 0] - scores[:, 1]).median()  # so that half of the rows go each way at first
    return RoutedModel(backbone, router)


# An ONNX program is made from torch.export's, so each router is exported by torch.export, and once to ONNX.
KINDS = [(0, "model.pt2", (0.1,)), (8, "model.onnx", (1.0,))]
EXPORTED = [(name, *kind) for name in ("skip", "exit", "model", "unroll") for kind in KINDS]
TUPLED = ("exits at scales", "exits of resolutions", "skip of paths")  # features are tuples
TUPLES = [(name, 8, "model.pt2", (0.01,)) for name in TUPLED]
TWICE = [("unroll", 8, "model.pt2", (0.01, 1.0))]  # a second program of one model has the price that is set by then


@pytest.mark.parametrize(("name", "hidden", "file", "prices"), EXPORTED + TUPLES + TWICE)
@torch.no_grad()
def test_a_plugged_model_is_exported(name, hidden, file, prices, tmp_path):
    model, met = decided(name, hidden), set()
    for price in prices:
        model.set_price(price)
        exported = as_exported(model, tmp_path / file)
        for rows in (1, 9, 40):
            inputs = inputs_for(model.backbone, rows)
            torch.testing.assert_close(exported(inputs), model(inputs), atol=1e-5, rtol=1e-5)
            met |= set(map(tuple, model.last_route.actions.tolist()))
    assert len(met) > len(prices), met


class Asking(nn.Module):
    """A block that looks at its numbers, which no program can."""

    class Block(nn.Linear):
        def forward(self, x):
            return x + super().forward(x) if x.sum().item() > -1e9 else x

    def __init__(self):
        super().__init__()
        self.block, self.head = self.Block(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(x))


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch, capfd):
    model = decided("skip")
    fixed = RoutedModel(model.backbone, StaticPolicy(model.backbone.full_route))
    by_name = SkipModule(Asking(), {"x": (4,)}, ["block"], channels="last")
    for bad, why in (
        (decided("channel"), "its choices set sizes"),
        (fixed, "its policy was not learned"),
        (RoutedModel(by_name, make_policy(by_name)), "Asking is given tensors by name"),
    ):
        with pytest.raises(ValueError, match=f"cannot be exported: {why}"):
            bad.export(tmp_path / "model.pt2")
    backbone = SkipModule(Asking(), (4,), ["block"], channels="last")
    with pytest.raises(
        ValueError, match=r"^torch cannot write this network as model.pt2, so nothing is written: [^\n]+$"
    ):
        RoutedModel(backbone, make_policy(backbone)).export(tmp_path / "model.pt2")
    assert capfd.readouterr().err == ""  # torch would show all that it has traced
    (tmp_path / "folder.pt2").mkdir()
    for name in ("model.pt", "folder.pt2"):
        with pytest.raises(ValueError, match=r"expected a file \*.pt2 .* or \*.onnx"):
            model.export(tmp_path / name)
    (tmp_path / "folder.pt2").rmdir()
    monkeypatch.setattr("dynrl.deploy.export.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="takes onnx and onnxscript: pip install"):
        model.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_custom_ops_are_declared_right():
    module = Everything().requires_grad_(False)
    x, choice, update = arguments(module, 9)
    parts, cell, layer = partition(choice, 3), module.cell, module.layer
    ops = torch.ops.dynrl
    opcheck(ops.routed_linear, (x, module.experts, parts.order, parts.offsets, None, None, None, True, False, False))
    hidden = torch.randn(9, 12)
    opcheck(
        ops.sliced_linear, (hidden, choice, layer.w1, layer.b1, layer.w2, layer.b2, layer.limit, list(layer.widths))
    )
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    opcheck(ops.gated_cell, (torch.randn(9, 36), torch.randn(9, 6), update, *weights, None, None))
