"""Your own images make a data set: a folder that has a folder of images for each class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dynrl.data.base import KEPT, Augmentation, Dataset, standardised
from dynrl.data.stored import read_all, store, too_large

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
ORIENTATION = 0x0112  # the EXIF tag that says how viewers turn a photo; from 5 on, width and height change places
# Files with these names are images, too, but Pillow alone cannot open them.
OTHERS = {".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl", ".tga", ".svg", ".dng", ".cr2", ".nef", ".arw"}
# The shares of each class that are drawn if the folder has no such parts. The test part is drawn first, so that no
# other draw changes it.
SHARES = {"test": 0.1, "validation": 0.1}
PARTS = ("train", "validation", "test")
# What folders of parts are called elsewhere, in small letters; classes may be called so, too.
LIKE_PARTS = {*PARTS, "training", "testing", "val", "valid", "dev"}
T = TypeVar("T")


def image_folder(name: str) -> Dataset:
    """Load the images below a folder, into memory or, if they are many, into a temporary file (`dynrl.data.stored`).

    Args:
        name: the folder's path, or `PATH@SIZE`, which resizes the shorter side to SIZE pixels and takes the middle
            square. The folder has a folder for each class; or it has `train`, `test` and, if wanted, `validation`,
            each with a folder for each class. What begins with a dot or an @ is skipped at any depth: programs keep
            copies and previews there. For a part that is missing, about a tenth of each class, and at least
            one image, is drawn from `train` or from all images. A hash of CLASS/FILE draws them, so images keep their
            part when others are added or removed. The only exception is a class so small that the hashes draw no
            image for a part: the one image that is then taken may change.

    Returns:
        a data set of images [1, height, width] if all are grey, else [3, height, width] in red, green and blue. What is
        transparent is white.

    Raises:
        ValueError: there is no such folder, it has fewer than two classes or an empty one, its parts have different
            classes, it is not clear what are parts and what are classes, a file is no image, or images differ in size
            and no SIZE is given.
    """
    root, size = split_name(name)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; name one that has a folder of images for each class")
    below = below_of(root)
    classes, files, apart = drawn_parts(
        root,
        "folder",
        SUFFIXES | OTHERS,
        _classes,
        lambda file: os.fsencode(file.relative_to(below).as_posix()),
        "images",
    )
    shape = _shape([file for part in files.values() for file, _ in part], size)
    on_disk = too_large(sum(map(len, files.values())), shape)
    parts = []
    for part in PARTS:
        decoded = _Images([file for file, _ in files[part]], shape, size)
        parts.append((decoded.all(on_disk), torch.tensor([label for _, label in files[part]])))
    augmentation = Augmentation(flip=True, shift=max(1, shape[-1] // 16))
    return replace(standardised(name, len(classes), augmentation, parts, tuple(classes)), apart=apart)


def split_name(name: str) -> tuple[Path, int | None]:
    """Split `PATH` or `PATH@SIZE` into the folder and the size; the size is None if there is none."""
    path, at, size = name.rpartition("@")
    if not at or not size.isdecimal():
        return Path(name), None
    if not 1 <= int(size) <= 4096:
        raise ValueError(f"expected a size of 1 to 4096 pixels, or words of a text, behind the @ of {name!r}")
    return Path(path), int(size)


def below_of(root: Path) -> Path:
    """Return the folder that has the classes of the training part: `train` below `root`, if it is there, or `root`."""
    return root / "train" if (root / "train").is_dir() else root


def drawn_parts(
    root: Path,
    holder: str,
    suffixes: set[str],
    classes_of: Callable[[Path], dict[str, list[T]]],
    name_of: Callable[[T], bytes],
    what: str,
) -> tuple[list[str], dict[str, list[tuple[T, int]]], Tensor]:
    """Read the classes below a folder, and draw the parts that it does not have.

    Args:
        root: the folder.
        holder, what: what holds a class, and what it holds, in words.
        suffixes: the ends of the names of files that hold such things, in small letters.
        classes_of: a function from a folder to what each class there has, by the class's name.
        name_of: what a thing is drawn by, so that it keeps its part whatever else there is.

    Returns:
        the classes; for each part what it has, in random order, with the numbers of its classes; and the rows of the
        training part that are for policies (`Dataset.apart`), which are drawn like parts.
    """
    _check_layout(root, suffixes)
    below = below_of(root)
    given = [part for part in SHARES if below != root and (root / part).is_dir()]
    found = {"train": classes_of(below)} | {part: classes_of(root / part) for part in given}
    classes = list(found["train"])
    if len(classes) < 2:
        raise ValueError(
            f"expected a {holder} for each of two classes or more in {root}, found {classes or 'none'}; put what is "
            "of a class into one that bears its name"
        )
    for part, mine in found.items():
        if list(mine) != classes:
            raise ValueError(
                f"{root / part} has the classes {list(mine)}, {root / 'train'} has {classes}; give all parts the "
                "same classes"
            )
    drawn = {part: [(thing, i) for i, c in enumerate(classes) for thing in found[part][c]] for part in found}
    missing = [part for part in SHARES if part not in drawn]
    for name, inside in found["train"].items():
        different = len(set(map(name_of, inside)))
        if missing and different < 1 + len(missing):
            raise ValueError(
                f"the class {name!r} has too few different {what} to draw some for validation and test; expected at "
                f"least {1 + len(missing)}, got {different}"
            )
    for i, part in enumerate(missing):
        drawn["train"], drawn[part] = _drawn(drawn["train"], part, SHARES[part], name_of, len(missing) - i)
    for part, things in drawn.items():
        drawn[part] = [things[position] for position in np.random.default_rng(0).permutation(len(things))]
    return classes, drawn, _apart(drawn["train"], name_of)


def _apart(train: list[tuple[T, int]], name_of: Callable[[T], bytes]) -> Tensor:
    """Return the rows of the training part that are drawn for policies.

    They depend on nothing else that is there. By their number alone, another file would give policies what a backbone
    was trained on.
    """
    rows = [(row, label) for row, (_, label) in enumerate(train)]

    def name_at(row: int) -> bytes:
        return name_of(train[row][0])

    # Of few things, the hashes may draw none.
    drawn = _drawn(rows, "unseen", KEPT, name_at, 1, 0)[1] or _drawn(rows, "unseen", KEPT, name_at, 1)[1] or rows[-1:]
    return torch.tensor(sorted(row for row, _ in drawn))


def _check_layout(root: Path, suffixes: set[str]) -> None:
    """Refuse, with a ValueError, what may be classes or parts; and say which files stand beside the parts."""
    inside = [entry for entry in sorted(root.iterdir()) if not _hidden(entry, root)]
    folders = [entry for entry in inside if entry.is_dir()]
    files = [entry for entry in inside if entry.is_file() and entry.suffix.lower() in suffixes]
    advice = (
        f"name parts {', '.join(PARTS)}, with the classes in each of them; give classes other names than parts have, "
        "and move away what is neither"
    )
    if below_of(root) != root:
        others = [each for each in folders if each.name not in PARTS and _holds(each, suffixes)]
        if others:
            raise ValueError(
                f"{root} has a folder train, and beside it {', '.join(each.name for each in others)}, so it is not "
                f"clear what are parts and what are classes; {advice}"
            )
        if files:
            warnings.warn(
                f"{len(files)} files beside the parts of {root} are left out, such as {files[0]}", stacklevel=2
            )
        return
    like = [entry for entry in (*folders, *files) if entry.stem.lower() in LIKE_PARTS]
    nested = [entry for entry in like if any(each.is_dir() and not _hidden(each, root) for each in entry.glob("*"))]
    if nested or (like and len(like) == len(folders) + len(files)):
        raise ValueError(
            f"{root} has no folder train, but {', '.join(entry.name for entry in nested or like)}, so it is not clear "
            f"what are parts and what are classes; {advice}"
        )


def _holds(folder: Path, suffixes: set[str]) -> bool:
    found = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    return any(not _hidden(file, folder) for file in found)


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class by the class's name."""
    found = {}
    inside = [entry for entry in sorted(folder.iterdir()) if not _hidden(entry, folder)]
    left_out = [file for file in inside if file.suffix.lower() in SUFFIXES | OTHERS and file.is_file()]
    links: list[Path] = []
    for place in (entry for entry in inside if entry.is_dir()):
        entries = sorted(place.rglob("*"))
        images = [file for file in entries if file.suffix.lower() in SUFFIXES | OTHERS and file.is_file()]
        taken = [file.suffix.lower() in SUFFIXES and not _hidden(file, folder) for file in images]
        found[place.name] = list(compress(images, taken))
        left_out += (file for file, kept in zip(images, taken, strict=True) if not kept)
        links += (each for each in entries if each.is_symlink() and each.is_dir() and not _hidden(each, folder))
        if not found[place.name]:
            raise ValueError(f"{place} holds no image ({', '.join(sorted(SUFFIXES))}); fill it or remove it")
    if left_out:
        warnings.warn(
            f"{len(left_out)} files below {folder} look like images and are left out, such as {left_out[0]}: names "
            f"that begin with a dot or an @ are skipped, and images are read from {', '.join(sorted(SUFFIXES))} files "
            "in the folders of classes",
            stacklevel=2,
        )
    if links:
        warnings.warn(
            f"{len(links)} links to folders below {folder} are not followed, such as {links[0]}; if their images are "
            "wanted, put these themselves there",
            stacklevel=2,
        )
    return found


def _hidden(path: Path, root: Path) -> bool:
    return any(name.startswith((".", "@")) for name in path.relative_to(root).parts)


def _drawn(
    things: list[tuple[T, int]], part: str, share: float, name_of: Callable[[T], bytes], leave: int, least: int = 1
) -> tuple[list[tuple[T, int]], list[tuple[T, int]]]:
    """Draw things for `part`, and return those left and those drawn.

    Things of one name, such as equal texts, are drawn together, or what is tested on is also trained on. At least
    `least` names of each class are drawn, and at least `leave` are left, which counts more.
    """

    def place(thing: T) -> float:  # from 0 to 1, by the thing's own name alone
        name = f"{part}/".encode() + name_of(thing)
        return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64

    by_class: dict[int, dict[float, list[T]]] = {}
    for thing, label in things:
        by_class.setdefault(label, {}).setdefault(place(thing), []).append(thing)
    kept, drawn = list[tuple[T, int]](), list[tuple[T, int]]()
    for label, mine in sorted(by_class.items()):
        count = min(max(least, sum(at < share for at in mine)), len(mine) - leave)
        for i, at in enumerate(sorted(mine)):
            (drawn if i < count else kept).extend((thing, label) for thing in mine[at])
    return kept, drawn


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may raise anything
        said = str(error) or type(error).__name__
        raise ValueError(f"{file} cannot be read as an image ({said}); repair or remove it") from None


def _shape(files: list[Path], size: int | None) -> tuple[int, int, int]:
    """Return (channels, height, width) of all images as viewers show them, as read from their headers."""
    grey, first = True, None
    for file in files:
        with _opened(file) as image:
            mode = image.mode
            # Pillow turns a TIFF itself.
            turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            shown = image.size[::-1] if turned else image.size
        if mode.startswith(("I", "F")):
            raise ValueError(f"{file} has pixels of mode {mode}; convert it to 8 bits a channel")
        grey = grey and mode in ("L", "LA", "1")
        first = first or shown
        if size is None and shown != first:
            raise ValueError(
                f"{files[0]} has {first[0]}x{first[1]} pixels, {file} has {shown[0]}x{shown[1]}; add @SIZE "
                "to the folder's name to resize all images to SIZE pixels"
            )
    assert first is not None
    width, height = first if size is None else (size, size)
    return (1 if grey else 3), height, width


def _turned(image: Any) -> Any:
    """Return an image as its orientation says; all else that its EXIF holds may be ill-typed, and is left alone."""
    from PIL.Image import Transpose

    image.load()  # which turns a TIFF
    ways = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    way = ways.get(image.getexif().get(ORIENTATION))
    return image if way is None else image.transpose(way)


def _on_white(image: Any) -> Any:
    """Return an image as viewers show it on a white page; what stands in its transparency alone would be lost else."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


@dataclass(frozen=True)
class _Images:
    """The images of some files as raw pixels [channels, height, width] uint8; each is decoded when it is asked for."""

    files: list[Path]
    shape: tuple[int, int, int]
    size: int | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> np.ndarray:
        from PIL import ImageOps

        with _opened(self.files[i]) as image:
            converted = _on_white(_turned(image)).convert("L" if self.shape[0] == 1 else "RGB")
        if self.size is not None:
            converted = ImageOps.fit(converted, (self.size, self.size))
        channels, height, width = self.shape
        return np.array(converted, dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)

    def all(self, on_disk: bool) -> Any:
        """Return all images in 0 to 1, in a file or in memory."""
        if on_disk:
            return store(read_all(self), self.shape, torch.uint8)
        pixels = torch.empty(len(self), *self.shape)
        for row in range(len(self)):
            pixels[row] = torch.from_numpy(np.ascontiguousarray(self[row])).float() / 255
        return pixels
