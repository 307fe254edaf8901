"""The ResNet of cells against loops over its cells, and its training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynrl.backbones import CellResNet, SkipResNet
from tests.cases import trained

CASES = {"basic": ((1, 12, 12), "basic", 3), "bottleneck": ((3, 8, 16), "bottleneck", 2)}


def build(case, **settings):
    shape, block, grid = CASES[case]
    return trained(CellResNet(shape, grid, classes=5, block=block, layers=(2, 2), widths=(4, 6), **settings))


def by_hand(backbone, image, route):
    """One image [1, C, H, W] through blocks that compute every pixel, and hide those of cells that do not run."""
    x, grid, shares = backbone._stem(image), backbone.config["grid"], (0, 0.25, 0.5, 1)
    route = iter(zip(backbone.scorers, route, strict=True))
    for block in backbone._blocks:
        if block.downsample is not None:
            x = block(x)
            continue
        scorer, choice = next(route)
        cells, (high, wide) = grid * grid, (x.shape[2] // grid, x.shape[3] // grid)
        means = [x[0, :, high * (k // grid) :, wide * (k % grid) :][:, :high, :wide].mean((1, 2)) for k in range(cells)]
        scores = scorer(torch.stack(means).unsqueeze(0))[0]
        chosen = scores.argsort(descending=True)[: -int(-shares[choice] * cells // 1)]
        weight, y = torch.zeros(1, 1, *x.shape[2:]), x
        for k in chosen.tolist():
            share = 1.0 if choice == 3 else float(2 * scores[k].sigmoid())
            weight[:, :, high * (k // grid) :, wide * (k % grid) :][:, :, :high, :wide] = share
        for convolution, norm in block.layers():
            y = norm(convolution(y if y is x else F.relu(y) * (weight > 0)))
        x = x + weight * (F.relu(x + y) - x)
    return backbone._head(x)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_each_share_is_the_block_on_the_cells_with_the_highest_scores(case):
    backbone = build(case)
    images, route = torch.randn(5, *backbone.input_shape), torch.randint(4, (5, backbone.columns))
    route[0], route[1] = 3, 1
    expected = torch.cat([by_hand(backbone, images[i : i + 1], route[i].tolist()) for i in range(5)])
    for of in (backbone, backbone.for_inference()):
        torch.testing.assert_close(of(images.clone(), route), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(of.whole(images.clone())[:1], expected[:1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_holds_the_resnet_that_it_is_made_from_and_costs_as_much():
    plain = trained(SkipResNet((3, 16, 16), layers=(1, 2), widths=(8, 16)))
    backbone = CellResNet((3, 16, 16), 4, layers=(1, 2), widths=(8, 16)).eval()
    missing, unexpected = backbone.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("scorers.") for name in missing)
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(backbone(images), plain(images))
    scoring = 16 * (8 + 16)  # of each cell's channels, in front of both blocks
    assert backbone.dense_macs == plain.whole_macs + scoring
    block = 2 * 9 * 16 * 16 * 8 * 8  # two convolutions from 16 to 16 channels on maps of 8 x 8
    assert (backbone.costs[1] - backbone.costs[1, 0]).tolist() == [0, block // 4, block // 2, block]


def test_a_batch_of_mixed_shares_trains_blocks_and_scorers():
    backbone = build("basic").train()
    route = torch.tensor([1, 3, 2, 0]).view(-1, 1).expand(-1, backbone.columns)
    backbone(torch.randn(4, *backbone.input_shape), route).square().sum().backward()
    unused = [name for name, weight in backbone.named_parameters() if weight.grad is None]
    assert unused == []
    assert all(scorer.score.weight.grad.abs().max() > 0 for scorer in backbone.scorers)


def test_a_grid_that_divides_no_map_is_refused():
    with pytest.raises(ValueError, match=r"got 5 and maps of \[\(8, 8\)\]"):
        CellResNet((1, 8, 8), 5, layers=(1,), widths=(4,))
