"""Write tables from the registries and `results/` into README and docs, between marks in these pages.

A table goes from `<!-- table:NAME -->` to `<!-- end -->`. NAME is a folder of `results/` with a report; `demo` (one
report in four rows); `by-decision` (a row for each decision); `comparison` or `one-price` (all comparisons);
`decisions`, `decisions-pages` or `data` (the registries); `shipped`; or a bench, whose newest file is shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

SHOWN = (  # the reports in the table by decision
    "skip-fashion-mnist", "exit-fashion-mnist", "expert-fashion-mnist", "channel-fashion-mnist",
    "hidden-update-sequential-digits",
)  # fmt: skip
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
    from dynrl.files import read_json
    from dynrl.scripts import registries
    from dynrl.scripts.bench.tables import BENCHES

    if name in REGISTRIES:
        return getattr(registries, REGISTRIES[name])()
    if name == "shipped":
        return tables.shipped_table()
    if name in ("comparison", "one-price"):
        compared = [read_json(path) for path in sorted(results.glob("*/comparison.json"))]
        return tables.comparison_table(compared) if name == "comparison" else tables.one_price_table(compared)
    if name == "by-decision":
        return tables.by_decision_table({folder: read_json(results / folder / "report.json") for folder in SHOWN})
    if name == "demo":
        return tables.demo_table(read_json(results / "skip-digits" / "report.json"))
    if name in BENCHES:
        newest = max(results.glob(f"{name}-*.json"), default=results / f"{name}-DATE.json")
        return BENCHES[name](read_json(newest))
    return tables.report_table(read_json(results / name / "report.json"))


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("tables")
