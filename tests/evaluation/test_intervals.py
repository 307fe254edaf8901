"""Fronts and intervals on known numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dynrl.evaluation import COMPARED, Contender, Front, Reached, affordable, area, differences, paired
from dynrl.evaluation.tables import comparison_table
from dynrl.tasks import CLASSIFICATION, Regression


@dataclass
class Known(Contender):
    """A contender that reaches the same of each input: a number for each seed, of the budget, or None."""

    seeds: tuple
    name: str = "known"
    asked: bool = True

    def reach(self, budget):
        values = [seed(budget) for seed in self.seeds]
        return None if None in values else [of(*value) for value in values]


def of(metric: float, macs: float) -> Reached:
    return Reached(None, constant(metric), constant(macs), constant(0.0), None, None)


def constant(value: float, count: int = 8) -> torch.Tensor:
    return torch.full((count,), value)


def test_a_front_has_what_every_seed_reaches_and_its_area_is_the_mean_over_the_budgets_of_both():
    def reach(least, slope):
        return lambda budget: None if budget < least else (slope * budget, budget)

    ours = Front.of(Known((reach(0.35, 1.0), reach(0.3, 3.0))), COMPARED, 8)
    theirs = Front.of(Known((lambda budget: (0.5, 0.2),), asked=False), COMPARED, 8)
    assert ours.reached.tolist() == [b >= 0.35 for b in COMPARED] and theirs.reached.all()
    # Of lines the trapezoidal rule gives the value in the middle, here of 0.4 to 0.9.
    torch.testing.assert_close(area(ours, ours.reached), torch.stack([constant(0.65), constant(1.95)]))
    found = differences(ours, theirs, CLASSIFICATION)
    assert set(found) == {"area", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"}
    assert found["area"]["difference"] == pytest.approx(1.3 - 0.5)
    assert (found["area"]["from"], found["area"]["to"]) == (0.4, 0.9)
    assert found["0.5"]["difference"] == pytest.approx(1.0 - 0.5)


def test_tables_tell_the_span_over_which_an_area_was_taken():
    """Comparisons of before name the budgets of both, but not the span."""

    def row(rival, budgets, **span):
        at = {"difference": 0.01, "low": -0.01, "high": 0.03}
        return {"policy": "learned", "rival": rival, "area": at | span, **{f"{budget:.3g}": at for budget in budgets}}

    rows = [row("random", (1 / 3, 0.5, 0.9)), row("smaller", (0.5, 0.9), **{"from": 0.5, "to": 0.9})]
    result = {"decision": "skip", "data": "digits", "metric": "accuracy", "seeds": {}, "date": "2026-11-30"}
    rows.append({"policy": "learned", "rival": "static"})
    lines = comparison_table([result | {"budgets": [0.3, 1 / 3, 0.5, 0.9], "differences": rows}])[2:5]
    assert [line.split(" | ")[4] for line in lines] == ["0.33 to 0.9", "0.5 to 0.9", ""]


def test_out_of_reach_takes_the_nearest_cheaper_point_and_too_dear_takes_none():
    known = [("middle", 0.4, 0.9), ("cheap", 0.2, 0.8), ("same", 0.4, 0.9), ("worse", 0.7, 0.85)]
    assert affordable(known, 0.9, CLASSIFICATION) == "middle"
    assert affordable(known, 0.39, CLASSIFICATION) == "cheap"
    assert affordable(known, 0.1, CLASSIFICATION) is None


def test_a_regressions_differences_are_in_its_own_units():
    ours, theirs = (Front.of(Known((lambda budget, mse=mse: (mse, 0.3),)), COMPARED, 8) for mse in (0.01, 0.11))
    found = differences(ours, theirs, Regression(variance=1 / 6))
    assert found["area"]["difference"] == pytest.approx(0.1), "less of it is better"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Sides of three seeds on 300 inputs: what inputs have in common cancels, what seeds differ in does not."""
    rng, hits, widths = np.random.default_rng(0), 0, []
    for _ in range(60):
        common = rng.normal(0, 3, 300)
        ours, theirs = (
            torch.tensor(common + shift + rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.5, (3, 300))).float()
            for shift in (0.1, 0.0)
        )
        difference, low, high = paired(ours, theirs)
        assert low < difference < high
        hits += low <= 0.1 <= high
        widths.append(high - low)
    assert hits >= 54  # 57 are to be expected
    assert np.mean(widths) < 0.25, "what is common to both sides must not widen the interval"
    same = torch.randn(1, 50)
    assert paired(same, same) == (0.0, 0.0, 0.0)


def test_what_the_networks_of_a_seed_have_in_common_cancels():
    rng = np.random.default_rng(0)
    networks, inputs = rng.normal(0, 0.2, (3, 1)), rng.normal(0, 3, 300)
    ours, theirs = (
        torch.tensor(networks + inputs + shift + rng.normal(0, 0.1, (3, 300))).float() for shift in (0.1, 0.0)
    )
    apart, together = paired(ours, theirs), paired(ours, theirs, by_seed=True)
    assert apart[0] == together[0] == pytest.approx(0.1, abs=0.02)
    assert together[1] < 0.1 < together[2] and together[2] - together[1] < 0.1 < apart[2] - apart[1]
    assert paired(ours[:1], theirs[:1], by_seed=True) == paired(ours[:1], theirs[:1])
