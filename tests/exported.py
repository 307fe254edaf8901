"""Exported programs are compared with their models, on batches in which no row, every row or some rows run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynrl.backbones import Backbone
from dynrl.deploy import RoutedModel
from dynrl.policies import PolicySpec

MOST = 33  # rows of the batches that are compared


@torch.no_grad()
def half_and_half(backbone: Backbone, inputs: torch.Tensor) -> Any:
    """A policy by which half of `inputs` take choice 0 wherever they come, and the other half choice 1."""
    policy: Any = PolicySpec.of("sequential", backbone, (0.01, 1.0), 0).build()
    sight, weight, bias = policy.sight, policy.head.weight, policy.head.bias
    weight.zero_()
    weight[1, : sight.features] = torch.randn(sight.features, generator=torch.Generator().manual_seed(0))
    seen = sight.see(backbone, backbone.begin(inputs), 0.1)[:, : sight.price + 1]
    middle = (seen @ weight[1]).sort().values[len(inputs) // 2 - 1 :][:2].mean()
    bias.copy_(torch.stack([middle, torch.zeros_like(middle)]))
    weight[1, sight.last + 1 : sight.last + 3] = torch.tensor([-1e6, 1e6])  # what it chose last
    return policy


def as_exported(model: RoutedModel, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Write `model` to `path`, and return the program that is read from there."""
    model.export(path)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda inputs: torch.from_numpy(session.run(["outputs"], {model.backbone.input_name: inputs.numpy()})[0])


@torch.no_grad()
def check_exported(backbone: Backbone, inputs: torch.Tensor, path: Path) -> None:
    """Compare an exported program with its model on batches in which no row, every row or half of them are out."""
    model = RoutedModel(backbone, half_and_half(backbone, inputs))
    expected, program = model(inputs), as_exported(model, path)
    first = model.last_route.actions[:, 0]
    assert MOST <= int(first.sum()) <= len(inputs) - MOST  # folded weights move rows near the middle to the other half
    for chosen in (first == 0, first == 1, first >= 0):
        for count in (1, 2, MOST):
            close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
            torch.testing.assert_close(program(inputs[chosen][:count]), expected[chosen][:count], **close)
