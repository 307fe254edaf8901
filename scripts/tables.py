"""Write tables from the registries and `results/` into README and docs, between marks in these pages.

A table goes from `<!-- table:NAME -->` to `<!-- end -->`. NAME is a folder of `results/` with a report, or else with a
comparison; `demo` (what `dynrl demo` prints); `by-decision` (a row for each decision); `comparison` or `one-price` (all
comparisons); `attacks` (what attacks take); `decisions`, `decisions-pages` or `data` (the registries); `shipped`; or a
bench, whose newest file is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

SHOWN = {  # the reports in the table by decision, each with the share of the dense MACs at which it is shown
    "jump-find": 0.03, "model-windows": 0.05, "look-digit-scenes-large": 0.3, "model-fashion-mnist": 0.2,
    "unroll-prefix": 0.4, "exit-trace-long": 0.5, "skip-trace": 0.35, "exit-trace": 0.35,
    "skip-fashion-mnist": 0.5, "exit-fashion-mnist": 0.5, "expert-fashion-mnist": 0.5,
    "channel-fashion-mnist": 0.5, "hidden-update-sequential-digits": 0.5,
}  # fmt: skip
REGISTRIES = {"decisions": "decisions_table", "decisions-pages": "decisions_pages", "data": "data_table"}


@dataclass
class Args:
    """These are the settings of `dynrl tables`."""

    pages: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The files to rewrite; by default, README.md and docs/*.md."""
    results: Path = Path("results")
    """The folder with the results."""


def main(args: Args) -> None:
    """Rewrite the pages; a mark without a results file is an error that is raised before any page is written."""
    from dynrl.files import write_aside

    pages = args.pages or (Path("README.md"), *sorted(Path("docs").glob("*.md")))

    def marked(mark: re.Match[str]) -> str:
        return "\n".join([f"<!-- table:{mark[1]} -->", *table(mark[1], args.results), "<!-- end -->"])

    written = {}
    for page in pages:
        if not page.is_file():
            raise ValueError(f"expected pages to rewrite, got no file {page}; name pages, or run it in the repository")
        text = page.read_text()
        new = re.sub(r"<!-- table:([\w-]+) -->.*?<!-- end -->", marked, text, flags=re.DOTALL)
        if new != text:
            written[page] = new
    for page, text in written.items():
        with write_aside(page) as aside:
            aside.write_text(text)


def table(name: str, results: Path) -> list[str]:
    """Return the lines of the table of that name."""
    from dynrl.evaluation import tables
    from dynrl.files import read_json, reading
    from dynrl.scripts import demo, registries
    from dynrl.scripts.bench.tables import BENCHES

    def read(write: Callable[..., list[str]], *paths: Path) -> list[str]:
        with reading(", ".join(map(str, paths)), f"source of the table {name}"):
            return write(*map(read_json, paths))

    if name in REGISTRIES:
        return getattr(registries, REGISTRIES[name])()
    if name == "shipped":
        return tables.shipped_table()
    if name in ("comparison", "one-price"):
        write = tables.comparison_table if name == "comparison" else tables.one_price_table
        return read(lambda *compared: write([*compared]), *sorted(results.glob("*/comparison.json")))
    if name == "by-decision":
        reports = [results / folder / "report.json" for folder in SHOWN]
        shares = [*SHOWN.values()]
        return read(lambda *found: tables.by_decision_table(dict(zip(SHOWN, found, strict=True)), shares), *reports)
    if name == "attacks":
        return read(lambda *found: tables.attacks_table([*found]), *sorted(results.glob("*/attack.json")))
    if name == "demo":
        return read(demo.table, results / f"{demo.DECISION}-{demo.DATA}" / "report.json")
    if name in BENCHES:
        newest = max(results.glob(f"{name}-[0-9]*.json"), default=results / f"{name}-DATE.json")
        return read(BENCHES[name], newest)
    compared = results / name / "comparison.json"
    if compared.is_file() and not (results / name / "report.json").is_file():
        return read(lambda found: tables.comparison_table([found]), compared)
    return read(tables.report_table, results / name / "report.json")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("tables")
