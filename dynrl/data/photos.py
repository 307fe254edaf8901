"""Patches of photographs are to be restored or searched; the photographs come with scikit-image and scikit-learn."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dynrl.data.base import Augmentation, Dataset, Split, drawn
from dynrl.data.images import fashion_images
from dynrl.tasks import Detection, Restoration

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
        f"no photograph {name} in scikit-image or scikit-learn; this data set takes it: pip install 'dynrl[photos]'"
    )


def _patches(photos: list[np.ndarray], side: int, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Cut squares out of photographs, at random and turned at random: [count, 1, side, side] in 0 to 1."""
    areas = np.array([photo.size for photo in photos], float)
    found = np.empty((count, 1, side, side), np.float32)
    turns = rng.integers(8, size=count)
    for i, which in enumerate(rng.choice(len(photos), count, p=areas / areas.sum())):
        photo = photos[which]
        top, left = (rng.integers(0, length - side + 1) for length in photo.shape)
        patch = np.rot90(photo[top : top + side, left : left + side], turns[i] % 4)
        found[i, 0] = patch.T if turns[i] > 3 else patch
    return torch.from_numpy(found)


def _noisy(photos: list[np.ndarray], levels: tuple[float, ...], count: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    clean = _patches(photos, SIDE, count, rng)
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
    parts = ((TRAIN, ()), (VALIDATION, ()), (TEST, LEVELS))
    draws = [partial(_noisy, [_photo(name) for name in names], levels) for names, levels in parts]
    return drawn("noisy-photos", 1, (6_000, 1_000, 2_000), draws)


WINDOW = 28
SHARE, OFTEN = 0.01, 0.25  # the share of windows with a garment where detectors are judged, and where they learn
GARMENTS, CONTRASTS = (20, 28), (0.5, 1.0)  # the ranges of a garment's size in pixels and of its brightness


def _windows(photos: list[np.ndarray], garments: torch.Tensor, share: float, count: int, seed: int) -> Split:
    """Cut windows out of photographs, [count, 1, WINDOW, WINDOW] in 255ths; exactly the share shows a garment."""
    rng = np.random.default_rng(seed)
    images, labels = _patches(photos, WINDOW, count, rng), torch.zeros(count, dtype=torch.int64)
    labels[torch.from_numpy(rng.permutation(count)[: round(share * count)])] = 1
    for row in labels.nonzero().flatten().tolist():
        size = int(rng.integers(GARMENTS[0], GARMENTS[1] + 1))
        top, left = rng.integers(0, WINDOW - size + 1, 2)
        worn = garments[rng.integers(len(garments))].unsqueeze(0)
        worn = F.interpolate(worn, size=size, mode="bilinear", antialias=True)[0]
        place, opaque = images[row, :, top : top + size, left : left + size], (4 * worn).clamp(0, 1)
        place.copy_((1 - opaque) * place + opaque * worn * float(rng.uniform(*CONTRASTS)))
    return Split((255 * images).round_().div_(255), labels, Detection(share))


def windows() -> Dataset:
    """28x28 windows of photographs, of which 1 % show a garment; 12,000 / 6,000 / 10,000 rows.

    A detector tells whether there is a garment. In training, a quarter of the windows show one, and they are drawn anew
    in each epoch; the classes weigh alike everywhere (`Detection`). Garments are Fashion-MNIST's, of random size, place
    and brightness. Each photograph is cut into four strips: two for training, one for validation, one for the test. The
    task is that of cascades of detectors (Viola & Jones 2001, CVPR), in which nearly all windows are background.

    Raises:
        ValueError: the photographs are not installed.
    """
    strips = [np.array_split(_photo(name), 4, axis=1) for name in (*TRAIN, *VALIDATION, *TEST)]
    places = [[half for first, second, *_ in strips for half in (first, second)]]
    places += [[strip[i] for strip in strips] for i in (2, 3)]
    worn = [images for images, _ in fashion_images()]
    parts = zip(places, worn, (OFTEN, SHARE, SHARE), strict=True)
    return drawn(
        "windows", 2, (12_000, 6_000, 10_000), [partial(_windows, *part) for part in parts], Augmentation(flip=True),
        names=("background", "garment"), dtype="uint8",
    )  # fmt: skip
