"""The slimmable ResNet against narrow networks built from its slices, and its training."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dynrl.backbones import SlimmableResNet
from dynrl.backbones.channel import LEAST_ROWS, SlimmableBlock
from tests.test_resnet import plain_forward

CASES = {
    "basic": ((1, 12, 12), "basic", (2, 2), (8, 16), "cifar", (0.25, 0.5, 0.75, 1.0)),
    "bottleneck": ((3, 33, 33), "bottleneck", (2, 3), (8, 16), "imagenet", (0.5, 1.0)),
}


def build(case):
    """The backbone of a case, its batch norms as after training: no two alike."""
    shape, block, layers, widths, stem, shares = CASES[case]
    backbone = SlimmableResNet(shape, shares, classes=5, block=block, layers=layers, widths=widths, stem=stem)
    for name, tensor in backbone.state_dict().items():
        if "running_var" in name or ("bn" in name and name.endswith("weight")):
            tensor.copy_(0.5 + torch.rand_like(tensor))
        elif "running_mean" in name or name.endswith("bias"):
            tensor.copy_(0.1 * torch.randn_like(tensor))
    return backbone.eval()


def narrow_state(backbone, choice):
    """What a network that was narrow from the start holds: one batch norm a layer, and no channel to spare."""
    state = backbone.state_dict()
    for point in backbone.points:
        convolutions = sorted(name for name in state if name.startswith(f"{point.name}.conv"))
        width = round(backbone.config["shares"][choice] * len(state[convolutions[0]]))
        for name in convolutions:
            state[name] = state[name][: width if name != convolutions[-1] else None]
            state[name] = state[name][:, : width if name != convolutions[0] else None]
        for name in [name for name in state if name.startswith(f"{point.name}.bn")]:
            value, (layer, of, rest) = state.pop(name), name.rsplit(".", 2)
            if int(of) == choice:
                state[f"{layer}.{rest}"] = value
    return state


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_each_width_is_the_narrow_network_of_its_slices(case):
    shape, block, layers, _, stem, shares = CASES[case]
    backbone = build(case)
    inputs, found = torch.randn(6, *shape), []
    for choice in range(len(shares)):
        route = torch.full((6, backbone.max_steps), choice)
        narrow = plain_forward(inputs, narrow_state(backbone, choice), block, layers, stem)
        for network in (backbone, backbone.for_inference()):
            torch.testing.assert_close(network(inputs.clone(), route), narrow, atol=1e-5, rtol=1e-5)
        found.append(narrow)
    assert all(float((a - b).abs().max()) > 1e-2 for a, b in pairwise(found))


def test_a_batch_of_mixed_widths_trains_only_those_used():
    backbone = build("basic").train()
    route = torch.tensor([0, 2]).repeat(LEAST_ROWS).view(-1, 1).expand(-1, backbone.max_steps)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone(torch.randn(len(route), *backbone.input_shape), route).square().sum().backward()
    torch.optim.SGD(backbone.parameters(), lr=0.1, weight_decay=0.1).step()
    for point in backbone.points:
        for name, tensor in backbone.state_dict().items():
            same = tensor == before[name]
            if name.startswith(f"{point.name}.bn"):
                used = name.split(".")[3] in "02"
                assert not same.all() if used else same.all(), name
    width = round(0.75 * 8)
    for name, part in (("conv1", (slice(width, None),)), ("conv2", (slice(None), slice(width, None)))):
        gradient = backbone.get_submodule("layer1.0").get_parameter(f"{name}.weight").grad
        assert gradient[part].abs().max() == 0 < gradient.abs().max()


def test_few_rows_are_normalised_by_the_running_statistics():
    """A lone row gives what it gives in eval mode, and is not counted; the others are normalised among themselves."""
    block = build("basic").get_submodule("layer1.0").train()
    assert isinstance(block, SlimmableBlock)
    x = torch.randn(LEAST_ROWS + 1, 8, 6, 6)
    choice = torch.tensor([3] * LEAST_ROWS + [1])
    held = {name: tensor.clone() for name, tensor in block.state_dict().items() if "running" in name}
    found = block.mixed(x.clone().requires_grad_(), choice)
    for name, tensor in block.state_dict().items():
        if name in held:
            assert torch.equal(tensor, held[name]) == (".3." not in name), name
    alone = block.sliced(x[:LEAST_ROWS], 3)
    block.load_state_dict(held, strict=False)
    torch.testing.assert_close(found[:LEAST_ROWS], alone)
    torch.testing.assert_close(found[LEAST_ROWS:], block.eval().sliced(x[LEAST_ROWS:], 1))


@pytest.mark.parametrize(
    "shares", [(), (1.0,), (0.5, 0.75), (0.01, 1.0), (0.5, 0.25, 1.0), (0.5, 0.55, 1.0), (0.5, 2.0)]
)
def test_shares_that_do_not_rise_to_all_channels_are_refused(shares):
    with pytest.raises(ValueError, match="of more of the 8 inner channels"):
        SlimmableResNet((1, 8, 8), shares, layers=(1,), widths=(8,))
