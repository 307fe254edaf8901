"""A network is given one tensor, or several by name; `Form` says what one input is, and `Named` holds a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class Named:
    """Several tensors by name, with a row for each input; they are indexed by rows together, like one tensor.

    Args:
        tensors: name -> [n, ...], for example token ids and the mask of what is padding.

    Raises:
        ValueError: there is no tensor, something else is among them, or they have different numbers of rows.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = dict(tensors)
        wrong = {name: type(x).__name__ for name, x in self.tensors.items() if not isinstance(x, Tensor) or not x.dim()}
        rows = {name: x.shape[0] for name, x in self.tensors.items() if name not in wrong}
        if wrong or len(set(rows.values())) != 1:
            raise ValueError(f"expected tensors by name with one row for each input, got {wrong or f'rows {rows}'}")

    def keys(self) -> Any:
        """Return the names, so that `**inputs` hands the tensors over by name."""
        return self.tensors.keys()

    def __getitem__(self, key: Any) -> Any:
        """Return the tensor of that name, or all tensors at some rows."""
        return self.tensors[key] if isinstance(key, str) else self._each(lambda x: x[key])

    def __setitem__(self, rows: Any, given: Named) -> None:
        for name, x in self.tensors.items():
            x[rows] = given[name]

    __iter__ = None  # Python would go through the rows by numbers, and a row of its own has no rows

    def __len__(self) -> int:
        return self.first.shape[0]

    @property
    def first(self) -> Tensor:
        """The first tensor."""
        return next(iter(self.tensors.values()))

    @property
    def shape(self) -> torch.Size:
        """The number of rows, which is all that the tensors have in common."""
        return self.first.shape[:1]

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return self.first.device

    @property
    def is_cuda(self) -> bool:
        """Whether the first tensor is on a CUDA device."""
        return self.first.is_cuda

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Named:
        """Return all tensors on `device`, the floating-point ones of the type `dtype`; integers keep theirs."""
        return self._each(lambda x: placed(x, device, dtype))

    def split(self, size: int) -> Iterator[Named]:
        """Yield pieces of `size` rows."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def clone(self) -> Named:
        """Return copies of all tensors."""
        return self._each(Tensor.clone)

    def repeat_first(self, count: int) -> Named:
        """Return the first row `count` times."""
        return self._each(lambda x: repeat_first(x, count))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Named:
        return Named({name: function(x) for name, x in self.tensors.items()})


Inputs = Tensor | Named


def as_inputs(given: Any) -> Any:
    """Return a mapping of tensors (a dict, or what a tokenizer returns) as `Named`, and anything else as it is."""
    return Named(given) if isinstance(given, Mapping) else given


def placed(inputs: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """Return `inputs` on `device`, floating-point numbers of the type `dtype`; integers keep theirs."""
    if isinstance(inputs, Named):
        return inputs.to(device, dtype)
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


def parts(inputs: Any) -> dict[str, Tensor]:
    """Return all tensors of `inputs` by name; a single one has the name ""."""
    return inputs.tensors if isinstance(inputs, Named) else {"": inputs}


def repeat_first(inputs: Any, count: int) -> Any:
    """Return the first row of `inputs` `count` times."""
    return inputs.repeat_first(count) if isinstance(inputs, Named) else inputs[:1].expand(count, *inputs.shape[1:])


LEAST_CHANNELS = 8  # of fewer, oneDNN's AVX2 code writes beyond its memory


def training_format(network: nn.Module) -> torch.memory_format:
    """Return the memory format to train `network` in: channels_last, which convolutions train faster in on a CPU.

    Contiguous maps are for networks with a 1x1 convolution of a stride from few channels. On channels_last maps, its
    backward pass corrupts memory on CPUs without AVX-512 (torch 2.13 with oneDNN 3.12).
    """
    broken = any(
        part.kernel_size == (1, 1) and max(part.stride) > 1 and part.in_channels < LEAST_CHANNELS
        for part in network.modules()
        if isinstance(part, nn.Conv2d)
    )
    return torch.contiguous_format if broken else torch.channels_last


def laid_out(inputs: Any, form: torch.memory_format) -> Any:
    """Return images in the memory format `form`, and other inputs as they are."""
    images = isinstance(inputs, Tensor) and inputs.dim() == 4
    return inputs.contiguous(memory_format=form) if images else inputs


def _described(inputs: Any) -> str:
    if isinstance(inputs, Named):
        return f"tensors by the names {sorted(inputs.keys())}"
    return f"{type(inputs).__name__}, which is no tensor; torch.as_tensor makes one of arrays"


def _kinds(values: Any) -> str:
    return ", ".join(dict.fromkeys(type(value).__name__ for value in values))


@dataclass(frozen=True)
class Form:
    """A form is the shape and type of one input.

    Attributes:
        shape: the shape of one input; name -> shape if there are several tensors.
        dtype: the type by its name in torch, or that of each tensor by name; None stands for the type of the weights.
    """

    shape: Shape | dict[str, Shape]
    dtype: str | dict[str, str | None] | None = None

    @classmethod
    def of(cls, given: Any, dtype: Any = None) -> Form:
        """Return the form that `given` states or shows.

        Args:
            given: the shape of one input, or a batch of examples [n, ...]; or either of these by name.
            dtype: the types of the tensors whose shapes are given, None for that of the weights.

        Raises:
            ValueError: it is something else.
        """
        if isinstance(given, Named | Mapping):
            given = {name: given[name] for name in given.keys()}  # noqa: SIM118 (`Named` is no dict)
            if not given or (dtype is not None and not isinstance(dtype, Mapping)):
                raise ValueError(f"expected the inputs' shapes and types by name, got {given} and {dtype}")
            shown = [isinstance(part, Tensor) for part in given.values()]
            if all(shown):
                Named(given)  # which refuses other than one row for each input
            elif any(shown):
                kinds = {name: type(part).__name__ for name, part in given.items()}
                raise ValueError(f"expected examples of all tensors, or shapes of all, got {kinds}")
            parts = {name: cls.of(part, (dtype or {}).get(name)) for name, part in given.items()}
            return cls({n: part.shape for n, part in parts.items()}, {n: part.dtype for n, part in parts.items()})  # type: ignore[misc]
        if isinstance(given, Tensor):
            if not given.dim():
                raise ValueError("expected examples with a row for each input, got a tensor of no dimensions")
            kept = None if given.is_floating_point() else str(given.dtype).removeprefix("torch.")
            return cls(tuple(given.shape[1:]), kept)
        try:
            shape = tuple(int(size) for size in given)
        except (TypeError, ValueError):
            got = f"{type(given).__name__} of {_kinds(given)}" if isinstance(given, tuple | list) else repr(given)
            raise ValueError(
                f"expected the shape of one input, or a batch of examples (a tensor, or several by name as in "
                f"{{'input_ids': ids, 'attention_mask': mask}}), got {got}"
            ) from None
        if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"expected a type by its name in torch, got {dtype!r}")
        return cls(shape, dtype)

    def __str__(self) -> str:
        if isinstance(self.shape, dict):
            assert isinstance(self.dtype, dict)
            return ", ".join(f"{name} {Form(shape, self.dtype[name])}" for name, shape in self.shape.items())
        return f"{self.shape}{'' if self.dtype is None else f' of {self.dtype}'}"

    @property
    def config(self) -> dict[str, Any]:
        """The form as JSON can hold it: `input_shape`, and `input_dtype` where there are integers."""
        shape = self.shape
        listed = {name: list(part) for name, part in shape.items()} if isinstance(shape, dict) else list(shape)
        kept = any(self.dtype.values()) if isinstance(self.dtype, dict) else self.dtype
        return {"input_shape": listed} | ({"input_dtype": self.dtype} if kept else {})

    @property
    def named(self) -> bool:
        """Whether an input is several tensors by name."""
        return isinstance(self.shape, dict)

    def example(self, rows: int, weight: Tensor, alike: bool = True) -> Any:
        """Make inputs of this form where `weight` is: numbers of its type, always the same ones; integers are 1.

        The integer 1 is a token of every vocabulary, and in a mask it shows what the mask is over. Unless rows may be
        `alike`, every second one has integers 1 and 0 in turn, and numbers of another mean and deviation. Inputs that
        are called a mask are always alike.
        """
        if isinstance(self.shape, dict):
            assert isinstance(self.dtype, dict)
            parts = {name: Form(shape, self.dtype[name]) for name, shape in self.shape.items()}
            return Named({n: part.example(rows, weight, alike or "mask" in n) for n, part in parts.items()})
        if self.dtype is not None:
            ones = torch.ones(rows, *self.shape, dtype=getattr(torch, str(self.dtype)), device=weight.device)
            if not alike and self.shape:
                ones[1::2, ..., 1::2] = 0
            return ones
        drawn = torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(0))
        if not alike:
            drawn[1::2] = 3 * drawn[1::2] + 2
        return drawn.to(weight.device, weight.dtype)

    def check(self, inputs: Any, weights: torch.dtype, what: str = "inputs") -> None:
        """Refuse, with a ValueError, inputs that would fail later or silently pass on NaN."""
        if isinstance(self.shape, dict):
            assert isinstance(self.dtype, dict)
            if not isinstance(inputs, Named) or set(inputs.keys()) != set(self.shape):
                got = sorted(inputs.keys()) if isinstance(inputs, Named) else f"one {type(inputs).__name__}"
                raise ValueError(
                    f"expected tensors by the names {sorted(self.shape)}, got {got}; give all in a dict, or by name"
                )
            for name, shape in self.shape.items():
                Form(shape, self.dtype[name]).check(inputs[name], weights, repr(name))
            return
        if not isinstance(inputs, Tensor) or tuple(inputs.shape[1:]) != self.shape:
            got = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else _described(inputs)
            raise ValueError(f"expected {what} of shape [batch, {', '.join(map(str, self.shape))}], got {got}")
        if len(inputs) == 0:
            raise ValueError("expected at least one input, got an empty batch")
        wanted = weights if self.dtype is None else getattr(torch, str(self.dtype))
        if inputs.dtype != wanted:
            advice = "; a plugged model standardises raw pixels by `preprocess`" if inputs.dtype == torch.uint8 else ""
            raise ValueError(
                f"expected {what} of {wanted}, got {inputs.dtype}; convert them with .to({wanted}){advice}"
            )
        # A sum is NaN or infinite if any element is, and takes far less time than isfinite().all().
        if inputs.is_floating_point() and not torch.isfinite(inputs.sum(dtype=torch.float32)):
            raise ValueError(f"the {what} hold NaN or infinity; clean them first")
