"""Blocks of several paths beyond what every backbone is tested for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynrl.backbones import MultiPathResNet, SkipResNet
from dynrl.ops.exit_scores import exit_scores
from tests.cases import trained

SHAPE = {"input_shape": (1, 8, 8), "classes": 5, "layers": (1, 2), "widths": (6, 12)}


def make(**settings) -> MultiPathResNet:
    return trained(MultiPathResNet(**SHAPE, **settings))


@torch.no_grad()
def test_all_paths_together_are_a_plain_block_and_none_is_its_shortcut():
    backbone = make(paths=3)
    frozen, inputs = backbone.for_inference(), torch.randn(4, 1, 8, 8)
    for paths in ((0, 1, 2), (1,), ()):
        x = frozen.stem(inputs)
        for block in frozen.blocks:
            total = x.clone() if block.shortcut is None else block.shortcut(x)
            chosen = [[layer.conv for layer in block.paths[i]] for i in paths]
            if chosen:  # one convolution after the other, with the paths' channels side by side
                first, second = zip(*chosen, strict=True)
                y = F.conv2d(
                    x, torch.cat([c.weight for c in first]), torch.cat([c.bias for c in first]), first[0].stride, 1
                )
                bias = torch.stack([c.bias for c in second]).sum(0)
                total = total + F.conv2d(y.relu(), torch.cat([c.weight for c in second], 1), bias, 1, 1)
            x = total.relu()
        route = torch.tensor([int(i in paths) for i in range(3)] * 3).expand(4, -1)
        for network in (backbone, frozen):
            torch.testing.assert_close(network(inputs, route), frozen.fc(x.mean((2, 3))), atol=1e-4, rtol=1e-4)


def test_all_paths_cost_what_plain_blocks_do():
    assert make(paths=2).whole_macs == make(paths=3).whole_macs == SkipResNet(**SHAPE).whole_macs


@torch.no_grad()
def test_a_router_sees_which_paths_of_the_block_ran_and_how_sure_the_last_layer_is():
    backbone, seen = make(paths=3), []
    inputs, route = torch.randn(1, 1, 8, 8), torch.tensor([[1, 0, 1, 0, 1, 0, 1, 1, 1]])
    backbone.run(inputs, lambda s: seen.append(backbone.observe(s)[0]) or s.along(route))
    told = [row[:2].tolist() for row in seen]
    assert told == [[0, 0], [1, 0], [1, 0], [0, 0], [0, 0], [0, 1], [0, 0], [1, 0], [1, 1]]
    for point in range(9):
        said = exit_scores(backbone(inputs, route * (torch.arange(9) < point)))[0]
        torch.testing.assert_close(seen[point][2:5], said if point >= 3 else torch.zeros(3))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"paths": 4}, "a width that 4 paths divide"), ({"paths": 1}, "paths of at least 2"),
        ({"paths": 5}, "paths of at least 2 and below 5"), ({"widths": (6,)}, "for each of 2 stages"),
        ({"input_shape": (8, 8)}, "expected images"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        MultiPathResNet(**{**SHAPE, **settings})
