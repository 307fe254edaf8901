"""Your own texts make a data set: a folder that has a text file for each class, with a document a line."""

from __future__ import annotations

from pathlib import Path

import torch

from dynrl.data.base import Augmentation, Dataset, Split
from dynrl.data.folder import PARTS, below_of, drawn_parts, split_name
from dynrl.vocabulary import Vocabulary

SUFFIX = ".txt"


def holds_texts(root: Path) -> bool:
    """Tell whether a folder, or `train` below it, has text files and no folders."""
    inside = [entry for entry in below_of(root).iterdir() if not _hidden(entry)]
    return any(_is_text(entry) for entry in inside) and not any(entry.is_dir() for entry in inside)


def text_folder(name: str) -> Dataset:
    """Load the texts of a folder as token ids.

    Args:
        name: the folder's path, or `PATH@LENGTH`, which reads LENGTH words of each text. The folder has a text file in
            UTF-8 for each class, such as `good.txt`, in which each line is a document; or it has `train`, `test` and,
            if wanted, `validation`, each with a file for each class. Empty lines and names that begin with a dot or an
            @ are skipped. For a part that is missing, about a tenth of each class, and at least one text, is drawn from
            `train` or from all texts, by a hash of the text. So texts keep their part when others are added or removed,
            and equal ones are drawn alike.

    Returns:
        a data set of token ids [length] int64, 0 behind the end of a text. Its vocabulary is made of the training texts
        (`Vocabulary.of`); texts are cut behind LENGTH words, or behind as many as the longest training text has, at
        most 400.

    Raises:
        ValueError: there are fewer than two classes or too few different texts, its parts have different classes, or a
            file is no text in UTF-8 or has no word.
    """
    root, length = split_name(name)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; name one that has a text file ({SUFFIX}) for each class")
    if length == 1:
        raise ValueError(f"expected texts of 2 words or more behind the @ of {name!r}")
    classes, found, apart = drawn_parts(root, f"text file ({SUFFIX})", {SUFFIX}, _classes, str.encode, "texts")
    vocabulary = Vocabulary.of((text for text, _ in found["train"]), length)

    def split(part: str) -> Split:
        texts = tuple(text for text, _ in found[part])
        return Split(vocabulary.encode(texts), torch.tensor([label for _, label in found[part]]), texts=texts)

    train, validation, test = map(split, PARTS)
    return Dataset(
        name, len(classes), train, validation, test, Augmentation(), names=tuple(classes), dtype="int64",
        vocabulary=vocabulary, apart=apart,
    )  # fmt: skip


def _hidden(entry: Path) -> bool:
    return entry.name.startswith((".", "@"))


def _is_text(entry: Path) -> bool:
    return entry.suffix.lower() == SUFFIX and entry.is_file() and not _hidden(entry)


def _classes(folder: Path) -> dict[str, list[str]]:
    """Return the texts of each class by the class's name."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        if not _is_text(file):
            continue
        if file.stem in found:
            raise ValueError(f"{folder} has two files of the class {file.stem!r}, one of them {file.name}; join them")
        found[file.stem] = _documents(file)
    return found


def _documents(file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8, or remove it"
        ) from None
    if "\0" in text:
        raise ValueError(f"{file} holds bytes of 0, so it is no text; remove it")
    if not any(letter.isalnum() for letter in text):
        raise ValueError(f"{file} holds no word; write a document into each line, or remove it")
    # Other separators than a new line may stand inside of a document.
    return [line.strip() for line in text.split("\n") if line.strip()]
