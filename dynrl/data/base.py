"""A data set has three splits of inputs and targets, and says how training inputs are augmented."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.data.checks import check_alike, checked, shared
from dynrl.data.stored import PIECE, Stored, statistics
from dynrl.files import fingerprint
from dynrl.inputs import Form, parts, placed
from dynrl.provenance import Numbers, Provenance, Standard, along, strays
from dynrl.schema import check_one_of
from dynrl.tasks import CLASSIFICATION, Classification, Task
from dynrl.vocabulary import Vocabulary, words_of

KEPT = 0.1  # the share of the training split that is kept from backbones, for policies to learn on
UNSEEN = 999_999  # the seed of inputs drawn for policies, which no epoch has (`Dataset.in_epoch`)
# Rows whose targets change less than this share as much as in random order are ordered by them. Where they change so
# rarely at random, nothing is told from it: a few rows may well come in order by chance.
ORDERED, FEW = 0.25, 32


@dataclass(frozen=True)
class Split:
    """A split holds inputs and the targets that a network should give for them.

    Attributes:
        inputs: [n, ...] float32, ready for a network; or several tensors by name, whose integers keep their type; or
            inputs that lie in a file (`Stored`). All are indexed by rows.
        targets: the targets in the form of the `task`, for example classes [n] int64.
        task: what outputs and targets mean.
        difficulty: numbers [n] by name that say what makes an input hard, if that is known. Only reports see them.
        texts: the texts that the inputs are the token ids of, if these are known.
    """

    inputs: Any
    targets: Tensor
    task: Task = CLASSIFICATION
    difficulty: dict[str, Tensor] = field(default_factory=dict)
    texts: tuple[str, ...] = field(default=(), repr=False)
    _checked: int = field(default=0, init=False, repr=False, compare=False)  # for how many classes it was (`checked`)

    def __len__(self) -> int:
        return len(self.inputs)

    def head(self, count: int) -> Split:
        """Return the first `count` rows, or all but the last ones if it is negative; splits are in random order."""
        return self._rows(slice(None, count))

    def tail(self, count: int) -> Split:
        """Return the last `count` rows."""
        return self._rows(slice(len(self) - count, None))

    @property
    def shuffled(self) -> Split:
        """The same rows in random order, always the same one, if they are ordered by their targets; else the split."""
        if len(self.targets) <= FEW:
            return self
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(self)))
        given, mixed = _changes(self.targets), _changes(self.targets[order.to(self.targets.device)])
        if int((mixed > 0).sum()) < FEW or float(given.sum()) >= ORDERED * float(mixed.sum()):
            return self
        return self._rows(order)

    def _rows(self, rows: slice | Tensor) -> Split:
        difficulty = {name: numbers[rows] for name, numbers in self.difficulty.items()}
        some = rows.numpy() if isinstance(rows, Tensor) else rows
        inputs = self.inputs.part(some) if isinstance(self.inputs, Stored) else self.inputs[rows]
        texts = np.array(self.texts, dtype=object)[some].tolist() if self.texts else ()
        return Split(inputs, self.targets[rows], self.task, difficulty, tuple(texts))

    def parted(self, rows: Tensor) -> tuple[Split, Split]:
        """Return the other rows, and those at `rows` [n]; both stay in their order."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[rows] = True
        return self._rows((~chosen).nonzero().squeeze(1)), self._rows(chosen.nonzero().squeeze(1))

    def words(self, row: int) -> list[str]:
        """Return the words that a network can read of the text at `row`, or their token ids if no word is known.

        Inputs that are no texts have none.
        """
        if self.texts:
            return words_of(self.texts[row])[: self.inputs.shape[1]]
        texts = isinstance(self.inputs, Tensor) and self.inputs.dtype is torch.int64 and self.inputs.dim() == 2
        return [str(token) for token in self.inputs[row].tolist() if token] if texts else []

    def beginning_with(self, inputs: Tensor) -> Split:
        """Return the split with `inputs` [k, ...] in place of its first ones; targets stay."""
        if not len(inputs) <= len(self) or inputs.shape[1:] != self.inputs.shape[1:]:
            raise ValueError(
                f"expected at most {len(self)} inputs of {tuple(self.inputs.shape[1:])}, got {tuple(inputs.shape)}"
            )
        rest = self.inputs[len(inputs) :]
        return replace(self, inputs=torch.cat([inputs.to(rest), rest]))

    def to(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Return the split on `device`, with inputs of the type `dtype`; targets keep their type."""
        return replace(self, inputs=placed(self.inputs, device, dtype), targets=self.targets.to(device))


def _changes(targets: Tensor) -> Tensor:
    """Return how much targets change from each row to the next, [n - 1]: by how much, or in which share of classes."""
    before, after = targets[:-1], targets[1:]
    change = (after - before).abs() if targets.is_floating_point() else after != before
    return change.double().view(len(change), -1).mean(1)


@dataclass(frozen=True)
class Augmentation:
    """An augmentation changes training images at random, but not their class; one without changes takes any inputs."""

    flip: bool = False  # whether half of the images are mirrored left to right
    shift: int = 0  # the most pixels that an image moves, each way
    rotate: float = 0.0  # the most degrees that an image turns, each way
    zoom: float = 0.0  # the largest change of size, as a share, each way

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return a changed copy of `images` [n, channels, height, width]; without changes, return them as they are."""
        return images if self == Augmentation() else _moved(images, self._places(images, generator))

    def _places(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw where each pixel of changed copies of `images` is taken from: [n, height, width, 2]."""
        count, (height, width) = len(images), images.shape[-2:]

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator) * 2 - 1

        angle, scale = uniform() * math.radians(self.rotate), 1 + uniform() * self.zoom
        mirror = torch.where(uniform() < 0, -1.0, 1.0) if self.flip else torch.ones(count)
        # Images move by whole pixels: a fraction would blur every image that is only shifted.
        dx, dy = (
            (uniform() * (self.shift + 0.5)).round().clamp(-self.shift, self.shift) * 2 / length
            for length in (width, height)
        )
        cos, sin = scale * angle.cos(), scale * angle.sin()
        # A place is told in halves of the width and of the height, and angles are those of pixels, which are square.
        along_x, along_y = -sin * (height / width), sin * mirror * (width / height)
        matrix = torch.stack([cos * mirror, along_x, dx, along_y, cos, dy], 1).view(count, 2, 3)
        return F.affine_grid(matrix, list(images.shape), align_corners=False)

    def rows(self, split: Split, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return changed copies of the inputs at `rows` [n] of a split, and their targets.

        Targets that are pictures are changed like their inputs.
        """
        inputs, targets = split.inputs[rows], split.targets[rows]
        if not split.task.pictures or self == Augmentation():
            return self(inputs, generator), targets
        places = self._places(inputs, generator)
        if targets.is_floating_point():
            return _moved(inputs, places), _moved(targets, places)
        # There is nothing between two classes, so the nearest pixel's is taken.
        return _moved(inputs, places), _moved(targets.unsqueeze(1).float(), places, "nearest").squeeze(1).long()


def _moved(images: Tensor, places: Tensor, between: str = "bilinear") -> Tensor:
    """Take each pixel of images [n, channels, height, width] from its place [n, height, width, 2]."""
    return F.grid_sample(images, places, between, padding_mode="border", align_corners=False)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set has three disjoint splits of one task.

    Attributes:
        name: the name in `DATASETS`.
        classes: the number of outputs that a network for it has; 1 for one number.
        train, validation, test: the splits. Rows that are ordered by their targets are brought into random order
            (`Split.shuffled`), since parts of a split must be like the whole.
        augmentation: the changes of training inputs.
        mean, deviation: inputs are raw inputs (images in 0 to 1) less `mean`, divided by `deviation`: one number each,
            or one for each channel.
        anew: a function that draws another training split of the same kind and size by a seed; None if there is only
            one.
        names: the names of the classes, in the order of the outputs; by default, their numbers.
        dtype: the type of raw inputs, by its name in torch; a dict of these if inputs are several tensors. If it is
            "uint8", they are pixels, which count in 255ths.
        vocabulary: what made the token ids, if the inputs are texts whose words are known.
        apart: [n] int64, the rows of the training split that are for policies (`unseen`); None: its last tenth.
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    augmentation: Augmentation
    mean: Numbers = 0.0
    deviation: Numbers = 1.0
    anew: Callable[[int], Split] | None = None
    names: tuple[str, ...] = ()
    dtype: str | dict[str, str] = "float32"
    vocabulary: Vocabulary | None = None
    apart: Tensor | None = None
    _original: Dataset | None = field(default=None, init=False, repr=False)  # what a network sees here (`seen_by`)
    _shared: str = field(default="", init=False, repr=False)  # which splits have rows in common (`check_disjoint`)
    _settled: bool = field(default=False, init=False, repr=False)  # whether rows always keep their parts (`check_kept`)

    def __post_init__(self) -> None:
        wanted = self.classes if isinstance(self.task, Classification) else 0
        if self.names and (len(self.names) != wanted or len(set(self.names)) < wanted):
            raise ValueError(f"{self.name}: expected {wanted} different names of classes, got {list(self.names)}")
        if not self.names:
            object.__setattr__(self, "names", tuple(map(str, range(wanted))))
        splits = {part: getattr(self, part) for part in ("train", "validation", "test")}
        object.__setattr__(self, "_shared", shared(splits))
        for part, split in splits.items():
            if split._checked != self.classes:  # inputs may be large: each is looked at once
                split = checked(f"{self.name}, {part}", split, self.classes).shuffled
                object.__setattr__(split, "_checked", self.classes)
            splits[part] = split
            object.__setattr__(self, part, split)
        check_alike(self.name, splits)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the raw inputs of all splits; it does not depend on where they lie or how they are standardised.

        Inputs count in 255ths: standardisation and its rounding leave no trace there in pixels. Texts count as they are
        written.
        """
        splits = self.train, self.validation, self.test
        if self.vocabulary is not None:
            return hashlib.sha256(json.dumps([split.texts for split in splits]).encode()).hexdigest()
        digest = hashlib.sha256(f"{self.input_shape}".encode())
        for split in splits:
            for x in (x for rows in split.inputs.split(PIECE) for x in parts(rows).values()):
                raw = self.raw(x.double()).mul_(255).round_()
                digest.update(raw.to(torch.int32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def content(self) -> str:
        """A digest of all inputs, targets and names of classes, whatever network sees them.

        Pixels and texts count as in `fingerprint`, which is exact there. Other numbers count as they are.
        """
        if self._original is not None:
            return self._original.content
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        told: list[Any] = [self.fingerprint]
        if self.dtype != "uint8" and self.vocabulary is None:
            told = [self.mean, self.deviation, *(pieces(split.inputs) for split in splits.values())]
        return fingerprint({name: split.targets for name, split in splits.items()}, [told, self.names])

    def raw(self, inputs: Tensor) -> Tensor:
        """Return standardised `inputs` as they were before: images in 0 to 1."""
        return inputs * along(self.deviation, inputs) + along(self.mean, inputs)

    @property
    def provenance(self) -> Provenance:
        """What a network that is trained on this data set keeps of it."""
        return Provenance(
            self.name, self.fingerprint, self.names, self.input_shape, self.dtype, self.mean, self.deviation,
            self.vocabulary, self.content, self.apart is not None,
        )  # fmt: skip

    def seen_by(self, known: Provenance | Standard | None) -> Dataset:
        """Return the same data as a network sees them of which `known` is known; None stands for an untrained one.

        Inputs are standardised by the network's own mean and deviation, since data that came later would change them,
        texts are read by its own vocabulary, and labels are the network's outputs of the same names. Inputs for
        policies are those that were kept from it. Of weights that were trained elsewhere, only the standard is known.

        Raises:
            ValueError: the inputs have another shape or raw type, there are classes that the network does not know,
                inputs are no pixels and the network takes pixels, or these are other data under the name of those that
                it was trained on (`check_kept`).
        """
        if isinstance(known, Standard):
            known = self._provenance_by(known)
        if known is None:
            return self
        self.check_kept(known)
        seen = _seen_by(self, known)
        if seen is not self:
            object.__setattr__(seen, "_original", self)
        return seen

    def _provenance_by(self, standard: Standard) -> Provenance:
        first = self.train.inputs[:PIECE]
        if standard.pixels and (found := strays(self.raw(first)) if isinstance(first, Tensor) else "by name"):
            raise ValueError(
                f"expected pixels from 0 to 1 (or uint8) in {self.name}, as the network standardises them itself, got "
                f"numbers {found}; leave that out of the data set's transforms. If they are what the network takes, "
                "say standardised_by((0, 1))"
            )
        return replace(self.provenance, mean=standard.mean, deviation=standard.deviation)

    def check_same(self, known: Provenance) -> None:
        """Refuse, with a ValueError, data of another name than `known` that are not the same data elsewhere.

        Of data of that name, see `check_kept`.
        """
        self.check_kept(known)
        if self.name != known.data and not self.matches(known):
            raise ValueError(
                f"expected {known.data}, or the same data elsewhere, got {self.name}, whose inputs or targets are "
                "others"
            )

    def check_disjoint(self) -> None:
        """Refuse, with a ValueError, splits that were made of the same rows: what tests would be known by heart."""
        if self._shared:
            raise ValueError(
                f"expected disjoint splits in {self.name}, but {self._shared}; part the rows anew "
                "(dynrl.data.own_dataset does)"
            )

    def check_kept(self, known: Provenance) -> None:
        """Refuse, with a ValueError, other data under the name of `known`, whose parts may be mixed up.

        A function that splits without a seed gives other parts in each process, and rows that a network was trained on
        would test it, unnoticed. In folders and in dynrl's own data sets, rows keep their parts, so these may change.
        """
        settled = (self._original or self)._settled or Path(self.name).is_absolute()
        if settled or self.name != known.data or known.content in (None, self.content):
            return
        raise ValueError(
            f"expected {self.name} as it was trained on, got other inputs or targets under this name, so rows to test "
            "on may be rows that were trained on; draw and split with a fixed seed (torch.Generator().manual_seed(0)), "
            "bring back what made the data then, or train anew"
        )

    def matches(self, known: Provenance) -> bool:
        """Tell whether these are the data that `known` is of; of old, a provenance tells of inputs only."""
        return self.fingerprint == known.fingerprint if known.content is None else self.content == known.content

    @property
    def task(self) -> Task:
        """The task of all splits."""
        return self.train.task

    @property
    def form(self) -> Form:
        """What one input is."""
        return Form.of(self.train.inputs[:1])

    @property
    def input_shape(self) -> Any:
        """The shape of one input; name -> shape if inputs are several tensors."""
        return self.form.shape

    def in_epoch(self, seed: int, epoch: int) -> Dataset:
        """The same with the training inputs of that epoch: drawn anew where they can be, else its own."""
        return self if self.anew is None else replace(self, train=self.anew(1_000_003 * seed + epoch))

    @property
    def for_backbone(self) -> Dataset:
        """The same without the training inputs that are for policies (`unseen`): what backbones are trained on."""
        return self if self.anew is not None else replace(self, train=self._parted[0], apart=None)

    @cached_property
    def unseen(self) -> Split:
        """Inputs for policies to learn on, which no backbone is trained on.

        A policy that learned on what its backbone knows by heart would find that most of the compute is not needed.
        They are drawn anew where they can be; else, they are those `apart`, or the last tenth of the training split.
        """
        return self._parted[1] if self.anew is None else self.anew(UNSEEN)

    @property
    def _parted(self) -> tuple[Split, Split]:
        """The training split for backbones and that for policies."""
        if self.apart is not None:
            return self.train.parted(self.apart)
        kept = math.ceil(KEPT * len(self.train))
        return self.train.head(-kept), self.train.tail(kept)

    def split(self, name: str) -> Split:
        """Return the split "train", "unseen" (see there), "validation" or "test"."""
        check_one_of("split", name, ("train", "unseen", "validation", "test"))
        return getattr(self, name)


# The inputs [n, ...] in 0 to 1 (or uint8) and the labels [n] of the training, validation and test parts.
Parts = list[tuple[Any, Tensor]]


def standardised(
    name: str, classes: int, augmentation: Augmentation, parts: Parts, names: tuple[str, ...] = ()
) -> Dataset:
    """Make a data set of `parts`, standardised by the training inputs' mean and deviation, for each channel.

    Raises:
        ValueError: inputs are no pixels: numbers in 0 to 1, or uint8. Those of 0 to 255 as floating-point numbers would
            be learned well, and then nobody could hand over images as they are read.
    """
    parts = [(_pixels(name, inputs), labels) for inputs, labels in parts]
    mean, deviation = statistics(parts[0][0])
    train, validation, test = (Split(scaled(inputs, mean, deviation), labels.long()) for inputs, labels in parts)
    return Dataset(name, classes, train, validation, test, augmentation, mean, deviation, names=names, dtype="uint8")


def _pixels(name: str, inputs: Any) -> Any:
    """Return pixels in 0 to 1 as float32."""
    if isinstance(inputs, Tensor):
        inputs = inputs.float() / 255 if inputs.dtype is torch.uint8 else inputs.float()
    elif not isinstance(inputs, Stored):
        raise ValueError(f"expected the inputs of {name} as tensors, got {type(inputs).__name__}")
    # What is stored as uint8 is read as 255ths; else, its first rows tell.
    if found := strays(inputs if isinstance(inputs, Tensor) else inputs[:PIECE]):
        raise ValueError(
            f"expected images in 0 to 1 (or uint8) in {name}, got numbers {found}; divide pixels of 0 to 255 by 255. "
            "Numbers that are no pixels make a `Dataset` with a `dtype`, or dynrl.data.own_dataset takes them"
        )
    return inputs


Draw = Callable[[int, int], Split]  # from the number of rows and a seed


def drawn(
    name: str,
    classes: int,
    sizes: tuple[int, int, int],
    draws: Sequence[Draw],
    augmentation: Augmentation = Augmentation(),
    *,
    names: tuple[str, ...] = (),
    dtype: str = "float32",
    by_channel: bool = True,
) -> Dataset:
    """Make a data set whose splits are drawn by seeds of their own; other seeds draw other training inputs.

    Args:
        name, classes, augmentation, names, dtype: as in `Dataset`. Pixels ("uint8"), drawn in 0 to 1, are standardised
            by the training inputs' mean and deviation.
        sizes: the rows of each split.
        draws: what draws each split.
        by_channel: whether each channel of pixels has a mean and a deviation of its own.
    """
    made = [draw(count, seed) for seed, (draw, count) in enumerate(zip(draws, sizes, strict=True))]
    mean: Numbers = 0.0
    deviation: Numbers = 1.0
    if dtype == "uint8":
        mean, deviation = statistics(made[0].inputs if by_channel else made[0].inputs.flatten(1))

    def seen(split: Split) -> Split:
        return replace(split, inputs=scaled(split.inputs, mean, deviation)) if dtype == "uint8" else split

    train, validation, test = map(seen, made)
    return Dataset(
        name, classes, train, validation, test, augmentation, mean, deviation,
        anew=lambda seed: seen(draws[0](sizes[0], 1000 + seed)), names=names, dtype=dtype,
    )  # fmt: skip


def pieces(inputs: Any) -> list[str]:
    """Return a digest of each piece of inputs, of the numbers as they are."""
    return [fingerprint(parts(rows)) for rows in inputs.split(PIECE)]


@lru_cache(maxsize=2)  # environments of one process share the tensors
def _seen_by(data: Dataset, known: Provenance) -> Dataset:
    if data.apart is not None and not known.apart:
        data = replace(data, apart=None)  # the last tenth was kept from the network
    if known.vocabulary != data.vocabulary:
        data = _read_by(data, known)
    for what, mine, wanted in (
        ("inputs of shape", data.input_shape, known.input_shape), ("raw inputs of type", data.dtype, known.dtype)
    ):  # fmt: skip
        if mine != wanted:
            raise ValueError(f"expected {what} {wanted}, as the network was trained on, got {mine} of {data.name}")
    if unknown := [name for name in data.names if name not in known.classes]:
        raise ValueError(
            f"{data.name} has the classes {list(data.names)}, the network was trained on {list(known.classes)} and "
            f"does not know {', '.join(unknown)}; give them the names that they had, or train another network"
        )
    if (data.mean, data.deviation, data.names) == (known.mean, known.deviation, known.classes):
        return data
    outputs = torch.tensor([known.classes.index(name) for name in data.names])

    def seen(split: Split) -> Split:
        inputs = split.inputs
        if isinstance(inputs, Stored):
            inputs = inputs.standardised(known.mean, known.deviation)
        elif (data.mean, data.deviation) != (known.mean, known.deviation):
            shift = along(data.mean, inputs) - along(known.mean, inputs)
            inputs = (inputs * along(data.deviation, inputs) + shift).div_(along(known.deviation, inputs))
        return replace(split, inputs=inputs, targets=outputs[split.targets] if data.names else split.targets)

    train, validation, test = map(seen, (data.train, data.validation, data.test))
    draw, count = data.anew, len(known.classes) or data.classes
    return replace(
        data, classes=count, train=train, validation=validation, test=test, mean=known.mean, deviation=known.deviation,
        anew=None if draw is None else lambda seed: seen(draw(seed)), names=known.classes,
    )  # fmt: skip


def _read_by(data: Dataset, known: Provenance) -> Dataset:
    """Return texts as the token ids that a network knows them by."""
    if known.vocabulary is None or data.vocabulary is None:
        had, has = ("texts" if each.vocabulary else "inputs that are no texts" for each in (known, data))
        raise ValueError(f"expected {had}, as the network was trained on, got {has} in {data.name}")
    read = known.vocabulary.encode
    train, validation, test = (replace(s, inputs=read(s.texts)) for s in (data.train, data.validation, data.test))
    return replace(data, train=train, validation=validation, test=test, vocabulary=known.vocabulary)


def scaled(inputs: Any, mean: Numbers, deviation: Numbers) -> Any:
    """Return `inputs` less `mean`, divided by `deviation`."""
    if isinstance(inputs, Stored):
        return inputs.standardised(mean, deviation)
    return (inputs - along(mean, inputs)).div_(along(deviation, inputs))
