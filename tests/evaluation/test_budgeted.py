"""MSDNet's two protocols, beside the same by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynrl.backbones import MultiScaleNet, SkipResNet
from dynrl.data import Augmentation, Dataset, Split
from dynrl.deploy import RoutedModel
from dynrl.evaluation import Ground, Learned, measure, report_text
from dynrl.evaluation.budgeted import POINTS, budgeted, budgets, check_leaving, leads
from dynrl.evaluation.figures import draw_report
from dynrl.evaluation.merged import merge_reports
from dynrl.runs import RunKind
from dynrl.tasks import Classification
from tests.cases import make_policy

ROWS = 120
ROUTES = [[0, 1], [1, 0], [1, 1]]  # to leave at each exit in turn


@pytest.fixture(scope="module")
def ground():
    """An untrained network with three exits, on images whose labels are what one of the exits says."""
    backbone = MultiScaleNet((1, 8, 8), 4, (1, 1, 2), width=4, growth=3).eval()
    inputs = torch.randn(ROWS, 1, 8, 8)
    said = torch.stack([backbone(inputs, route.expand(ROWS, -1)).argmax(1) for route in torch.tensor(ROUTES)])
    labels = said.gather(0, torch.randint(3, (1, ROWS)))[0]
    split = Split(inputs, labels, Classification())
    return Ground(backbone, Dataset("mixed", 4, split, split, split, Augmentation()))


def learned(ground):
    policy = make_policy(ground.network, start=[1])
    return [Learned(RunKind(), [RoutedModel(ground.network, policy, [(0.01, 1.0), (1.0, 0.2)])], ground)]


@torch.no_grad()
def test_each_point_is_the_walk_under_thresholds_that_meet_its_budget(ground):
    network, exits = ground.network, check_leaving(ground)
    assert exits.routes.tolist() == ROUTES
    walks = [network.run_route(ground.test.inputs, route.expand(ROWS, -1)) for route in exits.routes]
    outputs = np.stack([walk.outputs.softmax(1).numpy() for walk in walks])
    costs = np.array([int(walk.macs[0]) for walk in walks]) / network.dense_macs
    labels, sure = ground.test.targets.numpy(), outputs.max(2)
    found = budgeted(ground, [], exits)
    rows = [row for row in found["points"] if row["policy"] == "shares top-1"]
    assert len(rows) == POINTS
    for p, row in enumerate(rows, start=1):
        shares = (p / 20) ** np.arange(3)
        shares /= shares.sum()
        assert row["budget"] == pytest.approx(shares @ costs)
        # By hand: at each exit, the surest of those who are left leave, until as many are gone as should be.
        left, exit_of = np.arange(ROWS), np.full(ROWS, 2)
        for k, gone in enumerate(np.round(ROWS * shares.cumsum())[:2].astype(int)):
            order = left[np.argsort(-sure[k, left])]
            count = max(0, gone - (ROWS - len(left)))
            exit_of[order[:count]], left = k, order[count:]
        assert row["macs_fraction"] == pytest.approx(costs[exit_of].mean(), abs=1e-6)
        assert row["accuracy"] == pytest.approx((outputs[exit_of, np.arange(ROWS)].argmax(1) == labels).mean())
    kinds = ("threshold", "shares")
    assert {row["policy"] for row in found["points"]} == {f"{kind} {name}" for kind in kinds for name in network.scores}
    for k, row in enumerate(found["anytime"]):
        assert row["macs_fraction"] == pytest.approx(costs[k])
        assert row["accuracy"] == pytest.approx((outputs[k].argmax(1) == labels).mean())


def test_a_report_has_both_curves_with_policies_beside(ground, tmp_path):
    mine, exits = learned(ground), check_leaving(ground)
    asked = budgets(exits, ground.network.dense_macs)
    known = {"decision": "exit", "data": "mixed", "metric": "accuracy", "seeds": {"learned": [0]}, "date": "2026-11-28"}
    report = {**known, **measure(ground, mine, batch_size=16, budgets=[0.5]), "budgeted": budgeted(ground, mine, exits)}
    rows = [row for row in report["budgeted"]["points"] if row["policy"] == "learned"]
    assert [row["budget"] for row in rows] == [budget for budget in asked if mine[0].spends(budget)]
    assert "anytime, all inputs at one exit:" in report_text(report)
    draw_report(report, ground.test, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    both = merge_reports([report, report])["budgeted"]
    assert [row["runs"] for row in both["anytime"]] == [2, 2, 2]
    assert len(both["points"]) == len(report["budgeted"]["points"])


def test_a_lead_is_over_the_best_rule_at_the_macs_that_the_policy_spends():
    def row(policy, macs, accuracy):
        return {"policy": policy, "macs_fraction": macs, "accuracy": accuracy}

    rows = [row("learned", macs, accuracy) for macs, accuracy in ((0.1, 0.5), (0.3, 0.8), (0.5, 0.9))]
    rows += [row("threshold a", macs, accuracy) for macs, accuracy in ((0.4, 0.9), (0.2, 0.7), (0.6, 0.9))]
    rows += [row("threshold b", macs, accuracy) for macs, accuracy in ((0.2, 0.4), (0.6, 1.0))]
    report = {"metric": "accuracy", "seeds": {"learned": [0]}, "budgeted": {"points": rows}}
    ((name, found),) = leads(report)
    assert name == "learned" and found == [(0.3, pytest.approx(0.0)), (0.5, pytest.approx(0.0))]
    rows[1]["accuracy"] = 0.6
    ((_, found),) = leads(report)
    assert found == [(0.3, pytest.approx(-0.2)), (0.5, pytest.approx(0.0))]


def test_a_network_without_exits_in_a_row_is_refused(ground):
    backbone = SkipResNet((1, 8, 8), classes=4, layers=(2,), widths=(4,)).eval()
    with pytest.raises(ValueError, match=r"exits in a row .* got SkipResNet, which poses 'skip'"):
        check_leaving(Ground(backbone, ground.dataset))
