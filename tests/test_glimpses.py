"""Networks that look through windows: what each choice shows, by rules of its own; what is paid; what is learned on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynrl.backbones import END, Glimpses
from dynrl.data import Split
from dynrl.deploy import RoutedModel
from dynrl.evaluation import looking
from dynrl.evaluation.looking import Looking, fit_order
from dynrl.evaluation.scores import score
from dynrl.ops.backend import ops_mode
from dynrl.ops.crops import crops
from dynrl.plans import plan
from dynrl.policies import Router, StepSight

SIDE, LOOKS, EDGE = 8, 5, 26  # the edge is no multiple of anything


def network(**settings):
    torch.manual_seed(0)
    given = dict(input_shape=(2, EDGE, EDGE), classes=4, side=SIDE, scales=(1, 3), looks=LOOKS, width=4, hidden=6)
    return Glimpses(**given | settings).eval()


def images(rows=12):
    return torch.randn(rows, 2, EDGE, EDGE, generator=torch.Generator().manual_seed(1))


def windows():
    """The upper left corners and scales in order, by hand: halves of 24 pixels and of 8 pixels, up to the edge."""
    found = [(top, left, 3) for top in (0, 2) for left in (0, 2)]
    steps = (0, 4, 8, 12, 16, 18)
    return found + [(top, left, 1) for top in steps for left in steps]


def routes(backbone, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, backbone.num_choices - 1, generator=generator).topk(LOOKS, 1).indices + 1
    stop = torch.arange(rows) % (LOOKS + 1)
    return torch.where(torch.arange(LOOKS) < stop.unsqueeze(1), drawn, 0)


@torch.no_grad()
def test_rows_see_what_their_windows_show():
    backbone, inputs = network(), images()
    found = windows()
    assert backbone.num_choices == 1 + len(found)
    for seed in range(3):
        route = routes(backbone, len(inputs), seed)
        walk = backbone.run_route(inputs, route)
        for row, image in enumerate(inputs):
            seen = backbone.periphery(F.avg_pool2d(image.unsqueeze(0), 2))
            weight = backbone.attention(seen).exp()
            h = backbone.lead((seen * weight).sum((2, 3)) / weight.sum((2, 3))).tanh()
            looks = [action - 1 for action in route[row].tolist() if action]
            for window in looks:
                top, left, scale = found[window]
                shown = image[:, top : top + SIDE * scale, left : left + SIDE * scale]
                shown = shown.unflatten(1, (SIDE, scale)).unflatten(3, (SIDE, scale)).mean((2, 4))
                code = (backbone.encoder(shown.unsqueeze(0)) + backbone.place.weight[window]).relu()
                h = backbone.core(code, h)
            torch.testing.assert_close(walk.outputs[row], backbone.fc(h)[0], atol=1e-5, rtol=1e-5)
            assert walk.macs[row] == backbone.start_macs + len(looks) * int(backbone.costs[0, 1])


@pytest.mark.parametrize("mode", ["auto", "ref"])
@pytest.mark.parametrize("scales", [(1,), (2, 1, 3)])
def test_crops_are_means_of_the_pixels_in_their_windows(scales, mode):
    pictures = torch.randn(3, 2, 20, 16, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(scales).repeat(4)
    rows = torch.randint(3, scale.shape, generator=generator)
    top, left = (torch.randint(1 + edge - 12, scale.shape, generator=generator) for edge in (20, 16))
    with ops_mode(mode):
        taken = crops(pictures, rows, top, left, scale, 4)
        none = crops(pictures, rows[:0], top[:0], left[:0], scale[:0], 4)
    assert taken.shape == (len(rows), 2, 4, 4) and none.shape == (0, 2, 4, 4)
    for i, size in enumerate(scale.tolist()):
        for y, x in ((0, 0), (3, 1)):
            down, right = int(top[i]) + size * y, int(left[i]) + size * x
            wanted = pictures[rows[i], :, down : down + size, right : right + size].mean((1, 2))
            torch.testing.assert_close(taken[i, :, y, x], wanted)
    taken.sum().backward()
    assert float(pictures.grad.sum()) == pytest.approx(taken.numel(), rel=1e-4)


@torch.no_grad()
def test_an_untrained_policy_draws_windows_by_what_the_backbone_suggests():
    backbone, inputs = network(), images()
    state, router = backbone.begin(inputs), Router(StepSight.of(backbone), (0.1, 1.0))
    router.head.weight.zero_()
    attention = torch.bmm(backbone.likelihood(inputs).unsqueeze(1), backbone.shares.expand(len(inputs), -1, -1))
    router.trust.weight.fill_(2)  # so it weighs them by the square
    chances = router.scores(router.sight.see(backbone, state, 0.3)).softmax(1)
    wanted = torch.cat([torch.ones(len(inputs), 1), attention[:, 0].clamp_min(0.01) ** 2], 1)
    torch.testing.assert_close(chances, wanted / wanted.sum(1, keepdim=True))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 33), (24, 29)])
def test_brightness_is_the_mean_of_what_the_glance_sees_of_each_place(height, width):
    """Two cells of 3 pixels each way are a place; the last pixels of an image, which fill no cell, are in none."""
    backbone, inputs = Glimpses((1, height, width), 4), torch.rand(2, 1, height, width)
    light = (inputs - inputs.amin((2, 3), keepdim=True))[:, 0, : height // 3 * 3, : width // 3 * 3]
    means = [
        light[:, top : top + 6, left : left + 6].mean((1, 2))
        for top in range(0, light.shape[1], 6)
        for left in range(0, light.shape[2], 6)
    ]
    torch.testing.assert_close(backbone.brightness(inputs), torch.stack(means, 1))
    route = Looking(backbone, "brightest first", 1, torch.inf).route(inputs)
    assert route.shape == (2, backbone.columns) and (route > 0).all()


@torch.no_grad()
def test_a_window_is_looked_through_once():
    backbone, inputs = network(), images(3)
    state = backbone.begin(inputs)
    assert backbone.open_choices(state).all()
    seen = torch.tensor([2, 7, 2])
    (state,) = backbone.advance(state, seen)
    closed = ~backbone.open_choices(state)
    assert torch.equal(closed.nonzero(), torch.stack([torch.arange(3), seen], 1))
    walk = backbone.run_route(inputs, torch.full((3, LOOKS), 5))
    assert (walk.steps == LOOKS).all() and all(len(set(row)) == LOOKS for row in walk.route.tolist())


@torch.no_grad()
def test_policies_are_told_the_attention_that_is_left_in_each_window():
    backbone, inputs = network(), images(2)
    attention = backbone.likelihood(inputs)
    torch.testing.assert_close(attention.sum(1), torch.ones(2))
    pixels = attention.view(2, 7, 7).repeat_interleave(4, 1).repeat_interleave(4, 2) / 16
    state = backbone.begin(inputs)
    for _ in range(2):  # before the first look, and after one through the second window of scale 1
        told = backbone.observe(state)[:, -len(windows()) :]
        for window, (top, left, scale) in enumerate(windows()):
            inside = pixels[:, top : top + scale * SIDE, left : left + scale * SIDE].sum((1, 2))
            torch.testing.assert_close(told[:, window], inside.clamp_min(0.01).log(), atol=1e-4, rtol=1e-4)
        (state,) = backbone.advance(state, torch.tensor([6, 6]))
        pixels[:, 0:8, 4:12] *= 0.2


@torch.no_grad()
def test_the_full_route_looks_at_everything_first():
    backbone = Glimpses((1, 48, 48), looks=9)
    corners = [tuple(backbone.corners[i - 1].tolist()) for i in backbone.full_route]
    assert corners[:4] == [(0, 0), (0, 24), (24, 0), (24, 24)] and set(corners[4:]) == {
        (0, 12), (12, 0), (12, 12), (12, 24), (24, 12)
    }  # fmt: skip
    assert (backbone.scale[[i - 1 for i in backbone.full_route]] == 2).all()


def test_reports_are_told_where_it_looked():
    regions = network().regions(images(2), torch.tensor([[5, 2, 0, -1, -1], [0, -1, -1, -1, -1]]))
    assert regions == [[[[0, 0, SIDE, SIDE]], [[0, 2, 3 * SIDE, 3 * SIDE]]], []]


def test_it_learns_after_every_look():
    backbone, inputs = network(), images(8)
    (answers,) = backbone.training_outputs(inputs, torch.linspace(0, 1, 8), torch.Generator().manual_seed(0))
    assert len(answers) == LOOKS + 2 and all(len(answer.rows) == 8 for answer in answers)
    dense = backbone.run_route(inputs, backbone.dense_actions(8)).outputs
    torch.testing.assert_close(answers[-1].output[7], dense[7], atol=1e-5, rtol=1e-5)
    ((last,),) = backbone.training_outputs(inputs, None)
    torch.testing.assert_close(last.output, dense, atol=1e-5, rtol=1e-5)
    h, _, weights = backbone._glance(inputs[7:])
    parts = torch.tensor(backbone.full_route) - 1
    codes = backbone._codes(inputs[7:], torch.zeros(LOOKS, dtype=torch.int64), parts)
    soft = backbone.fc(backbone.core(weights[:, parts] / weights[:, parts].sum() @ codes, h))
    torch.testing.assert_close(answers[1].output[7:], soft, atol=1e-5, rtol=1e-5)
    sum(answer.output.square().sum() for answer in answers).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())


def test_looks_are_drawn_by_attention_the_more_the_higher_the_rate():
    mass = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(20_000, 4)
    for rate, shares in ((0.0, [0.25] * 4), (0.5, [0.1, 0.2, 0.3, 0.4]), (1.0, [0.0, 0.0, 0.0, 1.0])):
        drawn = Glimpses._drawn(mass, torch.full((20_000,), rate), 3, torch.Generator().manual_seed(0))
        first = torch.bincount(drawn[:, 0], minlength=4) / 20_000
        torch.testing.assert_close(first, torch.tensor(shares), atol=0.015, rtol=0)
        assert all((drawn[:, i] != drawn[:, j]).all() for i, j in ((0, 1), (0, 2), (1, 2)))


@torch.no_grad()
def test_rules_look_where_most_is_left():
    backbone = network()
    inputs = torch.zeros(3, 2, EDGE, EDGE)
    spots = ((1, 17, 3.0), (14, 3, 2.0), (9, 9, 1.0))  # within places of 4 x 4 pixels, from bright to dim
    for top, left, light in spots:
        inputs[:, :, top : top + 2, left : left + 2] = light
    route = Looking(backbone, "brightest first", 1, 1.0).route(inputs)
    for look, (top, left, _) in enumerate(spots):
        y, x, scale = windows()[int(route[0, look]) - 1]
        assert scale == 1 and y <= top <= y + SIDE - 2 and x <= left <= x + SIDE - 2
    walk = RoutedModel(backbone, Looking(backbone, "brightest first", 1, 0.0)).walk(inputs)
    assert (walk.steps == 1).all() and (walk.macs == backbone.start_macs).all()


@pytest.mark.parametrize("order", Glimpses.orders)
def test_rules_keep_to_their_budgets(order):
    backbone, inputs = network(), images(200)
    split = Split(inputs, torch.arange(200) % 4)
    within = fit_order(backbone, split, order)
    assert within(0.0) is None
    for budget in (0.3, 0.6, 1.0):
        found = within(budget)
        assert score(RoutedModel(backbone, found), split).macs_fraction <= budget + 1e-6 + 0.05 * (
            order == "random places"
        )


def test_rules_are_charged_the_looks_that_they_take(monkeypatch):
    """The coarse scale has fewer windows than a row may take looks."""
    backbone, inputs = network(), images(40)
    split, offers = Split(inputs, torch.arange(40) % 4), []
    monkeypatch.setattr(looking, "best_within", lambda found, task: offers.extend(found))
    fit_order(backbone, split, "brightest first")
    never = [found for found in offers if found.what.threshold == torch.inf]
    assert {found.what.scale for found in never} == {1, 3} and int((backbone.scale == 3).sum()) < LOOKS
    for found in never:
        spent = score(RoutedModel(backbone, found.what), split).macs_fraction
        assert found.macs_fraction == pytest.approx(spent)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"side": 6}, "multiple of 4"), ({"scales": (1, 4)}, "fits in"), ({"scales": (2, 1)}, "scales that rise"),
        ({"looks": 41}, "looks"), ({"classes": 1}, "classes"), ({"input_shape": (2, 4800, 4800)}, "larger side"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        network(**settings)


def test_gates_are_refused():
    with pytest.raises(ValueError, match="Glimpses has no gates"):
        plan("look", agent="gate")


def test_stops_end_walks():
    backbone = network()
    state = backbone.begin(images(2))
    (ended,) = backbone.advance(state, torch.zeros(2, dtype=torch.int64))
    assert ended.point == END
