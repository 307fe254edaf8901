"""Noisy photographs are to be restored: patches of the photographs that come with scikit-image and scikit-learn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from dynrl.data.base import Augmentation, Dataset, Split
from dynrl.tasks import Restoration

SIDE = 24
TRAIN = (
    "astronaut.png", "brick.png", "china.jpg", "clock_motion.png", "coffee.png", "coins.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg",
)  # fmt: skip
VALIDATION = ("page.png", "rocket.jpg", "text.png")
TEST = ("camera.png", "chelsea.png", "flower.jpg", "grass.png", "moon.png")
LOUDEST = 600  # photographs of more pixels each way are halved: their own noise would be asked for
FOLDERS = (("skimage", "data"), ("sklearn", "datasets/images"))
NOISE = (15.0, 55.0)  # the range of training, in 255ths
LEVELS = (15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 75.0)  # of the test: the last two are louder than any of training


def _photo(name: str) -> np.ndarray:
    """Return a photograph [height, width] in 0 to 1, in grey."""
    from PIL import Image

    for package, folder in FOLDERS:
        spec = find_spec(package)
        if (
            spec is not None
            and spec.origin is not None
            and (path := Path(spec.origin).parent / folder / name).is_file()
        ):
            image = Image.open(path).convert("L")
            if max(image.size) > LOUDEST:
                image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
            return np.asarray(image, np.float32) / 255
    raise ValueError(
        f"no photograph {name} in scikit-image or scikit-learn; noisy-photos takes it: pip install 'dynrl[photos]'"
    )


def _patches(photos: list[np.ndarray], count: int, rng: np.random.Generator) -> torch.Tensor:
    """Cut squares out of photographs, at random and turned at random: [count, 1, SIDE, SIDE] in 0 to 1."""
    areas = np.array([photo.size for photo in photos], float)
    found = np.empty((count, 1, SIDE, SIDE), np.float32)
    turns = rng.integers(8, size=count)
    for i, which in enumerate(rng.choice(len(photos), count, p=areas / areas.sum())):
        photo = photos[which]
        top, left = (rng.integers(0, length - SIDE + 1) for length in photo.shape)
        patch = np.rot90(photo[top : top + SIDE, left : left + SIDE], turns[i] % 4)
        found[i, 0] = patch.T if turns[i] > 3 else patch
    return torch.from_numpy(found)


def _split(photos: list[np.ndarray], count: int, seed: int, levels: tuple[float, ...] = ()) -> Split:
    rng = np.random.default_rng(seed)
    clean = _patches(photos, count, rng)
    level = rng.choice(levels, count) if levels else rng.uniform(*NOISE, count)
    noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
    told = torch.from_numpy(level).float()
    return Split(clean + noise * (told / 255).view(-1, 1, 1, 1), clean, Restoration(), {"noise": told})


def noisy_photos() -> Dataset:
    """Grey patches of photographs, 24x24, in Gaussian noise, to be restored; 6,000 / 1,000 / 2,000 rows.

    The photographs are those that come with scikit-image and scikit-learn; no photograph is in two splits. The noise of
    training and validation has a deviation between 15 and 55 of 255 grey levels, which differs from patch to patch.
    That of the test is one of 15, 25, ... 75: the last two are louder than any of training. The task is that of DURR
    (Zhang et al. 2019, ICLR).

    Raises:
        ValueError: the photographs are not installed.
    """
    train, validation, test = ([_photo(name) for name in names] for names in (TRAIN, VALIDATION, TEST))
    return Dataset(
        "noisy-photos", 1, _split(train, 6_000, 0), _split(validation, 1_000, 1), _split(test, 2_000, 2, LEVELS),
        Augmentation(), anew=lambda seed: _split(train, 6_000, 1000 + seed),
    )  # fmt: skip
