"""Time tables of walks: every choice of every point, wherever it stands."""

from __future__ import annotations

import pytest
import torch

from dynrl.backbones import END
from dynrl.evaluation import step_times, timing
from tests.cases import BACKBONES, TOYS, make_backbone
from tests.evaluation.test_routes import Elsewhere
from tests.toys import Branching, Looping


@pytest.mark.parametrize("name", BACKBONES)
def test_each_choice_is_timed(name):
    backbone, ticks = make_backbone(name), []
    times = step_times(backbone, backbone.random_inputs(8), rounds=2, tick=lambda: ticks.append(1))
    assert [len(row) for row in times["choices"]] == [point.n for point in backbone.points]
    assert times["start"] > 0
    assert all(ms > 0 for row in times["choices"] for ms in row)
    assert len(ticks) == 3


def advanced(family, monkeypatch):
    """(point, choice) of all rows, in order, as they are run."""
    met, advance = [], family.advance

    def noted(self, state, action):
        met.append((state.point, int(action[0])))
        return advance(self, state, action)

    monkeypatch.setattr(family, "advance", noted)
    return met


def test_a_point_off_the_full_route_is_walked_to_and_timed(monkeypatch):
    backbone, inputs = Elsewhere().eval(), torch.randn(5, 4)
    assert timing.detours(backbone, inputs) == {1: [(1, 1)]}
    assert timing.detours(Branching().eval(), inputs) == {}
    met = advanced(Elsewhere, monkeypatch)
    times = step_times(backbone, inputs, rounds=3)
    assert all(ms > 0 for row in times["choices"] for ms in row)
    rounds = 4  # with the one that warms up
    assert met.count((1, 0)) == met.count((1, 1)) == rounds


def test_a_loops_choice_is_timed_at_each_visit_where_it_is_open(monkeypatch):
    """On the last visit the cell is closed: what runs there in its place is no time of the cell."""
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    backbone = Looping(4).eval()
    spent = {0: 1.0, 1: 7.0}
    advance = Looping.advance

    def slow(self, state, action):
        choice = int(action[0])
        mask = self.open_choices(state)
        for _ in range(int(spent[choice if mask[0, choice] else 0]) - 1):
            next(clock)
        return advance(self, state, action)

    monkeypatch.setattr(Looping, "advance", slow)
    times = step_times(backbone, torch.randn(3, 4), rounds=2)
    assert times["choices"] == [[1000.0, 7000.0]]


@pytest.mark.parametrize("name", TOYS)
def test_the_batch_stands_at_each_visit_of_the_full_route(name):
    backbone = TOYS[name]().eval()
    stations = [state.point for state in timing._full_walk(backbone, torch.randn(6, 4))]
    ran = backbone.run_route(torch.randn(1, 4), backbone.dense_actions(1)).route[0]
    assert stations == backbone.column_point[ran >= 0].tolist()
    assert END not in stations


def test_a_point_that_no_way_leads_to_is_named(monkeypatch):
    backbone = Elsewhere().eval()
    monkeypatch.setattr(timing, "deque", lambda waiting: [])
    with pytest.raises(ValueError, match=r"no way leads to \['detour'\]"):
        timing.detours(backbone, torch.randn(2, 4))
