"""One switch turns on everything that dynrl shows while it works: progress bars and lines.

Calls from Python show nothing by default. Inside `with talking():` they do, as in the commands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

_talks = False


@contextmanager
def talking(on: bool = True) -> Iterator[None]:
    """Within the block, bars and lines are shown; with `on=False`, nothing changes."""
    global _talks
    before, _talks = _talks, _talks or on
    try:
        yield
    finally:
        _talks = before


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """Return a tqdm bar; outside a terminal, it writes a line every 10 seconds."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(*args, mininterval=interval, dynamic_ncols=True, disable=not _talks, **kwargs)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line to `file`, or to stdout if none is given."""
    if _talks:
        print(line, file=file, flush=True)
