"""Mixtures of experts in a user's network: fewer experts by the layer's own rule, and the network itself at its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dynrl.backbones import ExpertModule
from tests.toys import Mixture, Reader, Transformer, sparse

BLOCKS, ROWS, EXPERTS, OWN = ["blocks.0", "blocks.1", "blocks.2"], 7, 4, 3
NETWORKS = {"traced": (Transformer, (1, 8, 8)), "in place": (Reader, (5, 8))}


def network(way="traced", counts=None, **settings):
    torch.manual_seed(0)
    kind, shape = NETWORKS[way]
    module = sparse(kind(), **settings).eval()
    backbone = ExpertModule(module, shape, BLOCKS, "mlp", counts=counts)
    assert backbone.way == way
    return module, backbone


def at(module, counts):
    """A copy whose blocks' mixtures take so many experts."""
    twin = copy.deepcopy(module)
    for block, count in zip(twin.blocks, counts, strict=True):
        block.mlp.top_k = count
    return twin


def said(module, inputs):
    output = module(inputs)
    return output if isinstance(output, torch.Tensor) else output["logits"]


@pytest.mark.parametrize("settings", [{}, {"shared": True}, {"normed": False}], ids=str)
@pytest.mark.parametrize("way", NETWORKS)
@torch.no_grad()
def test_each_row_gets_what_the_network_says_with_as_many_experts(way, settings):
    module, backbone = network(way, (0, 1, 2, OWN), **settings)
    module.blocks[1].mlp.register_forward_hook(lambda layer, given, made: 2 * made)
    inputs = torch.randn(ROWS, *backbone.input_shape)
    own = backbone(inputs.clone())
    assert torch.equal(own, said(module, inputs)) and float(own.std()) > 0.01
    route = torch.randint(0, 4, (ROWS, 3))
    route[:4] = torch.arange(4).unsqueeze(1)
    walk = backbone.run_route(inputs.clone(), route)
    for row in range(ROWS):
        alone = said(at(module, route[row].tolist()), inputs[row : row + 1])
        torch.testing.assert_close(walk.outputs[row : row + 1], alone)
    assert [block.mlp.top_k for block in module.blocks] == [OWN] * 3
    (first,) = walk.outputs[1:2] - walk.outputs[3:4]
    assert first.abs().max() > 1e-3


@pytest.mark.parametrize("shared", [False, True])
def test_macs_are_those_of_the_experts_that_run(shared):
    _, backbone = network(counts=(0, 1, OWN), shared=shared)
    attention, expert, router, more = (5 * macs for macs in (8 * 32 + 2 * 5 * 8, 2 * 8 * 10, 8 * EXPERTS, 64 * shared))
    for costs in backbone.costs[:2].tolist():
        assert costs == [attention + router + more + count * expert for count in (0, 1, OWN)]
    assert backbone.dense_macs == backbone.start_macs + int(backbone.costs[:, 2].sum())


def test_the_numbers_are_powers_of_two_up_to_the_layers_own():
    assert network()[1].config["counts"] == [1, 2, 3]
    module, backbone = network(top_k=4)
    assert backbone.config["counts"] == [1, 2, 4]
    again = ExpertModule(module, **backbone.config)  # as files are loaded
    assert again.config == backbone.config and torch.equal(again.costs, backbone.costs)


class Flat(nn.Module):
    """A block that hands its tokens on one by one, and whose mixture also returns what its router says."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.ModuleDict({"mixture": Told(width)})

    def forward(self, x):
        y, _ = self.inner["mixture"](x.flatten(0, 1))
        return x + y.view(x.shape)


class Told(Mixture):
    def forward(self, x):
        return super().forward(x), self.router(x)


@torch.no_grad()
def test_a_mixture_may_be_given_single_tokens_and_return_more():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), Flat(8), nn.Flatten(), nn.Linear(5 * 8, 3)).eval()
    backbone = ExpertModule(module, (5, 6), ["1"], "inner.mixture")
    inputs, route = torch.randn(6, 5, 6), torch.tensor([0, 1, 2, 2, 1, 0]).unsqueeze(1)
    outputs = backbone(inputs, route)
    for choice in range(3):
        module[1].inner["mixture"].top_k = choice + 1
        mine = route[:, 0] == choice
        torch.testing.assert_close(outputs[mine], module(inputs[mine]))


class Deaf(Mixture):
    """A mixture whose number of experts stands in its code."""

    def forward(self, x):
        top_k, self.top_k = self.top_k, OWN
        try:
            return super().forward(x)
        finally:
            self.top_k = top_k


def unlike(module):
    module.blocks[1].mlp.experts[2] = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8))


class Failing(Mixture):
    def forward(self, x):
        assert self.top_k > 1, "too few"
        return super().forward(x)


@pytest.mark.parametrize(
    ("settings", "change", "reason"),
    [
        ({"layer": "mpl"}, None, r"name of a layer in 'blocks.0', such as one of \['mlp'"),
        ({"layer": "norm2"}, None, "as 'top_k', got none in LayerNorm; say attribute="),
        ({"attribute": "k"}, None, "as 'k', got none in Mixture"),
        ({"counts": (1, 2)}, None, r"rise to the layer's own, got \(1, 2\)"), ({"counts": (2, 1, 3)}, None, "that rise"),
        ({}, lambda m: setattr(m.blocks[1].mlp, "top_k", 2), "equally many experts, got {'blocks.0': 3, 'blocks.1': 2"),
        ({}, lambda m: setattr(m.blocks[1], "mlp", Deaf(8)), "MACs of 'blocks.1' to rise with 'top_k'"),
        ({}, lambda m: setattr(m.blocks[1], "mlp", Failing(8)), r"'blocks.1' fails with 1 experts a token \(.*too few"),
        ({}, unlike, "experts of equal size in 'blocks.1'"),
        ({"counts": (0, 3)}, lambda m: setattr(m.blocks[0].mlp, "experts", nn.ModuleList()), "MACs of 'blocks.0' to rise"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(settings, change, reason):
    torch.manual_seed(0)
    module = sparse(Transformer()).eval()
    if change is not None:
        change(module)
    with pytest.raises(ValueError, match=reason):
        ExpertModule(module, (1, 8, 8), BLOCKS, **({"layer": "mlp"} | settings))


def test_a_mixture_that_is_given_more_tensors_is_refused():
    class Placed(Flat):
        def forward(self, x):
            return x + self.inner["mixture"](x, x)[0]

    class Seeing(Told):
        def forward(self, x, places):
            return super().forward(x + places)

    block = Placed(8)
    block.inner["mixture"] = Seeing(8)
    with pytest.raises(ValueError, match="given no tensor but its features"):
        ExpertModule(nn.Sequential(block, nn.Flatten(), nn.Linear(40, 3)), (5, 8), ["0"], "inner.mixture")
