"""Progress bars that also suit log files."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """A tqdm bar; where nobody watches a terminal, a line every 10 seconds instead of ten a second."""
    return tqdm(*args, mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True, **kwargs)
