"""Data sets have fixed training, validation and test splits.

Thresholds and budgets are fitted on the validation split only; the test split is for reports.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from dynrl.data.base import Augmentation, Dataset, Split, standardised
from dynrl.data.cifar import cifar_10, cifar_100
from dynrl.data.documents import holds_texts, text_folder
from dynrl.data.folder import image_folder, split_name
from dynrl.data.hops import hops
from dynrl.data.images import cluttered_fashion_mnist, digits, fashion_mnist, varied_fashion_mnist
from dynrl.data.many import digit_tasks, many_tasks
from dynrl.data.own import is_own, own_dataset
from dynrl.data.photos import noisy_photos, windows
from dynrl.data.scenes import digit_pages, digit_scenes, digit_scenes_large, digit_views, fashion_scenes
from dynrl.data.sequences import adding, clips, prefix, sequential_digits, sequential_fashion_mnist
from dynrl.data.shapes import shapes
from dynrl.data.texts import find, find_small, needle
from dynrl.data.traces import trace, trace_long, trace_small
from dynrl.schema import check_known

__all__ = [
    "DATASETS", "Augmentation", "Dataset", "Split", "as_dataset", "check_dataset", "image_folder", "load_dataset",
    "own_dataset", "standardised", "text_folder",
]  # fmt: skip

# A plugin adds its own: DATASETS["mine"] = a function that makes a `Dataset` (`standardised` helps).
DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cluttered-fashion-mnist": cluttered_fashion_mnist,
    "varied-fashion-mnist": varied_fashion_mnist,
    "cifar-10": cifar_10,
    "cifar-100": cifar_100,
    "many-tasks": many_tasks,
    "digit-tasks": digit_tasks,
    "digit-scenes": digit_scenes,
    "digit-scenes-large": digit_scenes_large,
    "fashion-scenes": fashion_scenes,
    "digit-views": digit_views,
    "digit-pages": digit_pages,
    "adding": adding,
    "prefix": prefix,
    "clips": clips,
    "hops": hops,
    "shapes": shapes,
    "noisy-photos": noisy_photos,
    "windows": windows,
    "sequential-digits": sequential_digits,
    "sequential-fashion-mnist": sequential_fashion_mnist,
    "find": find,
    "find-small": find_small,
    "needle": needle,
    "trace": trace,
    "trace-long": trace_long,
    "trace-small": trace_small,
}
BUILT_IN = dict(DATASETS)  # without what plugins add


FOLDERS = "a folder of images or a text file (.txt) for each class"


def check_dataset(name: str) -> str:
    """Return the name of a data set, or the absolute path of a folder of images or texts; refuse other names."""
    if name in DATASETS:
        return name
    folder, size = split_name(name)
    if is_own(name):
        raise ValueError(f"{name!r} was given as tensors or as a Dataset; hand it over again, by data=...")
    if not folder.is_dir():
        if len(folder.parts) > 1:
            raise ValueError(f"{folder} is no folder; name one that has {FOLDERS}")
        known = [each for each in DATASETS if not is_own(each)]
        check_known("data set", name, known, f", or a folder that has {FOLDERS}")
    return f"{folder.resolve()}" + ("" if size is None else f"@{size}")


@lru_cache(maxsize=2)
def load_dataset(name: str) -> Dataset:
    """Return the data set `name`, or the images or texts below the folder `name`; each is loaded once a process.

    The tensors are shared, so do not write into them.
    """
    name = check_dataset(name)
    loaded = _made(name, DATASETS[name]) if name in DATASETS else _folder(name)
    if not isinstance(loaded, Dataset):
        raise ValueError(f"expected the loader of {name!r} to return a dynrl.data.Dataset, got {type(loaded).__name__}")
    loaded.check_disjoint()
    if name in DATASETS and DATASETS[name] is BUILT_IN.get(name):
        object.__setattr__(loaded, "_settled", True)
    return loaded


def _made(name: str, function: Any) -> Any:
    """Call the function of a row of `DATASETS`; whatever it raises, it is said whose it is."""
    if not callable(function):
        raise ValueError(f"DATASETS[{name!r}]: expected a function without arguments, got a {type(function).__name__}")
    try:
        return function()
    except Exception as error:
        if getattr(function, "__module__", "").partition(".")[0] == "dynrl":
            raise
        raise ValueError(f"the data set {name!r} cannot be made ({type(error).__name__}: {error})") from error


def _folder(name: str) -> Dataset:
    return text_folder(name) if holds_texts(split_name(name)[0]) else image_folder(name)


def as_dataset(data: Any) -> Dataset:
    """Return a data set for anything that can stand for one; from now on, this process knows it by its name.

    Args:
        data: a name, a folder of images or texts, a `Dataset`, or what `own_dataset` takes.

    Raises:
        ValueError: `data` is none of these, or another data set has the same name.
    """
    if isinstance(data, str | Path):
        return load_dataset(check_dataset(str(data)))
    dataset = data if isinstance(data, Dataset) else own_dataset(data)
    if dataset.name in DATASETS:
        known = load_dataset(dataset.name)
        if known.content == dataset.content:
            return known
        if dataset is data:
            raise ValueError(
                f"there is another data set named {dataset.name!r}, with other inputs, targets or names of classes; "
                "give yours another name"
            )
        load_dataset.cache_clear()  # the same pairs, whose classes have other names now
    dataset.check_disjoint()
    DATASETS[dataset.name] = lambda: dataset
    return dataset
