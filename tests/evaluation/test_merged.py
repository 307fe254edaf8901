"""Reports on several pretrained backbones become one, with means over them."""

from copy import deepcopy
from pathlib import Path

import pytest

from dynrl.evaluation.merged import merge_reports
from dynrl.evaluation.report import report_text
from dynrl.evaluation.tables import by_decision_table, report_table
from dynrl.files import read_json

ROOT = Path(__file__).parents[2]

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


@pytest.mark.parametrize("name", ["plain 1 MMACs", "smaller"])
def test_networks_beside_all_backbones_are_counted_once(name):
    """Three seeds of one shape stand beside each of two backbones, with the same figures: their spread is not 0."""
    plain = {"policy": name, "budget": 0.5, "accuracy": 0.9, "accuracy_std": 0.1, "runs": 3, "latency_ms": 1.0}
    reports = [REPORT | {"points": [*REPORT["points"], plain | {"latency_ms": ms}]} for ms in (1.0, 2.0)]
    row = merge_reports(reports)["points"][-1]
    assert (row["accuracy"], row["accuracy_std"], row["runs"], row["latency_ms"]) == (0.9, 0.1, 3, 1.5)


def test_what_only_some_backbones_have_is_told():
    """One policy reaches budgets, that on the other backbone has collapsed: they share no row."""
    whole = read_json(ROOT / "results" / "exit-fashion-mnist" / "report.json")
    whole |= {"usage": None, "seeds": {"learned": [0]}, "budgets": [0.3, 0.5]}
    base = next(p for p in whole["points"] if p["policy"] == "learned") | {"runs": 1}
    static = base | {"policy": "static", "kind": None, "budget": 0.5}
    asked = whole | {"points": [base | {"budget": 0.3}, base | {"budget": 0.5}, static]}
    deaf = whole | {"points": [base | {"budget": None}, static]}
    merged = merge_reports([asked, deaf])
    text = report_text(merged)
    assert (
        "learned has no row where only some of the 2 backbones have one: 0.3 (1), 0.5 (1), its lowest price (1)" in text
    )
    assert "one row at its lowest price" not in text and "out of reach" not in text
    assert "one row at its lowest price" in report_text(merge_reports([deaf, deaf]))
    assert "budgets out of reach of learned: 0.3" in report_text(
        merge_reports([whole | {"points": asked["points"][1:]}] * 2)
    )
    (row,) = by_decision_table({"x": merged}, [0.5])[2:]
    assert row.split(" | ")[2:5] == ["", "", ""] and "static" not in row


def test_one_report_stays_as_it_is():
    assert merge_reports([REPORT]) is REPORT


def test_what_is_equal_in_all_reports_is_not_rounded():
    report = deepcopy(REPORT)
    report["points"][0]["budget"] = 0.4
    (row, _) = merge_reports([report] * 3)["points"]
    assert row["budget"] == 0.4 and row["runs"] == 6


def test_rows_that_share_a_name_are_each_merged_and_shown():
    """A tree has several walks of one name and no budget; the best and the worst of them are not one row."""
    reports = []
    for shift in (0.0, 0.1):
        report = deepcopy(REPORT) | {"date": "2026-11-30", "hardware": {"threads": 1, "processor": "one", "torch": "2"}}
        report["dense"] |= {"batch_size": 8}
        report["points"] = [
            row | {"speedup": 1.0, "realised_ratio": 1.0, "policy": name, "budget": budget, "accuracy": at + shift}
            for row in REPORT["points"][:1]
            for name, budget, at in (("soft", None, 0.8), ("own", None, 0.5), ("own", None, 0.7), ("own", 0.5, 0.6))
        ]
        reports.append(report)
    merged = merge_reports(reports)
    assert [(row["policy"], row["budget"]) for row in merged["points"]] == [
        ("soft", None), ("own", None), ("own", None), ("own", 0.5),
    ]  # fmt: skip
    assert [row["accuracy"] for row in merged["points"]] == pytest.approx([0.85, 0.55, 0.75, 0.65])
    lines = [line for line in report_table(merged) if line.startswith("| own |")]
    assert [("65.00" in line, "55.00" in line, "75.00" in line) for line in lines] == [
        (True, True, False), (False, False, True),
    ]  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_means_are_of_the_numbers_that_are_known(order):
    """Where all inputs take the same, there is no correlation; a network may be missing on one backbone."""
    known = [(0.5, 0.9), (None, None), (0.7, 0.8)]
    reports = []
    for spearman, plain in (known[i] for i in order):
        report = deepcopy(REPORT)
        report["points"][0]["spearman"] = {"length": spearman}
        report["dense"]["plain_accuracy"] = plain
        reports.append(report)
    merged = merge_reports(reports)
    assert merged["points"][0]["spearman"]["length"] == pytest.approx(0.6)
    assert merged["points"][1]["spearman"]["length"] is None
    assert merged["dense"]["plain_accuracy"] == pytest.approx(0.85)
