"""Each file is a suite of `dynrl bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Keep = Callable[[dict[str, Any]], Any]  # called with each row as soon as it is measured


def forget(row: dict[str, Any]) -> None:
    """Do nothing with a row: whoever called waits for all of them."""
