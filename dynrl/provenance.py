"""A provenance says what a network was trained on, so that nobody needs to remember or to type it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

SLACK = 0.1  # how far pixels in 0 to 1 may stray, as an interpolation may make them


@dataclass(frozen=True)
class Provenance:
    """A provenance travels in a backbone's file, and is what every later command uses.

    Attributes:
        data: the name of the data set.
        fingerprint: the data set's digest (`Dataset.fingerprint`).
        classes: the names of the classes, in the order of the outputs; empty for a regression.
        input_shape: the shape of one input.
        dtype: the type of raw inputs. If it is "uint8", they are pixels, which count in 255ths.
        mean, deviation: the network's inputs are raw inputs less `mean`, divided by `deviation`.
    """

    data: str
    fingerprint: str
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    dtype: str
    mean: float
    deviation: float

    def __post_init__(self) -> None:
        for name in ("classes", "input_shape"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"expected the dtype of raw inputs by its name in torch, got {self.dtype!r}")
        if not math.isfinite(self.mean) or not 0 < self.deviation < math.inf:
            raise ValueError(f"expected a finite mean and a deviation above 0, got {self.mean} and {self.deviation}")

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

    def preprocess(self, raw: Tensor) -> Tensor:
        """Return raw inputs [n, *input_shape] as the network takes them: float32, standardised.

        Args:
            raw: inputs of the type `dtype`. Pixels may also be floating-point numbers from 0 to 1.

        Raises:
            ValueError: the inputs have another shape or type, or pixels are far outside 0 to 1.
        """
        if tuple(raw.shape[1:]) != self.input_shape:
            shape = ", ".join(map(str, self.input_shape))
            raise ValueError(f"expected raw inputs of shape [batch, {shape}], got {tuple(raw.shape)}")
        pixels, wanted = self.dtype == "uint8", getattr(torch, self.dtype)
        fits = raw.dtype == wanted or (raw.is_floating_point() and (pixels or wanted.is_floating_point))
        if not fits:
            raise ValueError(f"expected raw inputs of {wanted}, as {self.data} has them, got {raw.dtype}")
        scaled = raw.float() / 255 if raw.dtype == torch.uint8 else raw.float()
        if pixels and len(raw) and not -SLACK <= float(scaled.min()) <= float(scaled.max()) <= 1 + SLACK:
            raise ValueError(
                "expected pixels as torch.uint8, or as numbers from 0 to 1, got numbers from "
                f"{float(scaled.min()):.3g} to {float(scaled.max()):.3g}; hand over images as they were read"
            )
        return (scaled - self.mean) / self.deviation
