"""Reports on several pretrained backbones become one, with means over them."""

from copy import deepcopy

import pytest

from dynrl.evaluation.merged import merge_reports

REPORT = {
    "decision": "skip", "data": "digits", "metric": "accuracy", "seeds": {"learned": [0, 1]},
    "dense": {"accuracy": 0.9, "network": "plain", "macs": 1000, "latency_ms": 2.0, "tuned_accuracy": None},
    "points": [
        {"policy": "learned", "budget": 0.5, "runs": 2, "accuracy": 0.8, "accuracy_std": 0.3, "macs_fraction": 0.5,
         "distinct_routes": 3, "spearman": {"length": 0.5}, "kind": {"tuned": True}},
        {"policy": "learned", "budget": 0.3, "runs": 2, "accuracy": 0.7, "accuracy_std": 0.0, "macs_fraction": 0.3,
         "distinct_routes": 3, "spearman": {"length": None}, "kind": {"tuned": True}},
    ],
    "usage": {"policy": "learned"},
}  # fmt: skip


def test_numbers_are_means_over_backbones_and_spreads_are_theirs():
    other = deepcopy(REPORT) | {"seeds": {"learned": [2]}}
    other["dense"] |= {"accuracy": 0.8, "latency_ms": 3.0}
    other["points"][0] |= {"accuracy": 0.6, "macs_fraction": 0.4, "runs": 1, "spearman": {"length": 0.7}}
    del other["points"][1]  # a budget that no policy on this backbone reached
    merged = merge_reports([REPORT, other])
    assert merged["backbones"] == 2 and merged["seeds"] == {"learned": [0, 1, 2]}
    dense = merged["dense"]
    assert dense["accuracy"] == pytest.approx(0.85) and dense["accuracy_std"] == pytest.approx(0.1 / 2**0.5)
    assert (dense["macs"], dense["latency_ms"], dense["network"], dense["tuned_accuracy"]) == (1000, 2.5, "plain", None)
    (row,) = merged["points"]
    assert row["accuracy"] == pytest.approx(0.7) and row["accuracy_std"] == pytest.approx(0.2 / 2**0.5)
    assert row["macs_fraction"] == pytest.approx(0.45) and row["spearman"]["length"] == pytest.approx(0.6)
    assert (row["runs"], row["distinct_routes"], row["kind"]) == (3, 3, {"tuned": True})
    assert merged["usage"] == REPORT["usage"]


def test_one_report_stays_as_it_is():
    assert merge_reports([REPORT]) is REPORT


def test_what_is_equal_in_all_reports_is_not_rounded():
    report = deepcopy(REPORT)
    report["points"][0]["budget"] = 0.4
    (row, _) = merge_reports([report] * 3)["points"]
    assert row["budget"] == 0.4 and row["runs"] == 6
