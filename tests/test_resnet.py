"""The gated ResNet against the plain one, written down here a second time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynrl.backbones import SkipResNet
from dynrl.ops import convolution
from dynrl.ops.exit_scores import exit_scores
from tests.cases import trained

RESNET18 = dict(layers=(2, 2, 2, 2), widths=(64, 128, 256, 512), stem="imagenet")


def names_and_shapes(block, layers, widths, classes, stem_kernel, channels):
    """The state_dict that torchvision's ResNet of that shape has (its layout is a public format)."""
    found = {"conv1.weight": (widths[0], channels, stem_kernel, stem_kernel)}

    def norm(name, width):
        found.update({f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")})
        found[f"{name}.num_batches_tracked"] = ()

    norm("bn1", widths[0])
    width, expansion = widths[0], 4 if block == "bottleneck" else 1
    for s, (depth, planes) in enumerate(zip(layers, widths, strict=True), 1):
        for i in range(depth):
            at = f"layer{s}.{i}"
            if block == "basic":
                convs = [(planes, width, 3), (planes, planes, 3)]
            else:
                convs = [(planes, width, 1), (planes, planes, 3), (4 * planes, planes, 1)]
            for k, (o, n, size) in enumerate(convs, 1):
                found[f"{at}.conv{k}.weight"] = (o, n, size, size)
                norm(f"{at}.bn{k}", o)
            if i == 0 and (s > 1 or width != planes * expansion):
                found[f"{at}.downsample.0.weight"] = (planes * expansion, width, 1, 1)
                norm(f"{at}.downsample.1", planes * expansion)
            width = planes * expansion
    found["fc.weight"], found["fc.bias"] = (classes, width), (classes,)
    return found


def plain_forward(x, p, block, layers, stem):
    """A ResNet in eval mode, from its state_dict alone."""

    def conv_norm(x, conv, norm, stride=1):
        weight = p[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return F.batch_norm(
            x, p[f"{norm}.running_mean"], p[f"{norm}.running_var"], p[f"{norm}.weight"], p[f"{norm}.bias"]
        )

    x = F.relu(conv_norm(x, "conv1", "bn1", 2 if stem == "imagenet" else 1))
    if stem == "imagenet":
        x = F.max_pool2d(x, 3, 2, 1)
    for s, depth in enumerate(layers, 1):
        for i in range(depth):
            at, stride = f"layer{s}.{i}", 2 if s > 1 and i == 0 else 1
            skip = x
            if f"{at}.downsample.0.weight" in p:
                skip = conv_norm(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            if block == "basic":
                y = F.relu(conv_norm(x, f"{at}.conv1", f"{at}.bn1", stride))
                y = conv_norm(y, f"{at}.conv2", f"{at}.bn2")
            else:
                y = F.relu(conv_norm(x, f"{at}.conv1", f"{at}.bn1"))
                y = F.relu(conv_norm(y, f"{at}.conv2", f"{at}.bn2", stride))
                y = conv_norm(y, f"{at}.conv3", f"{at}.bn3")
            x = F.relu(y + skip)
    return F.linear(x.mean((2, 3)), p["fc.weight"], p["fc.bias"])


CASES = {
    "resnet18": ((3, 64, 64), "basic", (2, 2, 2, 2), (64, 128, 256, 512), "imagenet", 7),
    "resnet50": ((3, 64, 64), "bottleneck", (3, 4, 6, 3), (64, 128, 256, 512), "imagenet", 3),
    "resnet20-cifar": ((3, 32, 32), "basic", (3, 3, 3), (16, 32, 64), "cifar", 4),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_all_execute_is_the_plain_resnet_with_torchvisions_names(case):
    shape, block, layers, widths, stem, classes = CASES[case]
    backbone = SkipResNet(shape, classes, block, layers, widths, stem).eval()
    expected = names_and_shapes(block, layers, widths, classes, 7 if stem == "imagenet" else 3, shape[0])
    assert {name: tuple(t.shape) for name, t in backbone.state_dict().items()} == expected
    state = {name: 0.1 * torch.randn(size) if size else torch.tensor(1) for name, size in expected.items()}
    for name in state:
        if "running_var" in name or (".bn" in name and name.endswith("weight")):
            state[name] = 0.5 + torch.rand(expected[name])
    backbone.load_state_dict(state)
    inputs = torch.randn(2, *shape)
    plain = plain_forward(inputs, state, block, layers, stem)
    scale = plain.abs().max()
    torch.testing.assert_close(backbone(inputs) / scale, plain / scale, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.for_inference()(inputs) / scale, plain / scale, atol=1e-5, rtol=1e-5)


def test_published_costs():
    assert SkipResNet((3, 224, 224), 1000, **RESNET18).dense_macs == pytest.approx(1.81e9, rel=0.01)
    resnet50 = SkipResNet((3, 224, 224), 1000, "bottleneck", (3, 4, 6, 3), (64, 128, 256, 512), "imagenet")
    assert resnet50.dense_macs == pytest.approx(4.09e9, rel=0.01)
    assert resnet50.max_steps == 12  # 16 blocks, the first of each stage changes the shape


@torch.no_grad()
def test_in_the_last_stage_a_router_sees_how_sure_the_network_is_if_all_that_follows_is_skipped():
    backbone = trained(SkipResNet((1, 8, 8), 5, layers=(2, 3), widths=(4, 6)))
    inputs, route, seen = torch.randn(3, 1, 8, 8), torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]]), []
    backbone.run(inputs, lambda state: seen.append(backbone.observe(state)) or state.along(route))
    said = [exit_scores(backbone(inputs, route * (torch.arange(4) < point))) for point in range(4)]
    torch.testing.assert_close(seen[2][:, :3], said[2])
    torch.testing.assert_close(seen[3][:, :3], said[3])
    assert not seen[0][:, :3].any() and not seen[1][:, :3].any()  # the next stage's first block is still to come
    assert [row.shape[1] for row in seen] == [7, 7, 9, 9]
    assert backbone.dense_macs - backbone.whole_macs == 2 * 5 * 6
    one = SkipResNet((1, 8, 8), 1, layers=(1,), widths=(4,)).eval()
    assert not one.observe(one.begin(inputs))[:, :3].any() and one.dense_macs == one.whole_macs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": "nosuch"}, "unknown block"),
        ({"stem": "nosuch"}, "unknown stem"),
        ({"layers": (1, 2)}, "one width a stage"),
        ({"block": "bottleneck", "layers": (1, 1, 1)}, "no block of this network has an identity"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SkipResNet((1, 16, 16), **settings)


@torch.inference_mode()
def test_norms_of_other_kinds_are_folded_or_refused():
    backbone, x = trained(SkipResNet((1, 8, 8), layers=(2,), widths=(8,))), torch.randn(4, 1, 8, 8)
    expected = backbone(x)
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in synchronised.modules())
    torch.testing.assert_close(synchronised.for_inference()(x), expected, atol=1e-5, rtol=1e-4)
    backbone.bn1 = torch.nn.GroupNorm(2, 8)
    with pytest.raises(ValueError, match="batch norm with running statistics .*GroupNorm"):
        backbone.for_inference()


@torch.inference_mode()
def test_a_cpu_without_bf16_convolves_as_torch_does(monkeypatch):
    backbone, x = trained(SkipResNet((1, 8, 8), layers=(2,), widths=(8,))), torch.randn(4, 1, 8, 8)
    expected = backbone(x)
    monkeypatch.setattr(convolution, "_runs_bf16", lambda: False)
    monkeypatch.setattr(convolution.FoldedConv2d, "fused", None)  # calling it fails
    plain = backbone.for_inference().to(torch.bfloat16)
    torch.testing.assert_close(plain(x.bfloat16()).float(), expected, atol=0.05, rtol=0.05)
