"""These functions write the registries as Markdown tables for the pages."""

from __future__ import annotations

from importlib import import_module
from inspect import getdoc

from dynrl.backbones import FAMILIES
from dynrl.data import DATASETS
from dynrl.envs import DECISIONS
from dynrl.envs.pages import families_of


def decisions_table() -> list[str]:
    """Write a row for each decision."""
    lines = ["| decision | environment | what is chosen | source |", "|---|---|---|---|"]
    return lines + [f"| `{d.name}` | `{d.env_id}` | {d.action} | {d.source} |" for d in DECISIONS.values()]


def decisions_pages() -> list[str]:
    """Write a section for each decision, with its environment's question and the families that pose it."""
    lines: list[str] = []
    for row in DECISIONS.values():
        module, name = row.vector_entry_point.split(":")
        page = vars(getattr(import_module(module), name))["__doc__"]
        question = page.partition("\n")[0]
        names = {family: name for name, family in FAMILIES.items()}
        poses = [
            f"`{family.__name__}`" + (f" (`{names[family]}`)" if family in names else "")
            for family in families_of(row.name)
        ]
        lines += [
            f"### `{row.name}`: {row.action}", "", question, "",
            f"- Environment: `{row.env_id}`.", f"- Action: {_section(page, 'Action')}",
            f"- Features: {_section(page, 'Features')}", f"- Episode: {_section(page, 'Episode')}",
            f"- Families: {', '.join(poses)}.", f"- Source: {row.source}.", "",
        ]  # fmt: skip
    return lines[:-1]


def _section(page: str, name: str) -> str:
    """Return one section of an environment's page in one line."""
    _, _, rest = page.partition(f"## {name}\n")
    return " ".join(rest.partition("\n## ")[0].split())


def data_table() -> list[str]:
    """Write the data sets by name, each with the first paragraph of the docstring of its function."""
    lines = ["| `--data` | what; rows for training / validation / test |", "|---|---|"]
    for name, make in DATASETS.items():
        first, *_ = (getdoc(make) or "").split("\n\n")
        lines.append(f"| `{name}` | {' '.join(first.split())} |")
    return lines
