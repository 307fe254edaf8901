"""Files are safe to load and never half-written: safetensors with JSON metadata, and plain JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "1"  # the format number of tensor files; files with another number are refused


@contextlib.contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, else remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp's 0600 would keep other users from reading a shared run folder
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def whole(checkpoint: Path) -> Iterator[None]:
    """What goes wrong in the block, which reads `checkpoint`, is told as a ValueError that names it."""
    try:
        yield
    except Exception as error:  # unpickling raises anything
        raise ValueError(
            f"the checkpoint {checkpoint} is damaged ({type(error).__name__}); take it away, and go on from the one "
            "before, or from the beginning"
        ) from error


def check_folder(path: str | Path | None) -> None:
    """Refuse, before work that ends in files there, a path that is a file already."""
    if path is not None and Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"expected a folder to write into, got the file {path}; choose another")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as a complete file of indented JSON, or not at all; refuse NaN and infinity, which are not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with write_aside(path) as aside:
        aside.write_text(text)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raise a ValueError that names the file if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None


def fingerprint(tensors: Mapping[str, Tensor], metadata: Any = None) -> str:
    """Return the SHA-256 digest of the names, dtypes, shapes and bytes of `tensors` and of `metadata` as JSON."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write `tensors` and `metadata` to one safetensors file of the given `kind`, with a checksum of both.

    Raises:
        ValueError: a tensor holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"refused to save {path}: tensor {name!r} holds NaN or infinity")
    header = {
        "dynrl": json.dumps(metadata, sort_keys=True), "kind": kind, "format": FORMAT,
        "sha256": fingerprint(tensors, metadata),
    }  # fmt: skip
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with write_aside(path) as aside:
        save_file(contiguous, aside, metadata=header)


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata that `save_tensors` wrote.

    Raises:
        ValueError: the file is missing, is no safetensors file, is cut short, was changed after it was written, is of
            another `kind`, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a {kind} file written by dynrl")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut short or is no safetensors file ({error})") from None
    if header.get("kind") != kind:
        raise ValueError(f"{path} is a {header.get('kind', 'foreign safetensors')} file; expected a {kind} file")
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} has format {header.get('format')}; this version of dynrl reads format {FORMAT}")
    try:
        metadata = json.loads(header["dynrl"])
    except (KeyError, json.JSONDecodeError):
        raise ValueError(f"{path} has no readable dynrl metadata; write it with dynrl") from None
    if header.get("sha256") != fingerprint(tensors, metadata):
        raise ValueError(f"{path} was changed after it was written: its checksum does not match; restore the original")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {name!r} holds NaN or infinity")
    return tensors, metadata
