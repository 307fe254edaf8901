"""Pictures bear a user's names as they are written, and what cannot be drawn stops nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

from dynrl.data import Split
from dynrl.evaluation import figures
from dynrl.files import read_json

RESULTS = Path(__file__).parents[2] / "results"
PNG = b"\x89PNG"
DOLLARS = ["$", "$$", "a_$x_", r"\frac$1$", r"\$", "100% {x}", "^", "$\\alpha$", "$$$", "b$c$d"]


USAGE = {
    "policy": "$\\p$", "price": 1.0, "groups": [{"class": i, "macs_fraction": 0.5} for i in range(10)],
    "columns": ["$\\gate$", "b"], "by_column": [[0.2, 0.7]] * 10, "cheapest": [0, 1], "dearest": [3, 2],
    "regions": [[[(0, 0, 1, 1)]]] * 4, "words": [["$\\x$"]] * 4, "distinct_routes": 2, "commonest": 0.9,
    "difficulty": {"$\\size$": {"spearman": None, "bins": [
        {"from": 0.0, "to": 1.0, "inputs": 5, "macs_fraction": 0.5, "accuracy": 0.5},
    ]}},
}  # fmt: skip


def read(folder, file):
    found = read_json(RESULTS / folder / f"{file}.json")
    return found | {"data": "some/$\\nosuch$", "classes": DOLLARS, "usage": USAGE}


def split(rows=10_000):
    return Split(torch.zeros(rows, 1, 4, 4), torch.arange(rows) % 10)


def test_names_are_no_formulas(tmp_path):
    compared, attacked = (next(RESULTS.glob(f"*/{name}.json")).parent.name for name in ("comparison", "attack"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.draw_report(read("exit-fashion-mnist", "report"), split(), tmp_path / "report.png")
        figures.draw_comparison(read(compared, "comparison"), tmp_path / "comparison.png")
        figures.draw_attack(read(attacked, "attack"), tmp_path / "attack.png")
        figures.draw_words(USAGE, tmp_path / "words.png")
        figures.draw_regions(USAGE, split(), tmp_path / "regions.png")
    assert [path.read_bytes()[:4] for path in tmp_path.iterdir()] == [PNG] * 5


def test_powers_of_ten_along_an_axis_stay_formulas(tmp_path):
    figure = figures._new_figure()
    axis = figure.subplots()
    axis.plot([1, 2], [1e-3, 1e3], label="$\\nosuch$")
    axis.set(yscale="log", title="$a$")
    figures._set_names(axis.xaxis, ["$\\nosuch$", "b"])
    figures._save(figure, tmp_path / "x.png")
    assert not axis.title.get_parse_math()
    assert all(
        tick.label1.get_parse_math() and "10^" in tick.label1.get_text() for tick in axis.yaxis.get_major_ticks()
    )
    assert axis.xaxis.get_major_ticks()[0].label1.get_text() == r"\$\nosuch\$", "which is drawn as $"


def test_what_cannot_be_drawn_is_told_and_leaves_no_other_picture(tmp_path, monkeypatch):
    def fail(*given, **how):
        raise RuntimeError("no such colours")

    monkeypatch.setattr(Axes, "imshow", fail)
    picture = tmp_path / "report.png"
    picture.write_bytes(PNG)
    with pytest.warns(UserWarning, match=r"report\.png cannot be drawn \(RuntimeError: no such colours\)"):
        figures.draw_report(read("exit-fashion-mnist", "report"), split(), picture)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_half_of_both_ends_is_drawn(count, tmp_path, monkeypatch):
    said, write = [], Axes.text

    def text(axis, x, y, shown, **how):
        said.append(shown.strip())
        return write(axis, x, y, shown, **how)

    monkeypatch.setattr(Axes, "text", text)
    names = [f"least{i}" for i in range(count)] + [f"most{i}" for i in range(count)]
    usage = {
        "policy": "learned", "cheapest": [*range(count)], "dearest": [*range(count)], "words": [[name] for name in names],
        "regions": [[[(0, 0, 1, 1)]]] * 2 * count,
    }  # fmt: skip
    figures.draw_words(usage, tmp_path / "words.png")
    figures.draw_regions(usage, split(), tmp_path / "regions.png")
    half = (count + 1) // 2
    assert [name for name in said if name] == [f"{end}{i}" for end in ("least", "most") for i in range(half)]
    assert {path.name for path in tmp_path.iterdir()} == {"words.png", "regions.png"}
