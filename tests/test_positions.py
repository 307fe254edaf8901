"""Shares of tokens against networks that hold these tokens only; which tokens run, and what they see of each other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dynrl.backbones import TokenModule, TokenViT
from dynrl.deploy import RoutedModel
from dynrl.evaluation import Ground, Learned, measure
from dynrl.evaluation.figures import draw_regions
from dynrl.inputs import Named
from dynrl.runs import RunKind
from tests.cases import answered_by, make_policy
from tests.toys import Encoder, Reader, Transformer

SHAPE = (1, 12, 12)


def network(**settings):
    """Nine tokens: a share of a quarter is three of them, a half is five."""
    return TokenViT(SHAPE, classes=3, **{"width": 8, "depth": 2, "heads": 2, "hidden": 12, **settings}).eval()


def by_hand(backbone, image, route):
    """One image [1, C, H, W] through loops over its tokens, as the page tells it."""
    x = backbone.stem(image) + backbone.place
    for point, choice in enumerate(route):
        block, scores = backbone.blocks[point], backbone.scorers[point](x)[0]
        best = scores.tolist()
        chosen = sorted(range(9), key=lambda token: -best[token])[: (0, 3, 5, 9)[choice]]
        if choice == 3:
            x = block(x)
        elif chosen:
            ran, x = block(x[:, chosen]), x.clone()
            for place, token in enumerate(chosen):
                x[0, token] += 2 * torch.sigmoid(scores[token]) * (ran[0, place] - x[0, token])
    tokens = backbone.norm(x)[0]
    parts = backbone.pool(tokens).exp()
    return backbone.fc((parts * tokens).sum(0, keepdim=True) / parts.sum())


@torch.no_grad()
def test_each_share_is_the_block_on_the_tokens_with_the_highest_scores():
    backbone, images = network(), torch.randn(6, *SHAPE)
    route = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 1], [3, 3]])
    expected = torch.cat([by_hand(backbone, images[i : i + 1], route[i].tolist()) for i in range(6)])
    for of in (backbone, backbone.for_inference()):
        torch.testing.assert_close(of(images, route), expected, atol=1e-5, rtol=1e-5)


class Adding(nn.Module):
    """A block that adds 2 to the second channel of all tokens."""

    def forward(self, x):
        return x + 2 * torch.eye(x.shape[2])[1]


def test_scorers_learn_by_gradient_which_tokens_gain_from_a_block():
    """What is wanted is the change of tokens whose first channel is above the median; that of others does harm."""
    backbone = network(depth=1, shares=(0.5, 1.0)).requires_grad_(False)
    images, half = torch.randn(64, *SHAPE), torch.zeros(64, 1, dtype=torch.int64)
    backbone.blocks[0], backbone.norm = Adding(), nn.Identity()
    x = backbone.begin(images).features[0]
    gains = x[:, :, 0] > x[:, :, 0].median()
    wanted = backbone._follow(backbone.begin(images), torch.where(gains.unsqueeze(2), backbone.blocks[0](x), x))[0]
    backbone.scorers.requires_grad_(True)
    optimizer = torch.optim.Adam(backbone.scorers.parameters(), lr=0.05)

    def found():
        return float(gains.gather(1, backbone.begin(images).features[2][:, :3]).float().mean())

    before = found()
    for _ in range(60):
        optimizer.zero_grad()
        (backbone(images, half) - wanted).square().mean().backward()
        optimizer.step()
    assert before < 0.75 and found() > 0.9, (before, found())


@torch.no_grad()
def test_leading_tokens_run_whenever_any_does():
    backbone = TokenModule(Transformer().eval(), (1, 8, 8), ["blocks.1"], shares=(0.25, 0.5, 1.0), leading=1)
    state = backbone.begin(torch.randn(5, 1, 8, 8))
    x, scores, order = (part.clone() for part in state.features)
    assert (order[:, 0] == 0).all() and (scores[:, 0] == 0).all()
    (end,) = backbone.advance(state, torch.zeros(5, dtype=torch.int64))
    best = order[:, 1:2]
    both = torch.cat([x[:, :1], x.take_along_dim(best.unsqueeze(2), 1)], 1)
    first = backbone.module.blocks[1](both)[:, 0]  # of two tokens, of which the class token counts in full
    expected = backbone.module.head(
        backbone.module.blocks[2](torch.cat([first.unsqueeze(1), other(x, both, backbone, best, scores)], 1))[:, 0]
    )
    torch.testing.assert_close(end.walk.outputs, expected)


def other(x, both, backbone, best, scores):
    """The tokens behind the class token after the block ran on it and on the best of them."""
    rest, ran = x[:, 1:].clone(), backbone.module.blocks[1](both)[:, 1]
    for row, place in enumerate(best[:, 0].tolist()):
        weight = 2 * torch.sigmoid(scores[row, place])
        rest[row, place - 1] = torch.lerp(rest[row, place - 1], ran[row], weight)
    return rest


def reader(places=None):
    """A network of token ids and their mask, whose answer is read off the first token."""
    torch.manual_seed(0)
    module = Reader(ids=True, tokens=7).eval()
    module.norm = nn.Sequential(module.norm, First())
    if places is not None:
        module.place = nn.Parameter(module.place[:places])
    return module


class First(nn.Module):
    def forward(self, x):
        return x[:, :1]


def of_reader(module, tokens):
    form = {"x": (tokens,), "mask": (tokens,)}
    return TokenModule(module, form, ["blocks.0", "blocks.2"], input_dtype=dict.fromkeys(form, "int64"), mask="mask")


@torch.no_grad()
def test_padding_is_as_if_it_were_not_there():
    """Rows beside longer ones give what the same network for texts of their length gives, and cost as much."""
    backbone, lengths = of_reader(reader(), 7), [7, 5, 2, 1, 6, 5]
    ids = torch.randint(11, (6, 7))
    inputs = {"x": ids, "mask": (torch.arange(7) < torch.tensor(lengths).unsqueeze(1)).long()}
    full = backbone.run_route(Named(inputs), backbone.dense_actions(6))
    torch.testing.assert_close(full.outputs, backbone.module(**inputs)["logits"])
    assert full.macs[0] == backbone.dense_macs
    route = torch.tensor([[1, 2], [2, 3], [3, 1], [2, 2], [1, 3], [2, 0]])
    walk = backbone.run_route(Named(inputs), route)
    assert backbone.ideal(Named(inputs), route)().shape == walk.outputs.shape
    gated = backbone.gated(Named(inputs), lambda state: nn.functional.one_hot(state.along(route), 4).float())
    torch.testing.assert_close(gated.outputs, walk.outputs)
    assert gated.macs.tolist() == gated.expected_macs.tolist() == walk.macs.tolist()
    for row, length in enumerate(lengths):
        if length < 5:  # too few for three shares
            continue
        short = of_reader(reader(length), length)
        short.scorers.load_state_dict(backbone.scorers.state_dict())
        alone = {name: x[row : row + 1, :length] for name, x in inputs.items()}
        expected = short.run_route(Named(alone), route[row : row + 1])
        torch.testing.assert_close(walk.outputs[row : row + 1], expected.outputs)
        assert walk.macs[row] - fixed(backbone) == expected.macs[0] - fixed(short)


def fixed(backbone):
    """The MACs of a row that runs no token in any block."""
    return backbone.start_macs + int(backbone.costs[:, 0].sum())


@pytest.mark.parametrize("blind", [False, True])
def test_a_mask_of_another_length_or_that_hides_nothing_is_refused(blind):
    module, form = reader(), {"x": (7,), "mask": (7 if blind else 9,)}
    if blind:
        for block in module.blocks:
            block.forward = partial(unmasked, block.forward)
    with pytest.raises(ValueError, match="no token sees padding" if blind else r"of shape \(7,\), got \(9,\)"):
        TokenModule(module, form, ["blocks.0"], input_dtype=dict.fromkeys(form, "int64"), mask="mask")


def unmasked(forward, mask, **given):
    return (*forward(mask=None, **given)[:2], mask)


class Placed(nn.Module):
    """A transformer whose block knows where in the row a token stands."""

    def __init__(self):
        super().__init__()
        self.block, self.head = (
            nn.Sequential(Encoder(4), nn.Flatten(1), nn.Linear(12, 12), nn.Unflatten(1, (3, 4))),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        return self.head(self.block(x).mean(1))


class Shifted(Placed):
    """A block that treats its first token otherwise, on any number of them."""

    class Shift(Encoder):
        def forward(self, x):
            return torch.cat([x[:, :1], super().forward(x)[:, 1:]], 1)

    def __init__(self):
        super().__init__()
        self.block = self.Shift(4)


@pytest.mark.parametrize(
    ("module", "shape", "block", "says"),
    [
        (Placed, (3, 4), "block", "any number of tokens"), (Shifted, (3, 4), "block", "wherever they stand"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(16, 2)), (1, 4, 4), "0", "tokens"),
    ],
)  # fmt: skip
def test_blocks_that_some_tokens_alone_mean_nothing_to_are_refused(module, shape, block, says):
    with pytest.raises(ValueError, match=f"expected blocks.*{says}"):
        TokenModule(module().eval(), shape, [block], leading=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        *(({"shares": shares}, "each of more of the 9 tokens, the last of all") for shares in (
            (), (1.0,), (0.5, 0.25, 1.0), (0.0, 0.5), (-0.5, 1.0), (0.5, 0.55, 1.0), (0.5, 2.0),
        )),
        ({"patch": 3}, "a power of 2"), ({"patch": 8}, "divides the sides 12x12"), ({"heads": 3}, "divide the width"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        network(**settings)


@torch.no_grad()
def test_a_report_has_a_row_for_tokens_by_chance_and_a_picture_of_what_ran(tmp_path):
    backbone = network()
    dataset = answered_by(backbone, 48)
    model = RoutedModel(backbone, make_policy(backbone, start=[2]), [(0.01, 0.9), (1.0, 0.2)])
    ground = Ground(backbone, dataset)
    report = measure(ground, [Learned(RunKind(), [model], ground)], batch_size=8, budgets=(0.5,))
    learned, chance = (
        [p for p in report["points"] if p["policy"] == name] for name in ("learned", "learned, parts by chance")
    )
    assert [p["macs_fraction"] for p in learned] == [p["macs_fraction"] for p in chance]
    assert [p["choice_rates"] for p in learned] == [p["choice_rates"] for p in chance]
    assert all(mine["mse"] != other["mse"] for mine, other in zip(learned, chance, strict=True))
    regions = report["usage"]["regions"]
    assert len(regions) == 16 and all(len(parts) == 5 for row in regions for parts in row)
    assert all(len(row) == 2 for row in regions)
    draw_regions(report["usage"], dataset.test, tmp_path / "regions.png")
    assert (tmp_path / "regions.png").read_bytes()[:4] == b"\x89PNG"


@torch.no_grad()
def test_reports_are_told_which_tokens_ran():
    backbone = network()
    images = torch.zeros(2, *SHAPE)
    images[:, :, 8:, 4:8] = 5  # of the last row of tokens, the second
    backbone.scorers.requires_grad_(False)
    for scorer in backbone.scorers:
        scorer.score.weight.zero_()  # what stands out has the highest scores
    first, second = backbone.regions(images, torch.tensor([[1, 0], [3, 2]]))
    assert [8, 4, 4, 4] in first[0] and len(first[0]) == 3 and first[1] == []
    assert second[0] == [[y, x, 4, 4] for y in (0, 4, 8) for x in (0, 4, 8)] and len(second[1]) == 5
    transformer = TokenModule(Transformer().eval(), (1, 8, 8), ["blocks.1"])  # whose class token is no part of an image
    ((ran,), (none,)) = transformer.regions(torch.randn(2, 1, 8, 8), torch.tensor([[2], [0]]))
    assert len(ran) == 2 and all(part[2:] == [4, 4] for part in ran) and none == []
