"""Routes without a policy, by columns: on networks that branch, join, loop and end early."""

from __future__ import annotations

import itertools

import pytest
import torch

from dynrl.backbones import JumpRNN
from dynrl.data import Split
from dynrl.deploy import RoutedModel
from dynrl.evaluation import (
    Usage,
    cheapest_choices,
    measured_routes,
    oracle_candidates,
    oracle_routes,
    random_rate,
    routes,
    score_routes,
    spaced_routes,
    static_routes,
    static_tries,
)
from dynrl.policies import RandomPolicy, StaticPolicy
from tests.cases import TOYS
from tests.toys import Branching, Looping


def toy(name):
    backbone = TOYS[name]().eval()
    return backbone, Split(torch.randn(60, 4), torch.arange(60) % 2)


@pytest.mark.parametrize("name", TOYS)
def test_static_routes_fall_in_cost_from_the_full_network_on_choices_that_exist(name):
    backbone, split = toy(name)
    ticks = []
    found = static_routes(backbone, split, lambda: ticks.append(1))
    assert len(ticks) <= static_tries(backbone)
    assert found[0].macs_fraction == pytest.approx(1.0)
    fractions = [macs for _, macs, _ in found]
    assert all(before > after for before, after in itertools.pairwise(fractions))
    exists = backbone.thrift >= 0
    for route, macs, metric in found:
        assert len(route) == backbone.columns
        assert exists[torch.arange(backbone.columns), torch.tensor(route)].all()
        walked = score_routes(backbone, StaticPolicy(route).route(split.inputs), split)
        assert (float(walked.macs.mean()), float(walked.metric.mean())) == pytest.approx((macs, metric))
    # Greedy, but these are so small that it comes as low as any route does.
    every = torch.tensor(list(itertools.product(range(backbone.num_choices), repeat=backbone.columns)))
    walk = backbone.run_route(split.inputs[:1].expand(len(every), -1), every)
    assert fractions[-1] == pytest.approx(int(walk.macs.min()) / backbone.dense_macs)


@pytest.mark.parametrize("name", TOYS)
def test_static_search_changes_one_choice_at_a_time_where_rows_come(name):
    backbone, split = toy(name)
    for before, after in itertools.pairwise(static_routes(backbone, split)):
        (column,) = [c for c, (a, b) in enumerate(zip(before.what, after.what, strict=True)) if a != b]
        assert backbone.run_route(split.inputs[:1], torch.tensor([before.what])).route[0, column] >= 0


@pytest.mark.parametrize("most", [routes.MOST_TRIES, 0])
def test_static_routes_cost_what_all_rows_take_on_average(most, monkeypatch):
    """The first texts are the shortest ones, which cannot jump far; no choice is open at their last words."""
    monkeypatch.setattr(routes, "MOST_TRIES", most)
    backbone = JumpRNN((7,), 2, 9, 4, 6, (1, 2)).eval()
    lengths = torch.arange(2, 8).repeat_interleave(40)
    texts = torch.randint(1, 9, (240, 7)) * (torch.arange(7) < lengths.unsqueeze(1))
    split = Split(texts, torch.arange(240) % 2)
    found = static_routes(backbone, split)
    spent = [score_routes(backbone, StaticPolicy(of.what).route(texts), split).macs.mean() for of in found]
    assert [of.macs_fraction for of in found] == pytest.approx([float(macs) for macs in spent])
    assert found[-1].macs_fraction < 0.3, "all stop at the first word"


def test_too_many_tries_are_spaced_routes(monkeypatch):
    """What counts is how often a route is tried, not how long a walk is: eight looks at fifty places are 77,029."""
    backbone, split = toy("branching")
    # There are two changes of the first point's choice, one of each other's; five routes are measured at last.
    assert static_tries(backbone) == 1 + 4 * 5 // 2 + 5
    monkeypatch.setattr(routes, "MOST_TRIES", 10)
    assert static_tries(backbone) == len(spaced_routes(backbone))
    found = static_routes(backbone, split)
    assert {route for route, _, _ in found} == set(spaced_routes(backbone))
    assert [macs for _, macs, _ in found] == sorted((macs for _, macs, _ in found), reverse=True)


class Elsewhere(Branching):
    """Its dense network takes the short cut, and never comes to the detour."""

    def __init__(self):
        super().__init__()
        self.full_route = (0, -1, 1)

    def dense_actions(self, size, device="cpu"):
        return torch.tensor(self.full_route, device=device).clamp_min(0).expand(size, -1)


def test_a_point_that_the_dense_network_never_meets_begins_with_its_dearest_choice():
    backbone, split = Elsewhere().eval(), Split(torch.randn(30, 4), torch.arange(30) % 2)
    for found in (static_routes(backbone, split)[0].what, spaced_routes(backbone)[-1]):
        assert found == (0, 1, 1)


def test_the_cheapest_choice_is_that_of_the_long_run(monkeypatch):
    """A family whose choices save later what they cost now says so by `thrift`."""
    backbone, _ = toy("branching")
    assert cheapest_choices(backbone).tolist() == [0, 0, 0]
    thrift = torch.tensor([[5, 1, 3], [0, 16, -1], [24, 8, -1]])
    backbone.thrift = thrift
    assert cheapest_choices(backbone).tolist() == [1, 0, 1]
    assert spaced_routes(backbone)[0] == (1, 0, 1)  # none of the full route's choices kept
    assert len(oracle_candidates(backbone, [])) == routes.ORACLE_DRAWS
    assert oracle_candidates(backbone, [])[0] == (1, 0, 1)


@pytest.mark.parametrize("name", TOYS)
def test_random_rates_meet_a_cost_between_the_ends(name):
    backbone, _ = toy(name)
    inputs = torch.randn(2000, 4)
    ends = [
        float(backbone.run_route(inputs, RandomPolicy(backbone.thrift, rate).route(inputs)).macs.double().mean())
        / backbone.dense_macs
        for rate in (0.0, 1.0)
    ]
    assert ends[0] < ends[1]
    for wanted in (ends[0] + 0.3 * (ends[1] - ends[0]), ends[0] + 0.7 * (ends[1] - ends[0])):
        rate = random_rate(backbone, inputs, wanted)
        routes = RandomPolicy(backbone.thrift, rate, seed=3).route(inputs)
        spent = float(backbone.run_route(inputs, routes).macs.double().mean()) / backbone.dense_macs
        assert spent == pytest.approx(wanted, abs=0.03)
    assert random_rate(backbone, inputs, ends[1] + 0.1) == 1 and random_rate(backbone, inputs, ends[0] - 0.01) is None


@pytest.mark.parametrize("name", TOYS)
def test_the_oracle_takes_each_inputs_best_candidate(name):
    backbone, split = toy(name)
    static = static_routes(backbone, split)
    uniform = [(choice,) * backbone.columns for choice in range(backbone.num_choices)]
    known = oracle_candidates(backbone, [*static, *measured_routes(backbone, split, uniform)])
    best = score_routes(backbone, oracle_routes(backbone, split, known), split)
    each = [score_routes(backbone, StaticPolicy(route).route(split.inputs), split).metric for route in known]
    assert torch.equal(best.metric, torch.stack(each).amax(0))


@pytest.mark.parametrize("name", TOYS)
def test_usage_says_how_dear_the_choices_are_column_by_column(name):
    backbone, split = toy(name)
    policy = StaticPolicy(tuple(backbone.dense_actions(1)[0].tolist()))
    usage = Usage.of(RoutedModel(backbone, policy), split)
    ran = backbone.run_route(split.inputs[:1], backbone.dense_actions(1)).route[0]
    for row in usage.by_column:
        assert len(row) == backbone.columns == len(set(usage.columns))
        for column, share in enumerate(row):
            thrift = [each for each in backbone.thrift[column].tolist() if each >= 0]
            low, high = min(thrift), max(thrift)
            dear = 0.0 if ran[column] < 0 or low == high else (thrift[ran[column]] - low) / (high - low)
            assert share == pytest.approx(dear)
    for group in usage.groups:
        assert set(group["choice_rates"]) == {
            f"{p.name}/{c}" if p.n > 2 else p.name for p in backbone.points for c in range(1, p.n)
        }


def test_usage_of_a_short_cut_says_nothing_of_the_detour():
    """Rows that take it run the last point, in its own column: by number of the decision that was the detour's."""
    backbone, split = toy("branching")
    usage = Usage.of(RoutedModel(backbone, StaticPolicy((0, 1, 1))), split)
    for row, group in zip(usage.by_column, usage.groups, strict=True):
        assert row == [0.0, 0.0, 1.0]  # the short cut is the thriftiest of three ways
        assert group["choice_rates"] == {"way/1": 0.0, "way/2": 0.0, "detour": 0.0, "last": 1.0}


def test_uniform_routes_of_a_loop_run_or_leave():
    backbone, split = Looping(4).eval(), Split(torch.randn(10, 4), torch.arange(10) % 2)
    again, leave = measured_routes(backbone, split, [(0,) * 4, (1,) * 4])
    assert (again.what, leave.what) == ((1,) * 4, (0,) * 4)
    assert again.macs_fraction == pytest.approx(1.0) and leave.macs_fraction < 0.5
