"""Reports of models in memory: rows, figures, tables and pictures."""

from __future__ import annotations

import pytest
import torch
from matplotlib.axes import Axes

import dynrl
from dynrl.backbones import SkipResNet, SlimmableResNet
from dynrl.data import Augmentation, Dataset, Split, load_dataset
from dynrl.deploy import SHIPPED, RoutedModel
from dynrl.evaluation import Ground, Learned, measure, report_text
from dynrl.evaluation.figures import draw_report
from dynrl.evaluation.tables import report_table
from dynrl.runs import RunKind
from tests.cases import make_policy, numbers_split
from tests.scripts.calls import twin


def test_a_regression_reports_its_own_metric(tmp_path):
    split = numbers_split(48)
    dataset = Dataset("numbers", 1, split, split, split, Augmentation())
    backbone, plain = (SkipResNet((1, 8, 8), classes=1, layers=(5,), widths=(4,)).eval() for _ in range(2))
    model = RoutedModel(backbone, make_policy(backbone, (0.01, 1.0)))
    with torch.no_grad():
        model.policy.head.weight.normal_()
    model.curve = [(0.01, 0.9), (1.0, 0.2)]
    ground = Ground(backbone, dataset)
    measured = measure(ground, [Learned(RunKind(), [model], ground)], plain, batch_size=16)
    alone, whole = measured["dense"]["plain_mse"], measured["dense"]["all_execute_mse"]
    assert measured["dense"]["mse"] == min(alone, whole) < max(alone, whole)
    assert not any("accuracy" in key for part in (measured["dense"], *measured["points"]) for key in part)
    assert {p["policy"] for p in measured["points"]} == {"learned", "random", "static", "oracle"}
    (oracle,) = (p for p in measured["points"] if p["policy"] == "oracle")
    assert oracle["mse"] < min(p["mse"] for p in measured["points"] if p["policy"] == "static")
    known = {"decision": "skip", "data": "numbers", "metric": "mse", "seeds": {"learned": [0]}, "date": "2026-11-28"}
    report = {**known, **measured}
    assert f"{oracle['mse']:.2g}" in report_text(report)
    table = report_table(report)
    assert table[0].startswith("| mse, by budget | 0.")
    assert f" {oracle['mse']:.2g} at {oracle['macs_fraction']:.2f} |" in next(row for row in table if "oracle" in row)
    (group,) = measured["usage"]["groups"]
    assert group["class"] is None and group["inputs"] == 48
    draw_report(report, dataset.test, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def numbers_report(backbone, models):
    """The points of a report on small images; `models` are (the choice it favours, its curve)."""
    split = numbers_split(48)
    ground, learned = Ground(backbone, Dataset("numbers", 1, split, split, split, Augmentation())), []
    for start, curve in models:
        router = make_policy(backbone, start=[start])
        learned.append(Learned(RunKind(), [RoutedModel(backbone, router, curve)], ground))
    return measure(ground, learned, batch_size=16)["points"]


def test_a_budget_above_the_dearest_route_gets_the_dearest_random_routes():
    """A policy that runs all and pays for its router, too, spends more than any route alone can."""
    backbone = SkipResNet((1, 8, 8), classes=1, layers=(3,), widths=(4,)).eval()
    points = numbers_report(backbone, [(1, [(0.01, 0.9), (1.0, 0.2)])])
    assert all(p["macs_fraction"] > 1 for p in points if p["policy"] == "learned")
    assert {p["policy"] for p in points} == {"learned", "random", "static", "oracle"}
    assert all(p["macs_fraction"] == 1 for p in points if p["policy"] == "random")


def test_pictures_bear_the_names_of_classes_that_data_have_lost_others_of(tmp_path, monkeypatch):
    """The network's outputs keep their places, so a class that is gone must not shift the names of the rest."""
    digits, kept = load_dataset("digits"), torch.tensor([1, 2, 3, 4, 6, 7, 8, 9])

    def fewer(split):
        rows = torch.isin(split.targets, kept).nonzero().flatten()[:40]
        return Split(split.inputs[rows], torch.searchsorted(kept, split.targets[rows]))

    splits = map(fewer, (digits.train, digits.validation, digits.test))
    names = tuple(digits.names[digit] for digit in kept)
    run = twin(SHIPPED / "exit-digits", tmp_path / "run", data="fewer-digits")
    data = Dataset(
        "fewer-digits", 8, *splits, Augmentation(), digits.mean, digits.deviation, names=names, dtype=digits.dtype
    )
    titles, draw = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda axis, label, **how: (titles.append(label), draw(axis, label, **how)))
    report = dynrl.evaluate(run, data=data, out=tmp_path / "report", budgets=(0.5,), batch_size=8)
    shown = report["usage"]["cheapest"] + report["usage"]["dearest"]
    assert titles[:16] == [names[data.test.targets[row]] for row in shown]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"dtype": "nope"}, "unknown dtype 'nope'; expected one of"), ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"device": "xyz"}, "no device 'xyz' here"), ({"device": "meta"}, "expected the device cpu or cuda, got 'meta'"),
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_a_report_cannot_be_measured_with_is_refused_before_any_file_is_read(asked, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        dynrl.evaluate(tmp_path / "nosuch", **asked)


def test_rows_of_the_same_routes_are_timed_once():
    backbone = SkipResNet((1, 8, 8), classes=1, layers=(3,), widths=(4,)).eval()
    times = {}
    for p in numbers_report(backbone, [(1, [(0.01, 0.9), (1.0, 0.2)])]):
        times.setdefault((p["policy"], p["macs_fraction"]), set()).add(p["latency_ms"])
    assert {len(alike) for alike in times.values()} == {1}
    assert len(set.union(*times.values())) == len(times), "other routes have times of their own"


def test_a_policy_that_reaches_no_budget_is_shown_at_its_lowest_price():
    backbone = SkipResNet((1, 8, 8), classes=1, layers=(3,), widths=(4,)).eval()
    points = numbers_report(backbone, [(0, [(0.01, 0.44), (1.0, 0.43)])])
    (learned,) = (p for p in points if p["policy"] == "learned")
    assert (learned["budget"], learned["price"]) == (None, pytest.approx(0.01))


def test_more_than_two_choices_are_each_shown_throughout():
    backbone = SlimmableResNet((1, 8, 8), classes=1, layers=(2,), widths=(32,)).eval()
    uniform = [p for p in numbers_report(backbone, []) if p["policy"] == "uniform"]
    assert len(uniform) == backbone.num_choices > 2
    assert uniform[0]["macs_fraction"] == 1 > uniform[-1]["macs_fraction"]
    for choice, point in zip(reversed(range(backbone.num_choices)), uniform, strict=True):
        rates = {f"{at.name}/{c}": float(c == choice) for at in backbone.points for c in range(1, at.n)}
        assert point["choice_rates"] == rates
