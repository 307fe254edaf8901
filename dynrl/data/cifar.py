"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) are read from binary archives: Python's own format may run code."""

from __future__ import annotations

import io
import tarfile
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dynrl.data.base import Augmentation, Dataset, standardised
from dynrl.data.download import cache_folder, check_digest, fetch

URL = "https://www.cs.toronto.edu/~kriz"
SIDE = 32  # [pixels]
# The MD5 digests of the archives, as given on the authors' page.
_DIGESTS = {10: "c32a1d4ab5d03f1284b67883e8d87530", 100: "03b5dce01913d631647c71ecec9e9cb8"}


def cifar_10() -> Dataset:
    """The photos of CIFAR-10, 10 classes, 3x32x32; 45,000 / 5,000 / 10,000 rows."""
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    return _cifar(10, train, "test_batch.bin", labels=1)


def cifar_100() -> Dataset:
    """The photos of CIFAR-100, 100 classes, 3x32x32; 45,000 / 5,000 / 10,000 rows."""
    return _cifar(100, ["train.bin"], "test.bin", labels=2)


def _cifar(classes: int, train: list[str], test: str, labels: int) -> Dataset:
    name = f"cifar-{classes}"
    archive = cache_folder() / f"{name}-binary.tar.gz"
    check = partial(check_digest, algorithm="md5", digest=_DIGESTS[classes])
    if not archive.is_file():
        fetch(f"{URL}/{archive.name}", archive, check, f"put {archive.name} into {archive.parent}")
    content = archive.read_bytes()
    check(content, str(archive))
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        found = {member.name.rsplit("/", 1)[-1]: member for member in files.getmembers() if member.isfile()}
        parts = [
            parse_records(b"".join(files.extractfile(found[file]).read() for file in group), labels)  # type: ignore[union-attr]
            for group in (train, [test])
        ]
    (images, targets), tested = parts
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    validation, kept = order.split([5000, len(order) - 5000])
    made = [(images[kept], targets[kept]), (images[validation], targets[validation]), tested]
    return standardised(name, classes, Augmentation(flip=True, shift=4), made)


def parse_records(content: bytes, labels: int) -> tuple[Tensor, Tensor]:
    """Parse records of a photo, in red, green and blue planes, behind `labels` bytes, the last of which is the class.

    Returns:
        photos [n, 3, 32, 32] in 0 to 1, and classes [n].
    """
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, labels + 3 * SIDE * SIDE)
    return records[:, labels:].reshape(-1, 3, SIDE, SIDE).float() / 255, records[:, labels - 1]
