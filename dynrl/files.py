"""Files are safe to load and never half-written: safetensors with JSON metadata, and plain JSON."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

M = TypeVar("M", bound=nn.Module)
ASIDE = ".aside"  # the end of the names of what is not yet whole
FORMAT = "1"  # the format number of tensor files; files with another number are refused


@contextlib.contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, else remove it.

    The file gets the mode that the old one has, or that the umask gives. A kill leaves the temporary file, which
    `remove_leftovers` finds by its name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE((path if path.exists() else aside).stat().st_mode)
    try:
        yield aside
        os.chmod(aside, mode)  # the block may have written another file in its place
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def make_aside(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; rename it to `folder` if the block succeeds, else remove it.

    Raises:
        ValueError: `folder` exists, or lies in a file.
    """
    folder = Path(folder)
    _check_new(folder)
    check_folder(folder)
    made = [parent for parent in folder.parents if not parent.exists()]
    aside = _aside(folder)
    try:
        aside.mkdir(parents=True)
        yield aside
        try:
            aside.rename(folder)
        except OSError:
            _check_new(folder)  # another process may have made it just now
            raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        _remove_empty(made)
        raise


def _check_new(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise ValueError(
            f"{folder} exists; choose another --out, or, if it is a run, continue it by dynrl train --resume "
            f"{quote(str(folder))}"
        )


def _remove_empty(made: list[Path]) -> None:
    """Remove folders, the inmost first; one that somebody has written into stays."""
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _aside(path: Path) -> Path:
    """Return a new name beside `path` for what is not yet whole."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}{ASIDE}")


def remove_leftovers(folder: str | Path) -> None:
    """Remove from `folder`, which nobody else may be writing into, what kills left of `write_aside`."""
    for path in Path(folder).glob(f".*{ASIDE}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Within the block, no other process or thread can lock `folder`. The lock ends with its process, however it ends.

    Raises:
        ValueError: `folder` is locked.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{folder} is in use by another process of dynrl; wait for its end, or stop it") from None
    except OSError as error:
        os.close(handle)
        raise ValueError(f"{folder} cannot be locked ({error}); put it on a file system that has locks") from None
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing_into(folder: str | Path | None) -> Iterator[None]:
    """Make `folder` if it is missing, and lock it within the block; it is gone again if nothing was written into it.

    Who reads a run and writes what was found into its folder does both in one block: else the policy may be another by
    then. None is no folder.

    Raises:
        ValueError: `folder` is no folder and cannot become one, is not writable, or is locked.
    """
    if folder is None:
        yield
        return
    check_folder(folder)
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            yield
    finally:
        _remove_empty(made)


@contextlib.contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Tell whatever goes wrong in the block, which reads `path`, as one ValueError that names the file.

    Args:
        path: the file.
        what: what the file is expected to be, as in "it is no WHAT".
    """
    try:
        yield
    except ValueError as error:
        said = " ".join(str(error).split())
        raise ValueError(said if said.startswith(str(path)) else f"{path}: {said}") from error
    except Exception as error:  # wrong content may raise anything
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} is no {what} that can be used ({type(error).__name__}: {said}); restore the original, or make it "
            "anew"
        ) from error


@contextlib.contextmanager
def told_here() -> Iterator[None]:
    """Within the block, an OSError that ends another thread prints no traceback.

    TensorBoard writes in a thread. What fails there, on a full disk, is raised by the next call in this one.
    """
    before = threading.excepthook

    def keep_quiet(failed: threading.ExceptHookArgs) -> None:
        if not issubclass(failed.exc_type, OSError):
            before(failed)

    threading.excepthook = keep_quiet
    try:
        yield
    finally:
        threading.excepthook = before


def check_folder(path: str | Path | None) -> None:
    """Refuse, before work that ends in files there, a path that is no folder and cannot become one."""
    if path is None:
        return
    there = next(each for each in (Path(path), *Path(path).absolute().parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"expected a folder to write into, got the file {there}; choose another than {path}")
    if not os.access(there, os.W_OK):
        raise ValueError(f"expected a folder to write into, got {path}, but {there} is not writable; choose another")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as a complete file of indented JSON, or not at all; refuse NaN and infinity, which are not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with write_aside(path) as aside:
        aside.write_text(text)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raise a ValueError that names the file if it is missing or damaged."""
    with reading(path, "JSON file"):
        try:
            return parse_json(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable JSON file: {error}") from None


def parse_json(text: str) -> Any:
    """Parse JSON; raise a ValueError for what is none, and for numbers that are not finite."""

    def refuse(word: str) -> Any:
        raise ValueError(f"expected finite numbers, got {word}")

    def finite(word: str) -> float:
        number = float(word)
        return number if math.isfinite(number) else refuse(word)

    return json.loads(text, parse_constant=refuse, parse_float=finite)


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
    try:
        check_finite(tensors)
    except ValueError as error:
        raise ValueError(f"refused to save {path}: {error}") from None
    header = {
        "dynrl": json.dumps(metadata, sort_keys=True), "kind": kind, "format": FORMAT,
        "sha256": fingerprint(tensors, metadata),
    }  # fmt: skip
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with write_aside(path) as aside:
        try:
            save_file(contiguous, aside, metadata=header)
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path} cannot be written: {error}") from None


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata that `save_tensors` wrote.

    Raises:
        ValueError: the file is missing, is no safetensors file, is cut short, was changed after it was written, is of
            another `kind`, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a {kind} file written by dynrl")
    with reading(path, f"{kind} file"):
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
            metadata = parse_json(header["dynrl"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} has no readable dynrl metadata ({error}); write it with dynrl") from None
        if header.get("sha256") != fingerprint(tensors, metadata):
            raise ValueError(
                f"{path} was changed after it was written: its checksum does not match; restore the original"
            )
        if not isinstance(metadata, dict):
            raise ValueError(f"expected an object as the metadata of a {kind} file, got a {type(metadata).__name__}")
        check_finite(tensors)
    return tensors, metadata


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse, with a ValueError, NaN and infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name!r} holds NaN or infinity; train again with a lower learning rate")


def filled(build: Callable[[], M], tensors: Mapping[str, Tensor]) -> M:
    """Build a module and fill it with a file's tensors, whose names and shapes must be the module's own.

    The build ends as soon as it takes more than the file can fill, so that wrong settings cost neither memory nor time.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or type.
    """
    with limited(2 * len(tensors) + 100, 2 * sum(tensor.numel() for tensor in tensors.values()) + 1000):
        module = build()
    own = module.state_dict()
    for what, differ in (("missing", own.keys() - tensors.keys()), ("unknown", tensors.keys() - own.keys())):
        if differ:
            raise ValueError(f"tensor {min(differ)!r} is {what}: expected {len(own)} by the settings in the file")
    floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floats) > 1:
        raise ValueError(f"expected numbers of one type, got {', '.join(sorted(map(str, floats)))}")
    for name, tensor in own.items():
        got = tensors[name]
        alike = got.is_floating_point() if tensor.is_floating_point() else got.dtype == tensor.dtype
        if got.shape != tensor.shape or not alike:
            raise ValueError(
                f"tensor {name!r}: expected {tensor.dtype} {tuple(tensor.shape)} by the settings in the file, got "
                f"{got.dtype} {tuple(got.shape)}"
            )
    if floats and floats != {tensor.dtype for tensor in own.values() if tensor.is_floating_point()}:
        module.to(dtype=floats.pop())
    module.load_state_dict(dict(tensors))
    return module


@contextlib.contextmanager
def limited(count: int, numbers: int) -> Iterator[None]:
    """Within the block, refuse to make more than `count` weights, or weights of more than `numbers` numbers in all.

    Torch registers a weight before it fills it. A weight that is refused here has taken no memory yet.

    Raises:
        ValueError: more is made.
    """
    thread, made, size = threading.get_ident(), 0, 0

    def weigh(module: nn.Module, name: str, weight: Tensor | None) -> None:
        nonlocal made, size
        if threading.get_ident() == thread and weight is not None:
            made, size = made + 1, size + weight.numel()
            if made > count or size > numbers:
                raise ValueError(f"these settings make a network of more than {count:,} weights or {numbers:,} numbers")

    handle = register_module_parameter_registration_hook(weigh)
    try:
        yield
    finally:
        handle.remove()
