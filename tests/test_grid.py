"""Grids of scales beyond what every backbone is tested for: where maps stand, closed ways, answers for each pixel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynrl.backbones import END, ScaleGrid
from dynrl.data import Split
from dynrl.data.base import Augmentation
from dynrl.evaluation.routes import random_rate
from dynrl.routes import draw_routes
from dynrl.tasks import Segmentation
from tests.cases import trained

SHAPE = dict(input_shape=(2, 18, 14), classes=3, layers=4, widths=(4, 6, 8), stem_stride=2)  # maps 9x7, 5x4, 3x2
DOWN, KEEP, UP = range(3)
ROWS = 40


def make() -> ScaleGrid:
    torch.manual_seed(0)
    return trained(ScaleGrid(**SHAPE))


def inputs_of(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, 2, 18, 14, generator=torch.Generator().manual_seed(1))


def one_by_one(grid, x, route):
    """What one row gets, layer by layer, by the network's parts; and the scales at which it is met."""
    names = [point.name for point in grid.points]
    image, scale, met = x.unsqueeze(0), 0, []
    x = grid.stem(image)
    for layer in range(4):
        at = names.index(f"layer{layer + 1}.scale{scale}")
        choice = min(max(route[at], KEEP if scale == 2 else DOWN), KEEP if scale == 0 else UP)
        met.append(scale)
        scale += 1 - choice
        cell = grid.cells[at][choice]
        if choice == UP:
            size = {0: (9, 7), 1: (5, 4)}[scale]
            x = cell.block(F.interpolate(cell.narrow(x), size=size))
        else:
            x = cell(x)
    met.append(scale)
    return (F.interpolate(grid.heads[scale](x), size=(18, 14), mode="bilinear") + grid.edges(image))[0], met


@pytest.mark.parametrize("fast", [False, True])
@torch.no_grad()
def test_a_row_goes_where_its_choices_lead_and_answers_for_each_pixel(fast):
    grid, inputs = make(), inputs_of()
    run = grid.for_inference().for_inference() if fast else grid
    scales = set()
    for route in [torch.full((ROWS, grid.columns), c) for c in range(3)] + [torch.randint(3, (ROWS, grid.columns))]:
        walk = run.run_route(inputs.clone(), route)
        for row, (x, choices) in enumerate(zip(inputs, route.tolist(), strict=True)):
            expected, met = one_by_one(grid, x, choices)
            torch.testing.assert_close(walk.outputs[row], expected, atol=1e-4, rtol=1e-4)
            ran = walk.route[row]
            assert [grid.points[at].name for at in (ran >= 0).nonzero().flatten()] == [
                f"layer{layer + 1}.scale{scale}" for layer, scale in enumerate(met[:-1])
            ]
            assert [1 - c for c in ran[ran >= 0].tolist()] == [b - a for a, b in zip(met, met[1:], strict=False)]
            scales.update(met)
    assert scales == {0, 1, 2} and walk.outputs.shape == (ROWS, 3, 18, 14)


@torch.no_grad()
def test_maps_that_meet_are_weighted_means_and_answers_of_all_ways_add_up():
    """By hand, over two layers and two scales: all shares that come to one cell are one map."""
    torch.manual_seed(0)
    grid = trained(ScaleGrid((1, 8, 8), 2, layers=2, widths=(3, 4), stem_stride=1))
    inputs, gates = torch.randn(5, 1, 8, 8), torch.rand(5, 3, 3)
    first, fine, coarse = gates.unbind(1)
    (down, keep), wide = first.softmax(1)[:, :2].unbind(1), (-1, 1, 1, 1)
    keep = keep + first.softmax(1)[:, UP]  # the way up from the finest scale is closed: it stays
    x = grid.stem(inputs)
    parts = []
    for share, point, scale, gate in ((keep, 1, 0, fine), (down, 2, 1, coarse)):
        came = grid.cells[0][KEEP if scale == 0 else DOWN](x)
        gate, opened = gate.softmax(1), (DOWN, KEEP) if scale == 0 else (KEEP, UP)
        closed = UP if scale == 0 else DOWN
        for choice in opened:
            weight = share * (gate[:, choice] + (gate[:, closed] if choice == KEEP else 0))
            parts.append(weight.view(wide) * grid._answer(scale + 1 - choice, grid.cells[point][choice](came), inputs))
    walk = grid.gated(inputs, lambda state: state.along(gates.softmax(2)))
    torch.testing.assert_close(walk.outputs, sum(parts))
    met = trained(ScaleGrid((1, 8, 8), 2, layers=3, widths=(3, 4), stem_stride=1))
    even, seen = torch.tensor([0.5, 0.5, 0.0]).expand(5, 3), {}

    def choose(state):
        seen[state.point] = state.features, state.walk.weight
        return even

    met.gated(inputs, choose)
    x = met.stem(inputs)
    fine, coarse = met.cells[0][KEEP](x), met.cells[0][DOWN](x)
    # Half of the fine map goes down, and all of the coarse one stays, where down is closed.
    expected = (0.25 * met.cells[1][DOWN](fine) + 0.5 * met.cells[2][KEEP](coarse)) / 0.75
    torch.testing.assert_close(seen[4][0], expected)
    torch.testing.assert_close(seen[4][1], torch.full((5,), 0.75))


@torch.no_grad()
def test_a_finer_scale_is_dearer_and_the_full_route_stays_at_the_finest():
    grid, inputs = make(), inputs_of()
    constant = dict(grid.constant_routes())
    assert list(constant) == ["scale 0", "scale 1", "scale 2"]
    macs = [int(grid.run_route(inputs, torch.tensor([r] * ROWS)).macs[0]) for r in constant.values()]
    assert macs[0] == grid.dense_macs > macs[1] > macs[2]
    routes = draw_routes(grid.thrift, torch.linspace(0, 1, 300), torch.Generator().manual_seed(0))
    walk = grid.run_route(inputs_of(300), routes)
    assert walk.macs[0] == macs[2] and walk.macs[-1] == macs[0]
    taken = walk.route >= 0
    assert (routes[taken] == walk.route[taken]).all(), "no closed choice is drawn"
    assert random_rate(grid, inputs, 0.6) is not None
    assert {grid.leads_to(column, choice) for column in range(grid.columns) for choice in range(3)} >= {END}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"widths": (4,)}, "2 to 8 scales"), ({"layers": 0}, "layers of at least 1"),
        ({"widths": (4, 6, 8, 8)}, "2x2 cells at the coarsest"), ({"input_shape": (18, 14)}, "expected images"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ScaleGrid(**{**SHAPE, **settings})


def test_maps_of_classes_are_changed_like_their_images():
    images = torch.zeros(30, 1, 16, 16)
    images[:, :, 4:10, 5:9] = 1.0
    split = Split(images, 2 * images[:, 0].long(), Segmentation())
    change = Augmentation(flip=True, shift=3)
    moved, targets = change.rows(split, torch.arange(30), torch.Generator().manual_seed(0))
    assert targets.dtype == torch.int64 and not torch.equal(targets, split.targets)
    assert torch.equal(targets, 2 * moved[:, 0].round().long())
