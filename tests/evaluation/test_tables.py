"""The table by decision says what each side has within a budget, and chooses the policy by its kind."""

from __future__ import annotations

from typing import Any

import pytest

from dynrl.evaluation.tables import by_decision_table
from dynrl.runs import RunKind


def row(kind: RunKind | str, budget: float | None, accuracy: float, macs: float) -> dict[str, Any]:
    learned = isinstance(kind, RunKind)
    return {
        "policy": kind.label if learned else kind, "kind": kind.to_dict() if learned else None, "budget": budget,
        "accuracy": accuracy, "macs_fraction": macs, "speedup": 1 / macs,
    }  # fmt: skip


def shown(*points: dict[str, Any]) -> tuple[str, str, str]:
    """Return three cells at a budget of 0.5: the learned policy, its MACs and the strongest rival."""
    report = {"decision": "skip", "data": "digits", "metric": "accuracy", "dense": {"accuracy": 0.95}}
    (line,) = by_decision_table({"x": report | {"points": list(points)}}, [0.5])[2:]
    _, _, learned, macs, _, _, rival, _ = line.removeprefix("| ").removesuffix(" |").split(" | ")
    return learned, macs, rival


LEARNED, TUNED = row(RunKind(), 0.5, 0.90, 0.5), row(RunKind(tuned=True), 0.5, 0.92, 0.5)
DEAR = row(RunKind(price=0.002), None, 0.95, 1.0)


def test_rows_beyond_the_budget_are_left_out_and_cheaper_rivals_compete():
    gate, cheap = row(RunKind(agent="gate", price=0.002), None, 0.951, 1.0), row("threshold", 0.4, 0.93, 0.4)
    alone, later = row("model 0 alone", None, 0.8, 0.1), row("threshold", 0.6, 0.96, 0.6)
    points = [LEARNED, TUNED, DEAR, gate, row("threshold", 0.5, 0.91, 0.5), cheap, alone, later]
    assert shown(*points) == ("**92.00** tuned", "0.50", "threshold 93.00")
    assert shown(TUNED, row(RunKind(agent="gate"), 0.4, 0.94, 0.4), cheap)[2] == "gate 94.00"
    assert shown(TUNED, row(RunKind(agent="gate", price=0.1), None, 0.94, 0.54), cheap)[2] == "gate at 0.1 94.00"


@pytest.mark.parametrize("accuracy", [0.7, 0.99])
def test_the_policy_is_chosen_by_its_kind_whatever_it_reaches(accuracy):
    """The test figures choose nothing: each row in turn may be better or worse than the one that is shown."""
    order = [
        RunKind(tuned=True), RunKind(tuned=True, reward="gain"), RunKind(tuned=True, policy="upfront", baseline="group"),
        RunKind(), RunKind(cost="time"), RunKind(finished=False, tuned=True),
    ]  # fmt: skip
    priced = row(RunKind(tuned=True, price=0.1), None, accuracy, 0.5)
    for i, first in enumerate(order):
        mine = [row(kind, 0.5, 0.8 if kind is first else accuracy, 0.5) for kind in order[i:]]
        assert shown(priced, *mine[::-1])[0] == "**80.00**" + " tuned" * first.tuned
    assert shown(row(RunKind(price=0.1), None, 0.8, 0.4), DEAR)[:2] == ("**80.00**", "0.40")


def test_the_only_policy_is_shown_at_what_it_costs():
    assert shown(DEAR, row("threshold", 0.5, 0.91, 0.5)) == ("**95.00**", "1.00", "threshold 91.00")
    assert shown(DEAR, row(RunKind(price=1.0), None, 0.9, 0.8))[:2] == ("", "")


def test_what_is_worse_than_random_routes_is_no_rival():
    gate, random = row(RunKind(agent="gate", tuned=True), 0.5, 0.68, 0.5), row("random", 0.5, 0.91, 0.5)
    assert shown(TUNED, gate)[2] == "gate tuned 68.00"
    assert shown(TUNED, gate, random)[2] == ""
