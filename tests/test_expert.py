"""Expert choice against its layers written down a second time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynrl.backbones import ExpertNet
from dynrl.ops.backend import device_counts
from tests.devices import NoHostSync

WIDTHS = (0, 3, 8, 8)


def small(**settings) -> ExpertNet:
    """Two layers of four experts, batch norm away from its start."""
    backbone = ExpertNet((1, 8, 8), stem=4, channels=6, layers=2, widths=WIDTHS, **settings).train()
    for _ in range(3):
        backbone(torch.randn(32, 1, 8, 8) * 2 + 1, torch.randint(0, 4, (32, 2)))
    return backbone.eval()


def expert_by_expert(backbone, inputs, route):
    """Each image by itself through plain convolutions and its experts' two products."""
    p = backbone.state_dict()

    def convolution(x, name, **how):
        norm = [p[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(F.conv2d(x, p[f"{name}.conv.weight"], padding=1, **how), *norm)

    outputs = []
    for x, experts in zip(inputs, route.tolist(), strict=True):
        x = convolution(x.unsqueeze(0), "stem.0", stride=2).relu()
        x = convolution(x, "stem.1", stride=2).relu()
        for i, e in enumerate(experts):
            x = convolution(x, f"layers.{i}.mix", groups=6)
            columns = x.flatten(2)[0]  # [C, positions]
            units = slice(sum(WIDTHS[:e]), sum(WIDTHS[: e + 1]))
            w1, b1, w2 = (p[f"layers.{i}.{name}"] for name in ("w1", "b1", "w2"))
            hidden = (w1[units] @ columns + b1[units].unsqueeze(1)).relu()
            x = (columns + w2[:, units] @ hidden).view_as(x)
        outputs.append(p["fc.weight"] @ x.mean((2, 3))[0] + p["fc.bias"])
    return torch.stack(outputs)


@pytest.mark.parametrize("fast", [False, True])
@torch.no_grad()
def test_each_image_gets_its_experts_products(fast):
    backbone = small()
    inputs, run = torch.randn(9, 1, 8, 8), backbone.for_inference() if fast else backbone
    uniform = [torch.full((9, 2), e) for e in range(4)]
    for route in (*uniform, torch.randint(0, 4, (9, 2))):
        torch.testing.assert_close(run(inputs, route), expert_by_expert(backbone, inputs, route), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_null_expert_is_free_and_hands_the_image_through():
    backbone = small()
    free, (first, second) = backbone.costs[:, 0], backbone.costs[:, 1:].unbind(0)
    positions, mixing = 4, 4 * 6 * 9
    assert free.tolist() == [mixing, 6 * 10]  # the next layer's convolution, and the head, which all images run
    assert (first - mixing).tolist() == (second - 60).tolist() == [2 * positions * 6 * width for width in WIDTHS[1:]]
    state = backbone.begin(torch.randn(5, 1, 8, 8))
    before = state.features.clone()
    (after,) = backbone.advance(state, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(after.features, backbone.layers[1].mix(before), rtol=0, atol=0)


def test_gradient_reaches_only_the_experts_chosen():
    backbone = small()
    route = torch.tensor([[1, 0], [1, 3], [3, 3]])
    backbone(torch.randn(3, 1, 8, 8), route).square().sum().backward()
    for i, layer in enumerate(backbone.layers):
        grads = (layer.w1.grad.split(WIDTHS), layer.b1.grad.split(WIDTHS), layer.w2.grad.split(WIDTHS, 1))
        for e, parts in enumerate(zip(*grads, strict=True)):
            reached = [bool(part.abs().sum() > 0) for part in parts]
            assert reached == [WIDTHS[e] > 0 and bool((route[:, i] == e).any())] * 3, (i, e)


@torch.no_grad()
def test_the_full_route_takes_the_last_expert_only():
    backbone = small()
    inputs = torch.randn(4, 1, 8, 8)
    expected = expert_by_expert(backbone, inputs, torch.full((4, 2), 3))
    torch.testing.assert_close(backbone(inputs), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_counts_on_the_device_give_the_same_without_a_wait(kernel_case):
    backbone, inputs = small().for_inference().to(kernel_case), torch.randn(5, 1, 8, 8, device=kernel_case)
    route = torch.tensor([[0, 3], [3, 1], [1, 1], [2, 0], [3, 3]], device=kernel_case)

    def walk():
        state = backbone.begin(inputs)
        for actions in route.t():
            (state,) = backbone.advance(state, actions)
        return state.walk

    expected = walk()
    with device_counts():
        walk()  # constants are made once
        with NoHostSync():
            got = walk()
    torch.testing.assert_close(got.outputs, expected.outputs, atol=1e-4, rtol=1e-4)
    assert torch.equal(got.macs, expected.macs)


@torch.no_grad()
def test_compiled_in_one_graph():
    backbone = small().for_inference()
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (9, 9, 14):
        inputs, route = torch.randn(rows, 1, 8, 8), torch.randint(0, 4, (rows, 2))
        torch.testing.assert_close(compiled(inputs, route), backbone(inputs, route), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "at least one layer"),
        ({"widths": (8,)}, "at least two experts"),
        ({"widths": (8, 4)}, "from narrow to wide"),
        ({"widths": (-1, 4)}, "from narrow to wide"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ExpertNet((1, 8, 8), **settings)
