"""Each op against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynrl.ops.gated_residual import gated_residual, gated_residual_ref

SHAPES = [(7, 5), (6, 3, 5, 7), (8, 16, 4, 4), (1, 2, 3, 3)]


def block_for(shape, dtype=torch.float32):
    torch.manual_seed(1)
    layer = nn.Linear(shape[1], shape[1]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[1], 3, padding=1)
    layer = layer.to(dtype)
    return lambda x: torch.tanh(layer(x)) + x


def masks(rows):
    some = torch.arange(rows) % 2 == 0
    return {"none": torch.zeros(rows), "all": torch.ones(rows), "some": some, "one": torch.arange(rows) == rows - 1}


@pytest.mark.parametrize("which", ["none", "all", "some", "one"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_gated_residual_is_its_definition(shape, layout, which):
    x = torch.randn(shape)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.t().contiguous().t()
    elif layout == "sliced":
        x = torch.randn(shape[0], 2 * shape[1] + 1, *shape[2:])[:, 1 : shape[1] + 1]
    run, block = masks(len(x))[which].long(), block_for(shape)
    expected = gated_residual_ref(x.clone(), run, block)
    got = gated_residual(x, run, block)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(got[run == 0], expected[run == 0])  # rows handed through are untouched to the last bit


@torch.no_grad()
def test_rows_at_an_odd_place_in_memory_and_blocks_of_another_dtype():
    run, block = torch.tensor([1, 0, 1, 0]), block_for((4, 8))
    odd = torch.randn(33)[1:].view(4, 8)
    torch.testing.assert_close(gated_residual(odd.clone(), run, block), gated_residual(odd, run, block))
    x = torch.randn(4, 8)
    low = gated_residual(x.clone(), run, lambda rows: rows.bfloat16())
    torch.testing.assert_close(low[0], x[0].bfloat16().float())


@torch.no_grad()
def test_rows_left_out_are_never_computed():
    seen = []
    gated_residual(torch.randn(6, 3), torch.tensor([1, 0, 0, 1, 0, 0]), lambda x: seen.append(len(x)) or x)
    gated_residual(torch.randn(6, 3), torch.zeros(6), lambda x: seen.append(len(x)) or x)
    assert seen == [2]


@torch.no_grad()
def test_nan_in_rows_left_out_stays_there():
    x = torch.randn(4, 8, 4, 4)
    x[1] = torch.nan
    out = gated_residual(x, torch.tensor([1, 0, 1, 1]), block_for(x.shape))
    assert torch.isfinite(out[[0, 2, 3]]).all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("which", ["none", "all", "some"])
def test_gradients_are_those_of_the_definition_twice(which):
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    run, block = masks(6)[which].long(), block_for(x.shape, torch.float64)
    grads = []
    for f in (gated_residual_ref, gated_residual):
        leaf = x.clone().requires_grad_()
        out = f(leaf, run, block).square().sum()
        first = torch.autograd.grad(out, leaf, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(out, leaf)[0])
        grads.append(first)
    torch.testing.assert_close(grads[0], grads[1])
    leaf = x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: gated_residual_ref(t, run[:2], block), (leaf,))
