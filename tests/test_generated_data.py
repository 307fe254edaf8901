"""Generated data sets: by their rules, recomputed from the inputs alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dynrl.data import load_dataset
from dynrl.data.hops import hops
from dynrl.data.images import digit_images
from dynrl.data.photos import GARMENTS, WINDOW, _windows
from dynrl.data.scenes import Page, View, draw_pages, draw_scenes, draw_views, resized
from dynrl.data.scenes import Scene as Scenery
from dynrl.data.sequences import prefix
from dynrl.data.traces import COLOURS, Scene, trace_images


def end_of_the_marked_curve(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The colour at the other end of the curve that begins white, and the steps to it, pixel by pixel."""
    pixels = {(int(y), int(x)) for y, x in np.argwhere(image.sum(0) > 0)}
    (start,) = [at for at in pixels if image[:, at[0], at[1]].sum() == 3]
    way, at = [start], start
    while True:
        y, x = at
        beside = [p for p in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)) if p in pixels and p not in way]
        if not beside:
            return image[:, at[0], at[1]], len(way) - 1
        assert len(beside) == 1, "a curve touches itself or another"
        at = beside[0]
        way.append(at)


def test_a_traced_curve_ends_at_the_colour_that_is_the_class():
    scene = Scene(side=16, strands=4, longest=20)
    images, classes, steps = trace_images(scene, 60, seed=3)
    for image, label, length in zip(images.numpy(), classes.tolist(), steps.tolist(), strict=True):
        colour, walked = end_of_the_marked_curve(image)
        np.testing.assert_array_equal(colour, COLOURS[label])
        assert walked == length
    again = trace_images(scene, 60, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again, (images, classes, steps), strict=True))
    assert not torch.equal(trace_images(scene, 60, seed=4)[0], images)


def test_length_says_nothing_of_the_class():
    _, classes, steps = trace_images(Scene(side=16, strands=4, longest=20), 4_000, seed=0)
    assert steps.min() >= 2 and steps.max() == 20
    assert 0.4 < (steps <= 5).float().mean() < 0.7
    means = torch.stack([steps[classes == c].float().mean() for c in range(len(COLOURS))])
    assert (means - steps.float().mean()).abs().max() < 0.8
    assert torch.bincount(classes).min() > 4_000 / len(COLOURS) * 0.85


def test_parity_is_of_the_bits_that_count():
    data = prefix()
    for split in (data.train, data.test, data.anew(0)):
        bits, counts = split.inputs.unbind(2)
        assert torch.equal(split.targets, ((bits == 1) & (counts == 1)).sum(1) % 2)
        assert torch.equal(split.difficulty["length"], counts.sum(1))
        assert (bits[counts == 0] == 0).all()
    assert not torch.equal(data.anew(0).inputs, data.anew(1).inputs)
    assert torch.equal(data.anew(1).inputs, data.anew(1).inputs)


def test_hops_lead_to_the_class():
    data = hops()
    for split in (data.test.head(300), data.anew(0).head(300)):
        met = set()
        for row, label, count in zip(split.inputs, split.targets, split.difficulty["hops"], strict=True):
            links, asked = row[:, :12], row[:, 12:]
            (start,), (number,) = asked.nonzero(as_tuple=True)
            at, way = int(start), []
            for _ in range(int(number) + 1):
                way.append(at)
                (at,) = links[at].nonzero().flatten().tolist()
            way.append(at)
            assert label == at and number + 1 == count and len(set(way)) == len(way), "no place is met twice"
            met.add((int(start), int(label), int(count)))
        assert len(met) > 200
    assert not torch.equal(data.anew(0).inputs, data.anew(1).inputs)


def test_a_share_of_windows_shows_a_garment_and_all_else_is_photograph():
    """Photographs are grey 0.5 and garments are white: what is neither was never there."""
    photos, garments = [np.full((40, 60), 0.5, np.float32)], torch.ones(3, 1, 28, 28)
    split = _windows(photos, garments, 0.05, 200, seed=0)
    assert split.inputs.shape == (200, 1, WINDOW, WINDOW) and int(split.targets.sum()) == 10 == 200 * split.task.share
    assert torch.equal((255 * split.inputs).round() / 255, split.inputs)
    grey = (split.inputs - 0.5).abs() < 1 / 255
    assert grey[split.targets == 0].all()
    shown = ~grey[split.targets == 1, 0]
    for image, white in zip(split.inputs[split.targets == 1, 0], shown, strict=True):
        rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
        assert len(rows) == len(columns) == int(rows.max() - rows.min()) + 1 and GARMENTS[0] <= len(rows) <= GARMENTS[1]
        assert image[white].std() < 1e-6, "of one brightness"
    assert not torch.equal(_windows(photos, garments, 0.05, 200, seed=1).targets, split.targets)


@pytest.mark.parametrize(
    ("name", "hard"),
    [
        ("trace-small", "length"), ("prefix", "length"), ("hops", "hops"), ("digit-scenes", "clutter"),
        ("digit-pages", "digits"), ("shapes", "modules"),
    ],
)  # fmt: skip
def test_what_makes_an_input_hard_goes_along(name, hard):
    data = load_dataset(name)
    head = data.test.head(7).to(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(head.difficulty[hard], data.test.difficulty[hard][:7])
    assert data.anew(5).inputs.shape == data.train.inputs.shape


def test_a_scene_holds_one_whole_thing_and_pieces_of_others():
    scene = Scenery(side=32, sizes=(8, 12), pieces=3, piece=4)
    things = torch.ones(5, 1, 8, 8)
    images, difficulty = draw_scenes(things, scene, torch.arange(400) % 5, seed=0)
    assert images.shape == (400, 1, 32, 32)
    for image, size, pieces in zip(
        images[:, 0], *(difficulty[name].int() for name in ("size", "clutter")), strict=True
    ):
        lit = image > 0.3  # what is resized fades within a pixel of its edge
        if pieces == 0:
            rows, columns = lit.any(1).nonzero(), lit.any(0).nonzero()
            assert lit.sum() == size**2 and rows[-1] - rows[0] == columns[-1] - columns[0] == size - 1
        assert size**2 <= lit.sum() <= size**2 + 16 * pieces and 0.6 <= image.max() <= 1
    assert torch.equal(difficulty["size"].unique(), torch.arange(8.0, 13))
    assert torch.equal(difficulty["clutter"].unique(), torch.arange(4.0))
    assert torch.equal(draw_scenes(things, scene, torch.arange(400) % 5, seed=0)[0], images)


def test_a_view_shows_whole_things_of_one_size_whose_pixels_have_their_classes():
    view = View(side=24, sizes=(4, 16), share=0.4, most=5, texture=0.2, patch=4)
    things, classes = torch.ones(3, 1, 8, 8), torch.tensor([0, 4, 7])
    images, labels, hard = draw_views(things, classes, view, 300, seed=0)
    assert images.shape == (300, 1, 24, 24) and labels.shape == (300, 24, 24)
    for image, label, (size, number, texture) in zip(images[:, 0], labels, hard.tolist(), strict=True):
        assert number == min(5, max(1, int(0.4 * 24**2 / size**2)))
        shown = label > 0
        assert set(label.unique().tolist()) <= {0, 1, 5, 8} and shown.sum() == number * size**2, "none hides another"
        assert image[shown].min() >= 0.3 and image[~shown].max() <= max(texture, 0.3) + 1e-6
        squares = F.avg_pool2d(shown[None, None].float(), int(size), 1)[0, 0]
        assert (squares == 1).sum() >= number, "each is whole"
    assert torch.equal(hard[:, 0].unique(), torch.arange(4.0, 17))
    again = draw_views(things, classes, view, 300, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(again, (images, labels, hard), strict=True))
    assert not torch.equal(draw_views(things, classes, view, 300, seed=1)[1], labels)


def test_a_page_shows_whole_things_in_cells_of_their_own_and_mostly_few():
    page, things = Page(across=4, cell=10, sizes=(5, 8)), torch.ones(3, 1, 8, 8)
    images, shown = draw_pages(things, page, 3000, seed=0)
    assert (
        images.shape == (3000, 1, 40, 40)
        and shown.shape == (3000, 16)
        and set(shown.unique().tolist()) == {-1, 0, 1, 2}
    )
    lit = (images[:, 0] > 0.3).view(3000, 4, 10, 4, 10).transpose(2, 3).reshape(3000 * 16, 10, 10)
    sides = lit.any(1).sum(1)
    assert torch.equal(sides > 0, shown.flatten() >= 0) and torch.equal(sides.unique(), torch.tensor([0, 5, 6, 7, 8]))
    assert torch.equal(lit.sum((1, 2)), sides**2) and torch.equal(lit.any(2).sum(1), sides), "each is a whole square"
    numbers = (shown >= 0).sum(1)
    for few in (1, 4, 9):  # so a uniform logarithm has it, within four deviations
        assert abs((numbers <= few).float().mean() - math.log(few + 1) / math.log(17)) < 4 * 0.5 / 3000**0.5
    assert numbers.min() == 1 and numbers.max() == 16
    assert torch.equal(draw_pages(things, page, 3000, seed=0)[0], images)
    assert not torch.equal(draw_pages(things, page, 3000, seed=1)[1], shown)


def test_the_even_digits_of_a_page_are_counted():
    """Each cell is compared with all digits of the split, in all sizes and places; the most alike is the one shown."""
    data, ((things, labels), *_, (others, known)) = load_dataset("digit-pages"), digit_images()
    for split, digits, classes in ((data.anew(7).head(60), things, labels), (data.test.head(60), others, known)):
        small = resized(digits, 8, np.full(len(digits), 7), np.zeros((2, len(digits))))
        bank = torch.cat([digits, *(small.roll(move, (2, 3)) for move in ((0, 0), (0, 1), (1, 0), (1, 1)))]).flatten(1)
        images = split.inputs * data.deviation + data.mean
        cells = F.unfold(images, 8, stride=8).transpose(1, 2)  # [60, 16, 64]
        norm = cells.norm(dim=2)
        alike, best = ((cells / norm.clamp_min(0.1).unsqueeze(2)) @ (bank / bank.norm(dim=1, keepdim=True)).t()).max(2)
        there = norm > 0.1
        assert alike[there].min() > 0.999 and torch.equal(there.sum(1), split.difficulty["digits"].long())
        assert torch.equal(((classes.repeat(5)[best] % 2 == 0) & there).sum(1), split.targets)
    assert data.classes == 17 and int(data.train.targets.max()) <= 16


def test_scenes_show_each_thing_under_its_own_class():
    data, ((things, labels), *_, (others, known)) = load_dataset("digit-scenes"), digit_images()
    for split, shown, classes in ((data.anew(7).head(200), things, labels), (data.test.head(200), others, known)):
        big = F.interpolate(shown, size=16, mode="bilinear").flatten(1)
        big = big / big.norm(dim=1, keepdim=True)
        plain = (split.difficulty["clutter"] == 0) & (split.difficulty["size"] == 16)
        assert plain.any()
        for image, target in zip(split.inputs[plain] * data.deviation + data.mean, split.targets[plain], strict=True):
            windows = F.unfold(image.unsqueeze(0), 16)[0]
            alike = big @ windows / image.norm()
            assert alike.max() > 0.97 and classes[alike.amax(1).argmax()] == target
