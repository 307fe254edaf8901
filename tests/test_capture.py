"""A whole routed network with the counts on the device: no wait for the host, and recorded as a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynrl.backbones import SkipResNet
from dynrl.backbones.early import SCORES
from dynrl.deploy import RoutedModel
from dynrl.deploy.graphs import Facts
from dynrl.ops.backend import device_counts
from dynrl.ops.gated_residual import gated_residual
from dynrl.ops.pooled import pooled_ref
from dynrl.policies import RandomPolicy
from tests.cases import make_policy, trained
from tests.devices import NoHostSync

pytestmark = pytest.mark.usefixtures("full_precision")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITHOUT_CUDA = pytest.mark.skipif(DEVICE == "cuda", reason="about machines without CUDA")
ON_CUDA = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: a graph cannot be recorded here")


def routed(block: str = "basic", seed: int = 0) -> RoutedModel:
    torch.manual_seed(seed)
    backbone = SkipResNet((1, 8, 8), layers=(2, 2), widths=(4, 8), block=block).eval()
    router = make_policy(backbone)
    nn.init.normal_(router.head.weight, std=2.0)  # decides differently from row to row
    return RoutedModel(backbone, router).to(DEVICE)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_counts_on_the_device_give_the_same_without_a_wait(block, kernel_case):
    model, inputs = routed(block), torch.randn(5, 1, 8, 8, device=DEVICE)
    expected = model(inputs).clone()
    assert 0 < model.last_route.actions.float().mean() < 1
    with device_counts():
        model.run(inputs)  # constants are made once
        with NoHostSync():
            walk = model.run(inputs)
    assert torch.equal(walk.route, model.last_route.actions)
    assert torch.equal(walk.macs, model.last_route.macs)
    torch.testing.assert_close(walk.outputs, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_maps_are_read_once_a_stage_for_routers_to_see(kernel_case, monkeypatch):
    """At each point, what is seen is the mean of the maps that stand there, whoever ran before."""
    from dynrl.ops.kernels import decide

    torch.manual_seed(0)
    backbone = SkipResNet((1, 6, 6), layers=(4, 2), widths=(16, 32)).eval().for_inference().to(DEVICE)
    read = []
    for name in ("pool", "pool_sums"):
        kernel = getattr(decide, name)
        monkeypatch.setattr(decide, name, lambda *args, name=name, kernel=kernel: read.append(name) or kernel(*args))
    route = torch.tensor([[1, 0, 1, 1, 1], [0, 0, 1, 0, 0], [1, 0, 1, 0, 1]], device=DEVICE)

    def choose(state):
        seen = backbone.observe(state)[:, SCORES:]
        torch.testing.assert_close(seen, pooled_ref(state.features), atol=1e-5, rtol=1e-5)
        return state.along(route)

    with device_counts():
        walk = backbone.run(torch.randn(3, 1, 6, 6, device=DEVICE), choose)
    assert torch.equal(walk.route, route)
    assert read == ["pool", "pool_sums", "pool_sums", "pool_sums", "pool"]


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.unique(), lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        pytest.param(lambda x: x.cpu(), marks=ON_CUDA), pytest.param(lambda x: x.to("cpu"), marks=ON_CUDA),
    ],
)  # fmt: skip
def test_the_guard_notices_a_wait(wait, inference):
    with torch.inference_mode(inference):
        x = torch.ones(3, 2, device=DEVICE)
        with pytest.raises(AssertionError, match="waits"), NoHostSync():
            wait(x)


@WITHOUT_CUDA
def test_counts_on_the_device_need_the_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="counts on the device are asked for"), device_counts():
        routed().walk(torch.randn(2, 1, 8, 8))


@WITHOUT_CUDA
def test_capture_without_cuda_is_refused():
    with pytest.raises(ValueError, match="CUDA device"):
        routed().capture(4)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(), lambda m: m.load_state_dict(m.state_dict()), lambda m: m.set_price(0.5),
        lambda m: m.set_limit(0.9), lambda m: m.policy.head.bias.neg_(),
    ],
)  # fmt: skip
def test_a_replay_of_what_is_no_longer_there_is_refused(change):
    """The graph would read memory that is freed, or old constants beside new weights. Nothing is recorded here."""
    model = routed()
    recorded = Facts(model)
    recorded.check(model)
    change(model)
    with pytest.raises(ValueError, match="capture it again"):
        recorded.check(model)


def test_blocks_that_must_ask_the_host_are_refused(kernel_case):
    x, run = torch.randn(3, 2, device=DEVICE), torch.tensor([True, False, True], device=DEVICE)
    with pytest.raises(ValueError, match="a Linear cannot run without asking"), device_counts(), torch.no_grad():
        gated_residual(x, run, nn.Linear(2, 2).to(DEVICE))


@ON_CUDA
def test_a_replay_is_the_eager_walk_for_routes_that_change():
    model = routed()
    captured = model.capture(6)
    routes = set()
    for seed in range(5):
        torch.manual_seed(seed)
        inputs = torch.randn(6, 1, 8, 8, device=DEVICE)
        got, route = captured(inputs).clone(), model.last_route.actions.clone()
        torch.testing.assert_close(got, model(inputs), atol=1e-4, rtol=1e-4)
        assert torch.equal(route, model.last_route.actions)
        routes.add(str(route.tolist()))
    assert len(routes) > 1


@ON_CUDA
def test_a_graph_keeps_its_limit():
    model = routed()
    inputs = torch.randn(6, 1, 8, 8, device=DEVICE)
    model(inputs)
    free = model.last_route.macs_fraction
    limit = 0.9 * float(free.max())  # all may spend the same
    model.set_limit(limit)
    captured = model.capture(6)
    got, route = captured(inputs).clone(), model.last_route.actions.clone()
    assert (model.last_route.macs_fraction <= limit).all() and (free > limit).any()
    torch.testing.assert_close(got, model(inputs), atol=1e-4, rtol=1e-4)
    assert torch.equal(route, model.last_route.actions)


@ON_CUDA
def test_what_a_graph_cannot_do_is_refused():
    model = routed()
    captured, before = model.capture(4), model.price
    with pytest.raises(ValueError, match="capture the model for this batch size"):
        captured(torch.randn(3, 1, 8, 8, device=DEVICE))
    model.set_price(0.5)
    with pytest.raises(ValueError, match="capture it again"):
        captured(torch.randn(4, 1, 8, 8, device=DEVICE))
    model.set_price(before)  # back again: what the graph reads is still there
    inputs = torch.randn(4, 1, 8, 8, device=DEVICE)
    torch.testing.assert_close(captured(inputs).clone(), model(inputs), atol=1e-4, rtol=1e-4)
    model.policy.load_state_dict(model.policy.state_dict())
    with pytest.raises(ValueError, match="other weights were loaded"):
        captured(inputs)
    backbone = SkipResNet((1, 8, 8), layers=(2, 2), widths=(4, 8)).to(DEVICE)
    with pytest.raises(ValueError, match="cannot be captured"):
        RoutedModel(backbone, RandomPolicy(backbone.thrift, 0.5)).capture(4)


@torch.inference_mode()
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("channels", [3, 8])
def test_folded_layers_are_the_network(channels, dtype, tolerance, memory_format):
    """On a device, images of few channels get more, and biases and ReLU come as a convolution writes."""
    torch.manual_seed(0)
    backbone = trained(SkipResNet((channels, 9, 9), layers=(1, 2), widths=(16, 24), block="bottleneck"))
    x = torch.randn(5, channels, 9, 9)
    expected = backbone(x)
    model = backbone.for_inference().to(DEVICE, dtype)
    got = model(x.to(DEVICE, dtype).contiguous(memory_format=memory_format)).float().cpu()
    assert (got - expected).norm() <= tolerance * expected.norm()
    flipped = backbone.for_inference()
    for network in (flipped, model):  # only the stem is loaded anew, so what was kept of it would show
        network.conv1.load_state_dict({name: 30 * value for name, value in network.conv1.state_dict().items()})
    after, wanted = model(x.to(DEVICE, dtype).contiguous(memory_format=memory_format)).float().cpu(), flipped(x)
    assert (wanted - expected).norm() > 5 * tolerance * expected.norm()
    assert (after - wanted).norm() <= tolerance * wanted.norm(), "weights from before were used"
