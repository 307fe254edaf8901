"""Networks that look at frames: what each look shows, what is known without one, and a policy by the marks."""

from __future__ import annotations

import pytest
import torch

from dynrl.backbones import END, Frames
from dynrl.data import load_dataset
from dynrl.deploy import RoutedModel
from dynrl.evaluation.looking import Looking

FRAMES, NUMBERS, PEEK, LOOKS, ROWS = 6, 5, 2, 4, 9


def network(**settings):
    torch.manual_seed(0)
    given = dict(input_shape=(FRAMES, NUMBERS), classes=3, peek=PEEK, looks=LOOKS, width=7, hidden=8)
    return Frames(**given | settings).eval()


def clips(seed=0):
    return torch.randn(ROWS, FRAMES, NUMBERS, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_answer_is_made_of_the_frames_looked_at_and_what_is_known_of_all():
    backbone, inputs = network(), clips()
    route = torch.rand(ROWS, FRAMES).topk(LOOKS, 1).indices + 1
    route = torch.where(torch.arange(LOOKS) < (torch.arange(ROWS) % (LOOKS + 1)).unsqueeze(1), route, 0)
    walk = backbone.run_route(inputs, route)
    for row, clip in enumerate(inputs):
        h = backbone.lead(backbone.glance(clip[:, :PEEK]).relu().mean(0)).tanh().unsqueeze(0)
        looks = [action - 1 for action in route[row].tolist() if action]
        for frame in looks:
            h = backbone.core((backbone.encoder(clip[frame]) + backbone.place.weight[frame]).relu().unsqueeze(0), h)
        torch.testing.assert_close(walk.outputs[row], backbone.fc(h)[0], atol=1e-5, rtol=1e-5)
        assert walk.macs[row] == backbone.start_macs + len(looks) * int(backbone.costs[0, 1])
    for twin in backbone.dense_twins(inputs).values():
        torch.testing.assert_close(twin(), backbone(inputs), atol=1e-5, rtol=1e-5)
    assert int(backbone.costs[0, 1]) == 7 * (NUMBERS + 8) + 3 * 8 * 16 + 8 * 3
    hidden = inputs.clone()
    unseen = torch.ones(ROWS, FRAMES + 1, dtype=torch.bool).scatter(1, route, False)[:, 1:]
    hidden[:, :, PEEK:][unseen] = torch.nan
    assert torch.equal(backbone.run_route(hidden, route).outputs, walk.outputs), "no other frame is read"


@torch.no_grad()
def test_policies_are_told_what_is_known_of_all_frames():
    backbone, inputs = network(), clips()
    state = backbone.begin(inputs)
    (state,) = backbone.advance(state, torch.full((ROWS,), 3))
    told = backbone.observe(state)
    known = inputs[:, :, :PEEK].clone()
    known[:, 2] = 0  # looked at already
    assert torch.equal(told[:, -FRAMES * PEEK :], known.flatten(1))
    assert (~backbone.open_choices(state)).nonzero()[:, 1].tolist() == [3] * ROWS
    (ended,) = backbone.advance(state, torch.zeros(ROWS, dtype=torch.int64))
    assert ended.point == END and backbone.full_route == (1, 2, 3, 4) and network(looks=0).columns == FRAMES


@torch.no_grad()
def test_the_rule_looks_at_the_liveliest_frames_first():
    backbone, inputs = network(), clips()
    walk = RoutedModel(backbone, Looking(backbone, "liveliest first", 1, torch.inf)).walk(inputs)
    assert torch.equal(walk.route - 1, inputs[:, :, :PEEK].sum(2).topk(LOOKS, 1).indices)


def test_clips_ask_for_the_marked_frames_only():
    data = load_dataset("clips")
    for split in (data.test, data.anew(0)):
        marked = split.inputs[:, :, 0] > 0.5
        assert torch.equal(marked.sum(1), split.difficulty["marked frames"])
        assert marked.sum(1).min() == 1 and marked.sum(1).max() == 4
        # The signs' vectors are what frames of a lone mark show on average; every frame shows the nearest.
        alone = marked.sum(1) == 1
        shown = split.inputs[alone][marked[alone]][:, 1:]
        signs = torch.stack([shown[split.targets[alone] == sign].mean(0) for sign in range(5)])
        nearest = torch.cdist(split.inputs[:, :, 1:], signs).argmin(2)
        highest = nearest.masked_fill(~marked, 0).amax(1)
        assert (highest == split.targets).float().mean() > 0.999
    assert not torch.equal(data.anew(0).inputs, data.anew(1).inputs)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"input_shape": (3, 4, 5)}, "frames, numbers"), ({"peek": 6}, "peek"), ({"looks": 7}, "looks"), ({"classes": 1}, "classes")],
)  # fmt: skip
def test_bad_settings_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        network(**settings)
