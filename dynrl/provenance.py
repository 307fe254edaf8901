"""A provenance says what a network was trained on, so that nobody needs to remember or to type it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dynrl.inputs import Form, Named, placed
from dynrl.vocabulary import Vocabulary

Numbers = float | tuple[float, ...]  # one for all numbers of an input, or one for each of its channels


def along(numbers: Numbers, inputs: torch.Tensor) -> Any:
    """Return one number as it is, and one for each channel as a tensor that fits `inputs` [..., channels, h, w]."""
    return torch.tensor(numbers).to(inputs).view(-1, 1, 1) if isinstance(numbers, tuple) else numbers


FAR = 2**14  # the deviations from 0 up to which float32 tells differences of a thousandth of a deviation


def far(mean: Numbers, deviation: Numbers) -> bool:
    """Tell whether numbers are so far from 0 that float32 would blur how they differ, as it does with Unix times."""
    return bool((torch.as_tensor(mean).abs() > FAR * torch.as_tensor(deviation)).any())


def standardised(raw: torch.Tensor, mean: Numbers, deviation: Numbers) -> torch.Tensor:
    """Return raw numbers less `mean`, divided by `deviation`, as float32; what float32 would blur becomes that last."""
    if not far(mean, deviation):
        rounded = raw.float()
        return (rounded - along(mean, rounded)) / along(deviation, rounded)
    exact = raw.double()
    shift, scale = (exact.new_tensor(x).view(-1, 1, 1) if isinstance(x, tuple) else x for x in (mean, deviation))
    return ((exact - shift) / scale).float()


SLACK = 0.1  # how far pixels in 0 to 1 may stray, as an interpolation may make them


def strays(pixels: torch.Tensor) -> str:
    """Return from where to where numbers go that cannot be pixels in 0 to 1; "" for those that can."""
    low, high = (float(each) for each in pixels.aminmax()) if len(pixels) else (0.0, 1.0)
    return "" if -SLACK <= low <= high <= 1 + SLACK else f"from {low:.3g} to {high:.3g}"


@dataclass(frozen=True)
class Standard:
    """A standard says what a network's inputs are standardised by.

    Attributes:
        mean, deviation: inputs are raw inputs less `mean`, divided by `deviation`: one number each, or one for each
            channel of an image.
        pixels: whether raw inputs are pixels, which count from 0 to 1.
    """

    mean: Numbers
    deviation: Numbers
    pixels: bool = False

    def __post_init__(self) -> None:
        try:
            mean, deviation = _numbers(self.mean), _numbers(self.deviation)
        except (TypeError, ValueError):
            mean, deviation = (), ()
        each = mean if isinstance(mean, tuple) else (mean,), deviation if isinstance(deviation, tuple) else (deviation,)
        if not all(each) or not all(map(math.isfinite, each[0])) or not all(0 < one < math.inf for one in each[1]):
            raise ValueError(f"expected a finite mean and a deviation above 0, got {self.mean} and {self.deviation}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "deviation", deviation)

    @classmethod
    def of(cls, given: Any) -> Standard:
        """Return the standard that weights were trained by.

        Args:
            given: a mean and a deviation as a pair; or an object or mapping that has them for pixels in 0 to 1, as
                `mean` and `std` (torchvision's `weights.transforms()`, timm's `resolve_data_config`) or as `image_mean`
                and `image_std` (a Hugging Face image processor, whose own scale of pixels is taken into account).

        Raises:
            ValueError: it is something else, or it does more to pixels than this.
        """
        if isinstance(given, tuple | list) and len(given) == 2:
            return cls(*given)

        def said(name: str, otherwise: Any = None) -> Any:
            found = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
            return otherwise if found is None else found

        mean, deviation = (said(name, said(f"image_{name}")) for name in ("mean", "std"))
        if mean is None or deviation is None:
            raise ValueError(
                "expected a mean and a deviation as a pair, or what has them as `mean` and `std` or as `image_mean` "
                "and `image_std` (torchvision's weights.transforms(), timm's resolve_data_config(...), a Hugging Face "
                f"image processor), got {type(given).__name__}"
            )
        if said("rescale_offset") or said("include_top"):
            raise ValueError(f"{type(given).__name__} standardises twice; give the mean and the deviation of both")
        if not said("do_normalize", True):
            mean, deviation = 0.0, 1.0
        # Pixels count from 0 to 1 here; a processor may take other numbers for them.
        scale = 255 * (said("rescale_factor", 1 / 255) if said("do_rescale", True) else 1)
        mean, deviation = (
            tuple(one / scale for one in each) if isinstance(each, tuple) else each / scale
            for each in map(_numbers, (mean, deviation))
        )
        return cls(mean, deviation, pixels=True)

    def check(self, shape: Any) -> None:
        """Refuse, with a ValueError, inputs of another shape than [channels, height, width] of as many channels."""
        counts = [len(each) if isinstance(each, tuple) else None for each in (self.mean, self.deviation)]
        channels = shape[0] if isinstance(shape, tuple) and len(shape) == 3 else None
        if counts not in ([None, None], [channels, channels]):
            raise ValueError(
                f"expected a mean and a deviation for each of the channels of inputs {shape}, or one for all of them, "
                f"got {self.mean} and {self.deviation}"
            )


def _numbers(given: Any) -> Numbers:
    return float(given) if isinstance(given, int | float) else tuple(map(float, given))


@dataclass(frozen=True)
class Provenance:
    """A provenance travels in a backbone's file, and is what every later command uses.

    Attributes:
        data: the name of the data set.
        fingerprint: the digest of the data set's inputs (`Dataset.fingerprint`).
        classes: the names of the classes, in the order of the outputs; empty for a regression.
        input_shape: the shape of one input; name -> shape if inputs are several tensors.
        dtype: the type of raw inputs, by name if they are several tensors. If it is "uint8", they are pixels, which
            count in 255ths.
        mean, deviation: the network's inputs are raw inputs less `mean`, divided by `deviation`: one number each, or
            one for each channel of an image.
        vocabulary: what makes token ids of raw inputs, if they are texts.
        content: the digest of the data set's inputs, targets and names of classes (`Dataset.content`); None in files of
            versions that had none.
        apart: whether inputs for policies were drawn one by one (`Dataset.apart`). In files of versions that took the
            last tenth of every training split, this is left out.
    """

    data: str
    fingerprint: str
    classes: tuple[str, ...]
    input_shape: Any
    dtype: str | dict[str, str]
    mean: Numbers
    deviation: Numbers
    vocabulary: Vocabulary | None = None
    content: str | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # JSON has lists
        if isinstance(self.vocabulary, Mapping):
            object.__setattr__(self, "vocabulary", Vocabulary(**self.vocabulary))
        named, shape = isinstance(self.input_shape, Mapping), self.input_shape
        given = {name: tuple(part) for name, part in shape.items()} if named else tuple(shape)
        object.__setattr__(self, "input_shape", given)
        types = self.dtype if isinstance(self.dtype, Mapping) else {"": self.dtype}
        fits = not named or (isinstance(self.dtype, Mapping) and set(self.dtype) == set(given))
        if not fits or not all(isinstance(getattr(torch, str(kind), None), torch.dtype) for kind in types.values()):
            raise ValueError(f"expected the dtype of raw inputs by its name in torch, got {self.dtype!r}")
        standard = Standard(self.mean, self.deviation)
        standard.check(given)
        object.__setattr__(self, "mean", standard.mean)
        object.__setattr__(self, "deviation", standard.deviation)

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

        Several tensors by name are not standardised, and integers among them keep their type. Texts become token ids.

        Args:
            raw: inputs of the type `dtype`. Pixels may also be floating-point numbers from 0 to 1. Where there is a
                vocabulary, a list of texts will do.

        Raises:
            ValueError: the inputs have another shape or type, or pixels are far outside 0 to 1.
        """
        if self.vocabulary is not None and not isinstance(raw, torch.Tensor):
            return self.vocabulary.encode(raw)
        if isinstance(self.dtype, dict):
            if isinstance(raw, Named):
                raw = placed(raw, raw.device, torch.float32)
            kept = {name: None if getattr(torch, kind).is_floating_point else kind for name, kind in self.dtype.items()}
            Form(self.input_shape, kept).check(raw, torch.float32)
            return raw
        if not isinstance(raw, torch.Tensor):
            raise ValueError(f"expected raw inputs as a tensor, as {self.data} has them, got {type(raw).__name__}")
        if tuple(raw.shape[1:]) != self.input_shape:
            shape = ", ".join(map(str, self.input_shape))
            raise ValueError(f"expected raw inputs of shape [batch, {shape}], got {tuple(raw.shape)}")
        pixels, wanted = self.dtype == "uint8", getattr(torch, self.dtype)
        fits = raw.dtype == wanted or (raw.is_floating_point() and (pixels or wanted.is_floating_point))
        if not fits:
            raise ValueError(f"expected raw inputs of {wanted}, as {self.data} has them, got {raw.dtype}")
        if not pixels and not wanted.is_floating_point and (self.mean, self.deviation) == (0, 1):  # token ids
            return raw
        scaled = raw.float() / 255 if raw.dtype == torch.uint8 else raw
        if pixels and (found := strays(scaled)):
            raise ValueError(
                f"expected pixels as torch.uint8, or as numbers from 0 to 1, got numbers {found}; hand over images as "
                "they were read"
            )
        return standardised(scaled, self.mean, self.deviation)
