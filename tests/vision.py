"""Real networks of torchvision and timm as backbones: `make test-vision`, in a virtual environment of its own.

Run as a program it measures them: `python tests/vision.py OUT.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import dynrl
from dynrl.backbones import Backbone, ExitModule, ExitResNet, SkipModule, SkipResNet, SlimmableResNet
from dynrl.evaluation import medians_in_turn
from dynrl.machine import hardware
from dynrl.policies import RandomPolicy, StaticPolicy

SHAPE = (3, 224, 224)


def tv_vit() -> nn.Module:
    return torchvision.models.vit_b_16()


def timm_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224")


TV_BLOCKS = [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
TIMM_BLOCKS = [f"blocks.{i}" for i in range(12)]
RESNET_BLOCKS = ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]  # of ResNet-18, those that keep the shape
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Backbone]]] = {
    "resnet18": (torchvision.models.resnet18, lambda m: SkipResNet.from_module(m, SHAPE)),
    "resnet50": (torchvision.models.resnet50, lambda m: SkipResNet.from_module(m, SHAPE)),
    "resnet18, any module": (torchvision.models.resnet18, lambda m: SkipModule(m, SHAPE, RESNET_BLOCKS)),
    "resnet18, exits": (torchvision.models.resnet18, lambda m: ExitResNet.from_module(m, SHAPE, exits=(1, 3, 5))),
    "resnet18, widths": (torchvision.models.resnet18, lambda m: SlimmableResNet.from_module(m, SHAPE)),
    "timm resnet18": (lambda: timm.create_model("resnet18"), lambda m: SkipResNet.from_module(m, SHAPE)),
    "vit_b_16": (tv_vit, lambda m: SkipModule(m, SHAPE, TV_BLOCKS)),
    "vit_b_16, exits": (tv_vit, lambda m: ExitModule(m, SHAPE, TV_BLOCKS[2:11:4])),
    "timm vit_tiny": (timm_vit, lambda m: SkipModule(m, SHAPE, TIMM_BLOCKS)),
    "timm vit_tiny, exits": (timm_vit, lambda m: ExitModule(m, SHAPE, TIMM_BLOCKS[2:11:4])),
    "timm convnext_atto": (
        lambda: timm.create_model("convnext_atto"),
        lambda m: SkipModule(m, SHAPE, [f"stages.2.blocks.{i}" for i in range(6)]),
    ),
}


def trained(module: nn.Module) -> nn.Module:
    """With statistics, shifts and a head as training leaves them: zeros and ones hide what is mixed up."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.1, 0.4)
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
    return module.eval()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_plugged_on_its_full_route_it_is_the_network(name):
    make, wrap = NETWORKS[name]
    module, inputs = trained(make()), torch.randn(3, *SHAPE)
    backbone, expected = wrap(module), module(inputs)
    assert float(expected.std()) > 1e-3
    model = dynrl.plug(backbone, StaticPolicy(backbone.full_route))
    torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert float(model.last_route.macs_fraction[0]) == 1


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "timm vit_tiny"])
@torch.no_grad()
def test_rows_take_routes_of_their_own(name):
    make, wrap = NETWORKS[name]
    backbone, inputs = wrap(trained(make())), torch.randn(4, *SHAPE)
    route = torch.randint(0, 2, (4, backbone.columns))
    together = dynrl.plug(backbone, StaticPolicy(backbone.full_route)).backbone.run_route(inputs.clone(), route)
    for row in range(4):
        alone = backbone(inputs[row : row + 1], route[row : row + 1])
        torch.testing.assert_close(together.outputs[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Half of the blocks skipped, at random for each image, beside the network itself in both memory formats."""
    make, wrap = NETWORKS[name]
    module, inputs = trained(make()).requires_grad_(False), torch.randn(batch, *SHAPE)
    backbone = wrap(module)
    model = dynrl.plug(backbone, RandomPolicy(backbone.thrift, 0.5, seed=0))
    last = torch.channels_last
    nhwc, images = make().eval().requires_grad_(False).to(memory_format=last), inputs.contiguous(memory_format=last)
    dense = dynrl.plug(backbone, StaticPolicy(backbone.full_route))
    with torch.inference_mode():
        times = medians_in_turn(
            {
                "module": lambda: module(inputs), "module channels_last": lambda: nhwc(images),
                "plugged, all blocks": lambda: dense(inputs), "plugged, half of the blocks": lambda: model(inputs),
            },
            rounds,
        )  # fmt: skip
    assert model.last_route is not None
    fastest = min(ms for side, ms in times.items() if side != "plugged, half of the blocks")
    return {
        "network": name, "batch": batch, "ms": times, "macs_fraction": float(model.last_route.macs_fraction.mean()),
        "speedup": fastest / times["plugged, half of the blocks"],
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows = [measure(name, 32, 5) for name in ("resnet50", "vit_b_16", "timm vit_tiny")]
    versions = {"torchvision": torchvision.__version__, "timm": timm.__version__}
    report = {"date": f"{date.today()}", "hardware": hardware() | versions, "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(rows, indent=2))
