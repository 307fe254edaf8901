"""Files that are downloaded once, checked, and kept."""

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
    """Where downloads go: $XDG_CACHE_HOME/dynrl, else ~/.cache/dynrl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynrl"


def check_digest(content: bytes, name: str, algorithm: str, digest: str) -> None:
    """Refuse, with a ValueError, contents that are not the official ones."""
    if hashlib.new(algorithm, content).hexdigest() != digest:
        raise ValueError(
            f"{name}: its contents are not the official ones ({algorithm.upper()} differs); delete it and try again"
        )


def fetch(url: str, target: Path, check: Callable[[bytes, str], Any], otherwise: str) -> None:
    """Download `url` to `target`, with progress, if `check(content, url)` raises nothing.

    Raises:
        ValueError: no connection; it tells what to do `otherwise`.
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
