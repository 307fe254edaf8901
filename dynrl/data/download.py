"""Downloaded files are checked and kept, so that each is downloaded once."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynrl.files import write_aside


def cache_folder() -> Path:
    """Return the folder for downloads: $XDG_CACHE_HOME/dynrl, or ~/.cache/dynrl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynrl"


def check_digest(content: bytes, name: str, algorithm: str, digest: str) -> None:
    """Refuse, with a ValueError, contents whose digest is not the official one."""
    if hashlib.new(algorithm, content).hexdigest() != digest:
        raise ValueError(
            f"{name}: its contents are not the official ones ({algorithm.upper()} differs); delete it and try again"
        )


def fetch(url: str, target: Path, check: Callable[[bytes, str], Any], otherwise: str) -> None:
    """Download `url` to `target` and show progress; nothing is written if `check(content, url)` raises an error.

    Raises:
        ValueError: there is no connection; the message ends with `otherwise`, which says what else to do.
    """
    from tqdm import tqdm

    chunks = []
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, desc=target.name) as progress:
                while chunk := response.read(1 << 16):
                    chunks.append(chunk)
                    progress.update(len(chunk))
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"could not download {url} ({error}); {otherwise}") from None
    content = b"".join(chunks)
    check(content, url)
    with write_aside(target) as aside:
        aside.write_bytes(content)
