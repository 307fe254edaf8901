"""`dynrl tables`: named blocks in any page are written from results."""

from __future__ import annotations

import shutil

import pytest

from dynrl.files import read_json
from dynrl.scripts.cli import main
from tests.scripts.calls import ROOT

BLOCK = "<!-- table:{} -->\nto be written\n<!-- end -->\n"


@pytest.fixture
def pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n" + BLOCK.format("decisions") + "after\n")
    (tmp_path / "docs" / "results.md").write_text(
        BLOCK.format("skip-digits") + "between\n" + BLOCK.format("comparison")
    )
    return tmp_path


def test_blocks_are_written_in_readme_and_docs(pages):
    (pages / "docs" / "plain.md").write_text("no table")
    before = (pages / "docs" / "plain.md").stat().st_mtime_ns
    main(["tables"])
    readme, results = (pages / "README.md").read_text(), (pages / "docs" / "results.md").read_text()
    assert readme.startswith("before\n<!-- table:decisions -->\n| decision |") and readme.endswith(
        "<!-- end -->\nafter\n"
    )
    assert "| `skip` | `dynrl/Skip-v0` |" in readme and "to be written" not in readme + results
    report = read_json(pages / "results" / "skip-digits" / "report.json")
    (row,) = (line for line in results.splitlines() if line.startswith("| learned |"))
    assert all(f" {100 * p['accuracy']:.2f} " in row for p in report["points"] if p["policy"] == "learned")
    assert "\nbetween\n<!-- table:comparison -->\n| decision, data | policy (seeds) |" in results
    assert (pages / "docs" / "plain.md").stat().st_mtime_ns == before
    written = (pages / "README.md").stat().st_mtime_ns
    main(["tables", "README.md"])
    assert (pages / "README.md").stat().st_mtime_ns == written, "what is as it should be is not touched"


def test_a_block_without_results_is_refused_and_nothing_is_written(pages, capsys):
    (pages / "docs" / "speed.md").write_text(BLOCK.format("bench-nosuch"))
    before = (pages / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["tables"])
    assert "bench-nosuch" in capsys.readouterr().err and (pages / "README.md").read_text() == before


@pytest.mark.parametrize(
    "name",
    [
        "by-decision",
        "demo",
        "one-price",
        "shipped",
        "data",
        "decisions-pages",
        "gpu",
        "gpu-predicted",
        "bench-known",
        "bench-env",
        "bench-model",
    ],
)
def test_all_tables_come_from_what_is_there(name, pages):
    (pages / "page.md").write_text(BLOCK.format(name))
    main(["tables", "page.md"])
    assert (pages / "page.md").read_text().count("\n") > 7


def test_pages_that_are_not_there_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["tables"])
    assert "got no file README.md; name pages, or run it in the repository" in capsys.readouterr().err
