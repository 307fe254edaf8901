"""Prices are found on a backbone: on networks whose worth is known by construction, and on all toys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynrl.backbones import END, Backbone, Point, State
from dynrl.data import Split
from dynrl.envs.rewards import REWARDS
from dynrl.evaluation import find_price_range
from dynrl.evaluation.prices import ABOVE, BELOW
from dynrl.tasks import Regression
from tests.toys import Branching, Exiting, Looping, Roundabout


class Adding(Backbone):
    """Each point may add a known number to the output; all cost the same, so route and worth are known."""

    family, decision = "toy_adding", "toy"

    def __init__(self, gains: tuple[float, ...]) -> None:
        super().__init__()
        self.config, self.input_shape, self.gains = {"gains": gains}, (1,), nn.Parameter(torch.tensor(gains))
        self._pose(
            [Point(f"add{i}", 2) for i in range(len(gains))],
            costs=[[0, 10]] * len(gains), start_macs=0, full_route=(1,) * len(gains), feature_width=1,
        )  # fmt: skip

    def _start(self, walk, rows, inputs):
        return State(walk, 0, rows, torch.zeros_like(inputs))

    def _run(self, state, action):
        x = state.features + self.gains[state.point] * action.unsqueeze(1)
        if state.point + 1 < len(self.points):
            return [State(state.walk, state.point + 1, state.rows, x)]
        state.walk.put_output(state.rows, x)
        return [State(state.walk, END, state.rows)]


def worth(task, output, target, dense):
    return output[:, 0]


SPLIT = Split(torch.randn(700, 1), torch.zeros(700, 1), Regression(1.0))


@pytest.mark.parametrize("scale", [0.01, 1.0, 70.0])
def test_the_range_of_what_each_choice_is_worth(scale):
    """A share of 1/4 gains 0.2 at least and 3 at most, 6 in all: at 0.8 / BELOW all is spent, at 6 x ABOVE nothing."""
    low, high = find_price_range(Adding(tuple(scale * gain for gain in (3.0, 1.8, 1.0, 0.2))), SPLIT, worth)
    assert 0.9 * low <= scale * 0.8 / BELOW < 2 * low
    assert scale * 6 * ABOVE <= high < scale * 6 * ABOVE * 2
    assert low < scale * 0.8 and high > scale * 12  # what the last choice to be made and the first are worth


def test_choices_that_are_worth_nothing_do_not_set_the_lowest_price():
    assert find_price_range(Adding((1.0, 0.0, -0.1)), SPLIT, worth)[0] > 0.05
    assert find_price_range(Adding((0.0, -1.0)), SPLIT, worth)[1] <= 0.01


@pytest.mark.parametrize("family", [Exiting, Looping, Branching, Roundabout])
def test_every_kind_of_walk_has_prices(family):
    split = Split(torch.randn(64, 4), torch.randn(64, 2), Regression(1.0))
    first, again = (find_price_range(family(), split, REWARDS["gain"].accuracy) for _ in range(2))
    for low, high in (first, again):
        assert 0 < low < high < 1e4


def test_the_same_backbone_has_the_same_prices():
    backbone = Looping()
    found = {
        find_price_range(backbone, Split(torch.ones(8, 4), torch.ones(8, 2), Regression(1.0)), worth) for _ in "12"
    }
    assert len(found) == 1
