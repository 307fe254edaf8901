"""Lay the package out as a wheel installs it: `python scripts/lay_out.py FOLDER`.

Folders at the top level belong below `dynrl`. An editable install hides this from mypy, and a machine without pip has
no install at all. This script needs nothing but Python.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lay_out(folder: Path) -> None:
    """Copy the package, its tests and its settings into `folder`."""
    shutil.copytree(ROOT / "dynrl", folder / "dynrl")
    for name in ("envs", "policies", "agents", "scripts"):
        shutil.copytree(ROOT / name, folder / "dynrl" / name)
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
