"""Grids of scales beyond what every backbone is tested for: where maps stand, closed ways, answers for each pixel."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import dynrl
from dynrl.backbones import END, ScaleGrid
from dynrl.data import Augmentation, Dataset, Split
from dynrl.deploy import RoutedModel
from dynrl.evaluation.routes import random_rate
from dynrl.evaluation.scores import pictures
from dynrl.routes import draw_routes
from dynrl.tasks import Segmentation
from tests.cases import make_policy, trained
from tests.exported import as_exported

SHAPE = dict(input_shape=(2, 18, 14), classes=3, layers=4, scales=3, width=5, stem_stride=2)  # maps 9x7, 5x4, 3x2
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
        if choice == UP:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : (9, 5)[scale], : (7, 4)[scale]]
        elif choice == DOWN:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        x = grid.cells[at][choice].block(x)
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
            assert [1 - c for c in ran[ran >= 0].tolist()] == [b - a for a, b in pairwise(met)]
            scales.update(met)
    assert scales == {0, 1, 2} and walk.outputs.shape == (ROWS, 3, 18, 14)


@torch.no_grad()
def test_maps_that_meet_are_weighted_means_and_answers_of_all_ways_add_up():
    """By hand, over two layers and two scales: all shares that come to one cell are one map."""
    torch.manual_seed(0)
    grid = trained(ScaleGrid((1, 8, 8), 2, layers=2, scales=2, width=3, stem_stride=1))
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
    met = trained(ScaleGrid((1, 8, 8), 2, layers=3, scales=2, width=3, stem_stride=1))
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


@torch.no_grad()
def test_policies_see_how_much_detail_a_coarser_scale_would_lose():
    """A map that is made of 2x2 squares loses nothing; one of single cells loses all that is not its mean."""
    grid = make()
    coarse = torch.rand(3, 5, 5, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :9, :7]
    fine = ((torch.arange(9).view(-1, 1) + torch.arange(7)) % 2).float().expand(3, 5, 9, 7)
    for x, lost in ((coarse, 0.0), (fine[:, :, :8, :6], 0.5)):
        state = grid.begin(inputs_of(3))
        state.features = x
        means, detail, beyond = grid.observe(state).split(5, 1)
        torch.testing.assert_close(means, x.mean((2, 3)))
        seen = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        back = F.avg_pool2d(seen, 2, ceil_mode=True, count_include_pad=False)
        back = back.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : seen.shape[2], : seen.shape[3]]
        torch.testing.assert_close(beyond, (seen - back).abs().mean((2, 3)))
        torch.testing.assert_close(detail, torch.full((3, 5), lost), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_ideal_runs_as_many_rows_in_each_cell_as_the_route():
    grid, inputs = make(), inputs_of()
    ran = []
    for point, cells in enumerate(grid.cells):
        for choice, cell in enumerate(cells):
            cell.register_forward_hook(lambda _, given, __, key=(point, choice): ran.append((key, len(given[0]))))
    for route in (grid.dense_actions(ROWS), torch.randint(3, (ROWS, grid.columns))):
        grid.run_route(inputs.clone(), route)
        walked = sorted(ran)
        ran.clear()
        grid.ideal(inputs, route)()
        assert sorted(ran) == walked
        ran.clear()


@torch.no_grad()
def test_an_exported_grid_runs_where_rows_part_and_where_no_row_goes(tmp_path):
    torch.manual_seed(0)
    grid = trained(ScaleGrid((1, 8, 8), 3, layers=2, scales=2, width=4, stem_stride=1))
    inputs = 3 * torch.rand(40, 1, 1, 1) * torch.randn(40, 1, 8, 8)
    torch.manual_seed(5)
    policy = make_policy(grid, hidden=0)
    torch.nn.init.normal_(policy.head.weight, std=5.0)
    policy.head.bias.zero_()
    model = RoutedModel(grid, policy)
    expected, program = model(inputs), as_exported(model, tmp_path / "model.onnx")
    routes = model.last_route.actions
    ways = routes.unique(dim=0)
    assert len(ways) > 2
    for chosen in (torch.ones(40, dtype=torch.bool), *((routes == way).all(1) for way in ways)):
        for count in (1, 2, 40):
            got = program(inputs[chosen][:count])
            torch.testing.assert_close(got, expected[chosen][:count], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_coarser_scale_begins_as_what_the_finest_knows():
    """A constant image looks alike at every scale, so all routes through copied cells say the same away from edges."""
    grid = trained(ScaleGrid((1, 64, 64), 3, layers=3, scales=3, width=4, stem_stride=1))
    image, routes = torch.full((40, 1, 64, 64), 0.7), draw_routes(grid.thrift, torch.rand(40))
    before = grid(image)
    grid.open_up()
    assert torch.equal(grid(image), before), "the full route stays as it was"
    middle = grid(image, routes)[:, :, 31:33, 31:33]
    torch.testing.assert_close(middle, before[:, :, 31:33, 31:33])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scales": 1}, "scales of at least 2"), ({"layers": 0}, "layers of at least 1"),
        ({"scales": 4}, "2x2 cells at the coarsest"), ({"input_shape": (18, 14)}, "expected images"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ScaleGrid(**{**SHAPE, **settings})


def two_kinds(grid: ScaleGrid) -> Dataset:
    """Bright images whose pixels' classes are what the finest scale says, and dark ones with those of the coarsest."""
    bright = torch.arange(120) % 2
    images = torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(2)) + 4 * bright.view(-1, 1, 1, 1) - 2
    routes = dict(grid.constant_routes())
    taken = torch.tensor([routes["scale 1"], routes["scale 0"]])[bright]
    with torch.no_grad():
        classes = grid(images, taken).argmax(1)
    splits = [Split(images.clone(), classes, Segmentation(), {"bright": bright.float()}) for _ in range(3)]
    return Dataset("two kinds of maps", 4, *splits, Augmentation())


def test_two_kinds_of_images_get_two_scales_and_a_report_shows_their_maps(tmp_path):
    torch.manual_seed(3)
    grid = trained(ScaleGrid((1, 8, 8), 4, layers=2, scales=2, width=4, stem_stride=1))
    for head in grid.heads:
        torch.nn.init.normal_(head.weight, std=20.0)
    data = two_kinds(grid)
    run = dynrl.train(
        grid, data, out=tmp_path / "run", pretrain=False, reward="correct", steps=8_000, price_range=(0.01, 0.05),
        hidden=16, num_envs=60,
    )  # fmt: skip
    model = run.model
    model.set_price(0.01)
    answers = model(data.test.inputs)
    assert float(data.task.score(answers, data.test.targets).mean()) > 0.95
    fine = model.last_route.macs_fraction - model.last_route.router_fraction > 0.99
    assert torch.equal(fine, data.test.difficulty["bright"] == 1)
    report = dynrl.evaluate(run, out=tmp_path / "report", batch_size=8, budgets=(0.6,))
    assert report["metric"] == "miou" and report["usage"]["groups"][0]["class"] is None
    assert (tmp_path / "report" / "report.png").stat().st_size > 10_000
    shown = pictures(model, data.test, [3, 1])
    assert torch.equal(shown["target"], data.test.targets[[3, 1]]) and shown["routed"].shape == (2, 4, 8, 8)


def test_maps_of_classes_are_changed_like_their_images():
    images = torch.zeros(30, 1, 16, 16)
    images[:, :, 4:10, 5:9] = 1.0
    split = Split(images, 2 * images[:, 0].long(), Segmentation())
    change = Augmentation(flip=True, shift=3)
    moved, targets = change.rows(split, torch.arange(30), torch.Generator().manual_seed(0))
    assert targets.dtype == torch.int64 and not torch.equal(targets, split.targets)
    assert torch.equal(targets, 2 * moved[:, 0].round().long())
