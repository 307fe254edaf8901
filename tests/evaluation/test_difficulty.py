"""Accuracy and spending by difficulty: bins, ranks, and what a report makes of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from scipy.stats import spearmanr

from dynrl.backbones import SkipResNet
from dynrl.data import Augmentation, Dataset, Split
from dynrl.deploy import RoutedModel
from dynrl.evaluation import Ground, Learned, by_difficulty, figures, measure, report_text, spearman
from dynrl.evaluation.difficulty import BINS, bins
from dynrl.runs import RunKind
from dynrl.tasks import Detection
from tests.cases import make_policy


def test_few_values_are_a_bin_each_and_many_are_parted_by_quantile():
    few = torch.tensor([3.0, 1.0, 3.0, 7.0])
    assert [few[mine].tolist() for mine in bins(few)] == [[1.0], [3.0, 3.0], [7.0]]
    many = torch.randperm(800)  # whole numbers, too
    parts = bins(many)
    assert [int(mine.sum()) for mine in parts] == [100] * BINS
    assert all(many[a].max() < many[b].min() for a, b in pairwise(parts))
    tied = torch.cat([torch.full((900,), 2.0), torch.arange(3.0, 103.0)])
    parts = bins(tied)
    assert int(parts[0].sum()) == 900, "equal numbers are not torn apart"
    assert torch.stack(parts).sum(0).eq(1).all()


def test_rank_correlation_is_scipys_with_ties_too():
    a, b = torch.randint(0, 6, (400,)), torch.rand(400).double()
    b += 0.1 * a
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, a.double() ** 3) == pytest.approx(1.0)
    assert spearman(b, -b) == pytest.approx(-1.0)
    assert spearman(torch.ones(4), torch.arange(4)) is None


def test_means_of_bins_by_hand():
    hard = {"length": torch.tensor([2.0, 8.0, 2.0, 5.0])}
    split = Split(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), difficulty=hard)
    found = by_difficulty(split, torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0.2, 0.9, 0.4, 0.5]))
    assert found["length"]["bins"] == [
        {"from": at, "to": at, "inputs": count, "accuracy": accuracy, "macs_fraction": pytest.approx(macs)}
        for at, count, accuracy, macs in ((2.0, 2, 0.5, 0.3), (5.0, 1, 1.0, 0.5), (8.0, 1, 0.0, 0.9))
    ]
    assert found["length"]["spearman"] == pytest.approx(9 / 90**0.5)  # ranks 1, 4, 2, 3 and 1.5, 4, 1.5, 3
    assert by_difficulty(Split(split.inputs, split.targets), torch.zeros(4), torch.zeros(4)) == {}


def test_a_bin_has_the_balanced_accuracy_of_its_own_rows():
    """What is looked for is in all rows of one size, in half of those of another, and in none of the rest."""
    sizes, found = [3.0] * 4 + [1.0] * 4 + [0.0] * 92, torch.tensor([1] * 4 + [1, 0, 1, 0] + [0] * 92)
    said = torch.tensor([1, 0, 0, 1] + [1, 0, 0, 1] + [0] * 69 + [1] * 23)
    task = Detection(float(found.float().mean()))
    metric = task.score(torch.nn.functional.one_hot(said, 2).float(), found)
    split = Split(torch.zeros(100, 1), found, task, {"size": torch.tensor(sizes)})
    bins_of = by_difficulty(split, metric, torch.ones(100))["size"]["bins"]
    assert [row["balanced_accuracy"] for row in bins_of] == pytest.approx([0.75, 0.5, 0.5])
    assert task.mean(metric, found) == pytest.approx(float(metric.mean())), "of the whole split, both are one number"


def test_a_report_tells_accuracy_and_spending_by_difficulty(tmp_path, monkeypatch):
    """The first policy looks at the inputs, and runs more where they are bright."""
    bright = torch.linspace(0, 1, 64)
    split = Split(
        bright.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone(), torch.arange(64) % 2, difficulty={"light": bright}
    )
    backbone = SkipResNet((1, 8, 8), classes=2, layers=(3,), widths=(4,)).eval()
    policy = make_policy(backbone, (0.01, 1.0))
    with torch.no_grad():
        policy.head.weight.normal_(std=3)
    names = ("dark", "a class with a very long name indeed")
    ground = Ground(backbone, Dataset("lights", 2, split, split, split, Augmentation(), names=names))
    learned = Learned(RunKind(), [RoutedModel(backbone, policy, [(0.01, 0.9), (1.0, 0.2)])], ground)
    measured = measure(ground, [learned], batch_size=16)
    found, mine = measured["usage"]["difficulty"]["light"], split.difficulty["light"]
    assert [row["inputs"] for row in found["bins"]] == [8] * 8
    whole = sum(group["inputs"] * group["macs_fraction"] for group in measured["usage"]["groups"]) / 64
    assert sum(row["macs_fraction"] for row in found["bins"]) / 8 == pytest.approx(whole)
    assert [(row["from"], row["to"]) for row in found["bins"]] == [
        (float(mine[8 * i]), float(mine[8 * i + 7])) for i in range(8)
    ]
    for point in measured["points"]:
        if point["policy"] == "static":
            assert point["spearman"] == {"light": None}, "the same is spent on all"
    half = learned.reach(0.5)[0]
    (row,) = (p for p in measured["points"] if p["policy"] == "learned" and p["budget"] == 0.5)
    assert row["spearman"]["light"] == spearman(half.macs, bright)
    known = {"decision": "skip", "data": f"/{'folder/' * 40}lights", "metric": "accuracy"}
    report = {**known, "seeds": {f"learned in way {i}": list(range(5)) for i in range(6)}, **measured}
    text = report_text(report)
    assert "learned, by light" in text and f" {mine[56]:.3g} to 1 " in text
    report["points"] = [point | {"accuracy_std": 0.7} for point in report["points"]]
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    figures.draw_report(report, split, tmp_path / "report.png")
    assert_readable(drawn[0], {"dark", "a class …e indeed", *(point.name for point in backbone.points)})
    monkeypatch.undo()
    figures._save(drawn[0], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def assert_readable(figure, names):
    """No text leaves the picture, no error bar passes 100 %, and decisions and classes have their names."""
    figure.canvas.draw()
    ticks = [
        label
        for axis in figure.axes
        for label in (*axis.get_xticklabels(which="both"), *axis.get_yticklabels(which="both"))
    ]
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    for text in set(texts) - set(ticks):  # ticks beyond the ends of an axis are there, and not drawn
        left, bottom, right, top = text.get_window_extent().extents
        inside = left >= 0 and bottom >= 0 and right <= figure.bbox.width and top <= figure.bbox.height
        assert inside, f"{text.get_text()!r} leaves the picture"
    said = {text.get_text() for text in texts}
    assert names <= said
    bars = [segment for lines in figure.axes[0].findobj(LineCollection) for segment in lines.get_segments()]
    assert bars and max(segment[:, 1].max() for segment in bars) == 100
