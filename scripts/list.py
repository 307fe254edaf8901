"""List decisions, data sets and backbones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Args:
    """This verb takes no settings."""


def main(args: Args) -> None:
    """Print the registry as a table, and the names of data sets and shipped models."""
    from dynrl.data import DATASETS
    from dynrl.deploy import shipped
    from dynrl.envs import DECISIONS
    from dynrl.envs.pages import families_of
    from dynrl.recipes import DEFAULTS

    rows = [("decision", "environment", "backbones", "data sets with defaults", "action", "source")]
    for d in DECISIONS.values():
        data = ", ".join(sorted(data for name, data in DEFAULTS if name == d.name))
        rows.append((d.name, d.env_id, ", ".join(f.__name__ for f in families_of(d.name)), data, d.action, d.source))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        f"\ndata sets: {', '.join(DATASETS)}; for decisions on images and texts also FOLDER or FOLDER@SIZE, with a "
        "folder or a text file a class"
    )
    print(f"models that come with dynrl, for dynrl.load: {', '.join(shipped())}")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("list")
