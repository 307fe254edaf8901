"""A provenance says what a network was trained on, so that nobody needs to remember or to type it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dynrl.inputs import Form, Named, placed

Numbers = float | tuple[float, ...]  # one for all numbers of an input, or one for each of its channels


def along(numbers: Numbers, inputs: torch.Tensor) -> Any:
    """Return one number as it is, and one for each channel as a tensor that fits `inputs` [..., channels, h, w]."""
    return torch.tensor(numbers).to(inputs).view(-1, 1, 1) if isinstance(numbers, tuple) else numbers


SLACK = 0.1  # how far pixels in 0 to 1 may stray, as an interpolation may make them


@dataclass(frozen=True)
class Provenance:
    """A provenance travels in a backbone's file, and is what every later command uses.

    Attributes:
        data: the name of the data set.
        fingerprint: the data set's digest (`Dataset.fingerprint`).
        classes: the names of the classes, in the order of the outputs; empty for a regression.
        input_shape: the shape of one input; name -> shape if inputs are several tensors.
        dtype: the type of raw inputs, by name if they are several tensors. If it is "uint8", they are pixels, which
            count in 255ths.
        mean, deviation: the network's inputs are raw inputs less `mean`, divided by `deviation`: one number each, or
            one for each channel of an image.
    """

    data: str
    fingerprint: str
    classes: tuple[str, ...]
    input_shape: Any
    dtype: str | dict[str, str]
    mean: Numbers
    deviation: Numbers

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # JSON has lists
        named, shape = isinstance(self.input_shape, Mapping), self.input_shape
        given = {name: tuple(part) for name, part in shape.items()} if named else tuple(shape)
        object.__setattr__(self, "input_shape", given)
        types = self.dtype if isinstance(self.dtype, Mapping) else {"": self.dtype}
        fits = not named or (isinstance(self.dtype, Mapping) and set(self.dtype) == set(given))
        if not fits or not all(isinstance(getattr(torch, str(kind), None), torch.dtype) for kind in types.values()):
            raise ValueError(f"expected the dtype of raw inputs by its name in torch, got {self.dtype!r}")
        for name in ("mean", "deviation"):  # JSON has lists
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        means, deviations = (x if isinstance(x, tuple) else (x,) for x in (self.mean, self.deviation))
        listed = isinstance(self.mean, tuple) or isinstance(self.deviation, tuple)
        if listed and (named or not len(means) == len(deviations) == given[0]):
            raise ValueError(f"expected a mean and a deviation for each of {given} channels, got {means}, {deviations}")
        if not all(map(math.isfinite, means)) or not all(0 < each < math.inf for each in deviations):
            raise ValueError(f"expected a finite mean and a deviation above 0, got {self.mean} and {self.deviation}")

    def __hash__(self) -> int:
        return hash((self.data, self.fingerprint, self.classes))  # shapes and types by name are dicts

    @classmethod
    def read(cls, values: Any, where: str) -> Provenance:
        """Return what `to_dict` gave; a ValueError names `where` the values stood if they are something else."""
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} is no provenance of a network: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)

    def preprocess(self, raw: Any) -> Any:
        """Return raw inputs [n, *input_shape] as the network takes them: float32, standardised; integers stay.

        Several tensors by name are not standardised, and integers among them keep their type.

        Args:
            raw: inputs of the type `dtype`. Pixels may also be floating-point numbers from 0 to 1.

        Raises:
            ValueError: the inputs have another shape or type, or pixels are far outside 0 to 1.
        """
        if isinstance(self.dtype, dict):
            if isinstance(raw, Named):
                raw = placed(raw, raw.device, torch.float32)
            kept = {name: None if getattr(torch, kind).is_floating_point else kind for name, kind in self.dtype.items()}
            Form(self.input_shape, kept).check(raw, torch.float32)
            return raw
        if tuple(raw.shape[1:]) != self.input_shape:
            shape = ", ".join(map(str, self.input_shape))
            raise ValueError(f"expected raw inputs of shape [batch, {shape}], got {tuple(raw.shape)}")
        pixels, wanted = self.dtype == "uint8", getattr(torch, self.dtype)
        fits = raw.dtype == wanted or (raw.is_floating_point() and (pixels or wanted.is_floating_point))
        if not fits:
            raise ValueError(f"expected raw inputs of {wanted}, as {self.data} has them, got {raw.dtype}")
        if not pixels and not wanted.is_floating_point and (self.mean, self.deviation) == (0, 1):  # token ids
            return raw
        scaled = raw.float() / 255 if raw.dtype == torch.uint8 else raw.float()
        if pixels and len(raw) and not -SLACK <= float(scaled.min()) <= float(scaled.max()) <= 1 + SLACK:
            raise ValueError(
                "expected pixels as torch.uint8, or as numbers from 0 to 1, got numbers from "
                f"{float(scaled.min()):.3g} to {float(scaled.max()):.3g}; hand over images as they were read"
            )
        return (scaled - along(self.mean, scaled)) / along(self.deviation, scaled)
