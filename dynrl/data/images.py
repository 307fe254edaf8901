"""These data sets have images: handwritten digits, clothes, and clothes among clutter."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.data.base import Augmentation, Dataset, Parts, standardised
from dynrl.data.download import cache_folder, check_digest, fetch


def digit_images() -> Parts:
    """Return the 1,797 handwritten digits, 8x8, that come with scikit-learn, split 1,257 / 180 / 360."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install '.[train]'") from None
    raw = load_digits()
    images, labels = torch.from_numpy(raw.images).float().unsqueeze(1) / 16, torch.from_numpy(raw.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    test, validation, train = order.split([360, 180, len(order) - 540])
    return [(images[part], labels[part]) for part in (train, validation, test)]


def digits() -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, enlarged to 24x24; 1,257 / 180 / 360 rows."""
    parts = [(F.interpolate(images, size=24, mode="bilinear"), labels) for images, labels in digit_images()]
    return standardised("digits", 10, Augmentation(shift=1, rotate=10, zoom=0.1), parts)


# The SHA-256 digests of the unpacked contents: packers differ, contents do not.
_FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def _unpack(packed: bytes, name: str, digest: str) -> bytes:
    try:
        content = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: not a whole gzip file ({error}); delete it and try again") from None
    check_digest(content, name, "sha256", digest)
    return content


def parse_idx(content: bytes, name: str = "IDX data") -> Tensor:
    """Parse bytes in MNIST's IDX format (unsigned bytes of any dimension) into a uint8 tensor.

    Raises:
        ValueError: the element type is another, or the number of bytes is not what the header promises.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{name}: expected IDX data of unsigned bytes (magic 00 00 08)")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{name}: the header promises shape {shape}, but {len(content) - header} bytes follow")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def fashion_images() -> Parts:
    """Return 70,000 images of clothes, 28x28 (Xiao et al. 2017), split 55,000 / 5,000 / 10,000.

    They are read from Debian's package dataset-fashion-mnist or from the cache, or are downloaded. They are always
    checked.
    """
    files = {}
    for name, digest in _FASHION_MNIST.items():
        places = [folder / f"{name}.gz" for folder in (_FASHION_MNIST_DEBIAN, cache_folder() / "fashion-mnist")]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            found = places[-1]
            fetch(
                f"{_FASHION_MNIST_URL}/{name}.gz", found, partial(_unpack, digest=digest),
                "on Debian, `apt-get install dataset-fashion-mnist` needs no download",
            )  # fmt: skip
        files[name] = parse_idx(_unpack(found.read_bytes(), str(found), digest), name)
    images = files["train-images-idx3-ubyte"].unsqueeze(1).float() / 255
    labels = files["train-labels-idx1-ubyte"]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    validation, train = order.split([5000, len(order) - 5000])
    test = files["t10k-images-idx3-ubyte"].unsqueeze(1).float() / 255, files["t10k-labels-idx1-ubyte"]
    return [(images[train], labels[train]), (images[validation], labels[validation]), test]


def fashion_mnist() -> Dataset:
    """The images of clothes of Fashion-MNIST, 10 classes, 28x28; 55,000 / 5,000 / 10,000 rows."""
    return standardised("fashion-mnist", 10, Augmentation(flip=True, shift=1), fashion_images())


CANVAS, PIECES, PIECE = 48, 8, 8  # the canvas in pixels, the pieces of clutter on each, the size of a piece in pixels


def clutter(images: Tensor, seed: int) -> Tensor:
    """Paste each image at a random place on an empty canvas, with pieces of other images at random places.

    This follows Mnih et al. 2014, section 4.1. Where things overlap, the brighter one shows.

    Args:
        images: [n, 1, height, width], the images.
        seed: the seed of places and pieces.

    Returns:
        the canvases [n, 1, CANVAS, CANVAS].
    """
    rng, every = np.random.default_rng(seed), torch.arange(len(images))
    canvas = images.new_zeros(len(images), CANVAS, CANVAS)

    def window(room: int, size: int) -> tuple[Tensor, Tensor]:
        """Return the rows [n, size, 1] and columns [n, 1, size] of a random square in `room` x `room`."""
        corner = torch.from_numpy(rng.integers(0, room - size + 1, (len(images), 2, 1)))
        rows, columns = (corner + torch.arange(size)).unbind(1)
        return rows.unsqueeze(2), columns.unsqueeze(1)

    def paste(pixels: Tensor) -> None:
        at = every.view(-1, 1, 1), *window(CANVAS, pixels.shape[-1])
        canvas[at] = canvas[at].maximum(pixels)

    paste(images[:, 0])
    for _ in range(PIECES):
        other = (every + torch.from_numpy(rng.integers(1, len(images), len(images)))) % len(images)
        paste(images[other.view(-1, 1, 1), 0, *window(images.shape[-1], PIECE)])
    return canvas.unsqueeze(1)


SIZES, MOST_PIECES = (12, 40), 12  # the range of the clothes' size in pixels, and the most pieces of clutter


def varied_fashion_mnist() -> Dataset:
    """Clothes of random size among random amounts of clutter, 48x48; 20,000 / 2,000 / 5,000 rows.

    Sizes are uniform from 12 to 40 pixels, and the pieces of clutter from 0 to 12. Both are kept as `difficulty`.
    """
    made, difficulty = [], []
    for seed, ((images, labels), count) in enumerate(zip(fashion_images(), (20_000, 2_000, 5_000), strict=True)):
        rng, count = np.random.default_rng(seed), min(count, len(images))
        sizes, pieces = rng.integers(SIZES[0], SIZES[1] + 1, count), rng.integers(0, MOST_PIECES + 1, count)
        canvas = torch.zeros(count, 1, CANVAS, CANVAS)
        for size in np.unique(sizes).tolist():
            for row in np.flatnonzero(sizes == size).tolist():
                top, left = rng.integers(0, CANVAS - size + 1, 2)
                scaled = F.interpolate(images[row : row + 1], size=size, mode="bilinear", antialias=True)
                canvas[row, :, top : top + size, left : left + size] = scaled[0]
        for row in range(count):
            for _ in range(int(pieces[row])):
                other = images[(row + int(rng.integers(1, count))) % count, 0]
                (y, x), (top, left) = rng.integers(0, 28 - PIECE + 1, 2), rng.integers(0, CANVAS - PIECE + 1, 2)
                place = canvas[row, 0, top : top + PIECE, left : left + PIECE]
                place.copy_(place.maximum(other[y : y + PIECE, x : x + PIECE]))
        made.append((canvas, labels[:count]))
        difficulty.append({"size": torch.from_numpy(sizes).float(), "clutter": torch.from_numpy(pieces).float()})
    data = standardised("varied-fashion-mnist", 10, Augmentation(flip=True, shift=1), made)
    train, validation, test = (
        replace(split, difficulty=hard)
        for split, hard in zip((data.train, data.validation, data.test), difficulty, strict=True)
    )
    return replace(data, train=train, validation=validation, test=test)


def cluttered_fashion_mnist() -> Dataset:
    """Clothes among clutter on canvases of 48x48; 20,000 / 2,000 / 5,000 rows.

    Each part comes from the same part of fashion-mnist. There are fewer images, because a canvas has three times as
    many pixels as an image: memory and the time of an epoch stay about those of fashion-mnist.
    """
    parts = zip(fashion_images(), (20_000, 2_000, 5_000), strict=True)
    made = [(clutter(images[:count], seed), labels[:count]) for seed, ((images, labels), count) in enumerate(parts)]
    return standardised("cluttered-fashion-mnist", 10, Augmentation(flip=True, shift=1), made)
