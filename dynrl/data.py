"""Data sets with fixed train, validation and test splits.

Thresholds, budgets and early stopping see validation only; test is for the report.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.files import write_aside
from dynrl.tasks import CLASSIFICATION, Task


@dataclass(frozen=True)
class Split:
    """`inputs` [n, ...] float32, ready for a network, and `targets` as the `task` has them (classes [n] int64, say)."""

    inputs: Tensor
    targets: Tensor
    task: Task = CLASSIFICATION

    def __len__(self) -> int:
        return len(self.inputs)

    def head(self, count: int) -> Split:
        """The first `count` rows (all splits are in random order)."""
        return Split(self.inputs[:count], self.targets[:count], self.task)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images that leave the class as it is; without any, inputs may be anything."""

    flip: bool = False  # left to right, half of the images
    shift: int = 0  # [pixels], each way
    rotate: float = 0.0  # [degrees], each way
    zoom: float = 0.0  # share of the size, each way

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A changed copy of `images` [n, channels, height, width]; what is not to be changed comes back as it is."""
        if self == Augmentation():
            return images
        count, size = len(images), images.shape[-1]

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator) * 2 - 1

        angle, scale = uniform() * math.radians(self.rotate), 1 + uniform() * self.zoom
        mirror = torch.where(uniform() < 0, -1.0, 1.0) if self.flip else torch.ones(count)
        # A whole number of pixels: a fraction would blur every image that is only shifted.
        dx, dy = ((uniform() * (self.shift + 0.5)).round().clamp(-self.shift, self.shift) * 2 / size for _ in "xy")
        cos, sin = scale * angle.cos(), scale * angle.sin()
        matrix = torch.stack([cos * mirror, -sin, dx, sin * mirror, cos, dy], 1).view(count, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits of one task.

    Attributes:
        classes: outputs that a network for it has; 1 for one number.
        augmentation: of training inputs.
        mean, deviation: the inputs are raw ones (images in 0 to 1) less `mean`, over `deviation`.
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    augmentation: Augmentation
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def task(self) -> Task:
        """What is asked of the inputs."""
        return self.train.task

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])

    def split(self, name: str) -> Split:
        """The split of that name."""
        if name not in ("train", "validation", "test"):
            raise ValueError(f"unknown split {name!r}; expected 'train', 'validation' or 'test'")
        return getattr(self, name)


def _standardised(name: str, augmentation: Augmentation, *parts: tuple[Tensor, Tensor]) -> Dataset:
    """The data set of (images, labels) of the training, validation and test parts, ten classes."""
    mean, deviation = float(parts[0][0].mean()), float(parts[0][0].std())
    train, validation, test = (Split((images - mean) / deviation, labels.long()) for images, labels in parts)
    return Dataset(name, 10, train, validation, test, augmentation, mean, deviation)


def _digits() -> Dataset:
    """1,797 handwritten digits that ship with scikit-learn, 8x8 enlarged to 24x24; 1,257 / 180 / 360."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install '.[train]'") from None
    raw = load_digits()
    images = F.interpolate(torch.from_numpy(raw.images).float().unsqueeze(1) / 16, size=24, mode="bilinear")
    labels = torch.from_numpy(raw.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    test, validation, train = order.split([360, 180, len(order) - 540])
    parts = ((images[part], labels[part]) for part in (train, validation, test))
    return _standardised("digits", Augmentation(shift=1, rotate=10, zoom=0.1), *parts)


# SHA-256 of the files' contents, unpacked: packers differ, contents do not.
_FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def cache_folder() -> Path:
    """Where downloads go: $XDG_CACHE_HOME/dynrl, else ~/.cache/dynrl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynrl"


def _unpack(packed: bytes, name: str, digest: str) -> bytes:
    try:
        content = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: not a whole gzip file ({error}); delete it and try again") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{name}: its contents are not the official ones (SHA-256 differs); delete it and try again")
    return content


def _download(url: str, target: Path, digest: str) -> bytes:
    """Fetch a gzip file with progress, keep it if its contents are right, and return them unpacked."""
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
        raise ValueError(
            f"could not download {url} ({error}); on Debian, `apt-get install dataset-fashion-mnist` needs no download"
        ) from None
    content = _unpack(b"".join(chunks), url, digest)
    with write_aside(target) as aside:
        aside.write_bytes(b"".join(chunks))
    return content


def parse_idx(content: bytes, name: str = "IDX data") -> Tensor:
    """Bytes in the IDX format of MNIST (unsigned bytes of any dimension) as a uint8 tensor.

    Raises:
        ValueError: another element type, or fewer or more bytes than the header promises.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{name}: expected IDX data of unsigned bytes (magic 00 00 08)")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{name}: the header promises shape {shape}, but {len(content) - header} bytes follow")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def _fashion_mnist() -> Dataset:
    """70,000 images of clothes, 28x28 (Xiao et al. 2017); 55,000 / 5,000 / 10,000.

    Read from Debian's package dataset-fashion-mnist, else from the cache, else downloaded, always checked.
    """
    parts = {}
    for name, digest in _FASHION_MNIST.items():
        places = [folder / f"{name}.gz" for folder in (_FASHION_MNIST_DEBIAN, cache_folder() / "fashion-mnist")]
        found = next((place for place in places if place.is_file()), None)
        if found is not None:
            content = _unpack(found.read_bytes(), str(found), digest)
        else:
            content = _download(f"{_FASHION_MNIST_URL}/{name}.gz", places[-1], digest)
        parts[name] = parse_idx(content, name)
    images = parts["train-images-idx3-ubyte"].unsqueeze(1).float() / 255
    labels = parts["train-labels-idx1-ubyte"]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    validation, train = order.split([5000, len(order) - 5000])
    test = parts["t10k-images-idx3-ubyte"].unsqueeze(1).float() / 255
    return _standardised(
        "fashion-mnist", Augmentation(flip=True, shift=1),
        (images[train], labels[train]), (images[validation], labels[validation]),
        (test, parts["t10k-labels-idx1-ubyte"]),
    )  # fmt: skip


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}


def check_dataset(name: str) -> str:
    """`name`, or a ValueError that lists the data sets there are."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; expected one of {sorted(DATASETS)}")
    return name


@lru_cache(maxsize=2)
def load_dataset(name: str) -> Dataset:
    """The data set of that name, loaded once a process. Its tensors are shared: do not write into them."""
    return DATASETS[check_dataset(name)]()
