"""The picture of the README, drawn from a report: `python docs/pictures/idea.py REPORT.json OUT.png`.

It shows what one policy does at each budget, and what that gives in accuracy, against MACs and against time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import LinearSegmentedColormap

ROOT = Path(__file__).parents[2]
REPORT, PICTURE = ROOT / "results" / "skip-fashion-mnist" / "report.json", ROOT / "docs" / "pictures" / "idea.png"
INK, FAINT = "#22303c", "#8894a0"
LINES = {  # contender: colour, width, style, marker, label; the point at which the label stands, and its offset
    "learned tuned": ("#0b6e99", 2.6, "-", "o", "learned, fine-tuned", 4, (-34, -15)),
    "learned": ("#58b0d3", 2.0, "-", "o", "learned", 5, (5, -2)),
    "static": ("#d9822b", 1.4, "--", "s", "static", 0, (-33, -2)),
    "random": ("#98a2ac", 1.4, "--", "o", "random", 3, (4, -12)),
}  # fmt: skip


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the picture of `report`, a dictionary as `report.json` has it, into the file `path`."""
    pyplot.rcParams.update({"font.size": 9, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK})
    pyplot.rcParams.update(
        {"xtick.color": FAINT, "ytick.color": FAINT, "axes.titlesize": 10, "axes.titleweight": "bold"}
    )
    figure, (routes, macs, times) = pyplot.subplots(1, 3, figsize=(11, 3.5), width_ratios=(1.05, 1, 1))
    _draw_routes(routes, [p for p in report["points"] if p["policy"] == "learned tuned"])
    _draw_fronts(macs, report, "macs_fraction", 1.0, "multiply-accumulates, of the dense network's")
    _draw_fronts(
        times, report, "latency_ms", report["dense"]["latency_ms"], "measured milliseconds, 256 images on 2 cores"
    )
    macs.set_ylabel("accuracy on test images, %")
    macs.set_title("Accuracy for compute", loc="left")
    times.set_title("What is skipped saves time", loc="left")
    times.tick_params(labelleft=False)
    for name, (colour, *_, label, at, offset) in LINES.items():
        point = [p for p in report["points"] if p["policy"] == name][at]
        place = (point["macs_fraction"], 100 * point["accuracy"])
        macs.annotate(label, place, offset, textcoords="offset points", color=colour, fontsize=8.5)
    figure.tight_layout(w_pad=2.0)
    figure.savefig(path, format="png", dpi=105, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def _draw_routes(axes: Any, points: list[dict[str, Any]]) -> None:
    """Draw a row for each budget and a cell for each block: the share of images that run it."""
    rates = [list(point["choice_rates"].values()) for point in points]
    colours = LinearSegmentedColormap.from_list("runs", ["#f3f6f8", "#58b0d3", "#084b69"])
    axes.imshow(rates, cmap=colours, vmin=0, vmax=1, aspect="auto", origin="lower")
    for row, rate in enumerate(rates):
        for column, share in enumerate(rate):
            colour = "white" if share > 0.55 else INK
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xticks(range(len(rates[0])), [f"{i + 1}" for i in range(len(rates[0]))])
    axes.set_yticks(range(len(points)), [f"{point['budget']:.1f}" for point in points])
    axes.set_xticks([i - 0.5 for i in range(1, len(rates[0]))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(points))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("residual block")
    axes.set_ylabel("budget")
    axes.set_title("One policy: % of images that run a block", loc="left")


def _draw_fronts(axes: Any, report: dict[str, Any], spent: str, dense: float, label: str) -> None:
    """Draw accuracy against what `spent` names, of each contender, and of plain networks that were trained alone."""
    for name, (colour, width, style, marker, *_) in LINES.items():
        mine = [p for p in report["points"] if p["policy"] == name]
        axes.plot(
            [p[spent] for p in mine], [100 * p["accuracy"] for p in mine], style, marker=marker, markersize=3.5,
            color=colour, linewidth=width,
        )  # fmt: skip
    smaller = next(p for p in report["points"] if p["policy"] == "smaller")
    plain = [
        (dense, report["dense"]["plain_accuracy"], "plain network"),
        (smaller[spent], smaller["accuracy"], "half as deep"),
    ]
    for x, accuracy, name in plain:
        axes.plot(x, 100 * accuracy, "D", color=INK, markersize=5)
        end = {"xytext": (-2, 7), "ha": "right"} if x == dense else {"xytext": (-4, 7), "ha": "center"}
        axes.annotate(name, (x, 100 * accuracy), textcoords="offset points", fontsize=8.5, color=INK, **end)
    axes.set_xlim(0, dense * 1.08)
    axes.set_ylim(91.4, 94.3)
    axes.grid(color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(label)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    report_file, picture = given or (REPORT, PICTURE)
    draw(json.loads(report_file.read_text()), picture)
