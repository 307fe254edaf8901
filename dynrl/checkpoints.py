"""A checkpoint holds the states of what is trained, and how far training has come, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynrl.files import load_tensors, reading, save_tensors
from dynrl.schema import check_count, parse

MOST_STEPS = 2**40  # no training counts as far


@dataclass(frozen=True)
class _Written:
    """The metadata of a checkpoint: how far training has come, and the states, which name their tensors."""

    done: int
    states: dict[str, Any]


class Checkpoint:
    """A checkpoint saves and restores `parts`, each a module, an optimiser, a schedule or a generator.

    Args:
        path: the file.
        parts: what is trained, and what training takes, by name.
    """

    def __init__(self, path: Path, parts: Mapping[str, Any]) -> None:
        self.path, self.parts = path, parts

    def save(self, done: int) -> None:
        """Write the states of all parts and the number `done` as a complete file, or not at all.

        Raises:
            ValueError: a state holds NaN or infinity.
        """
        tensors: dict[str, Tensor] = {}
        states = {name: _pack(_state(part), name, tensors) for name, part in self.parts.items()}
        save_tensors(self.path, "checkpoint", tensors, {"done": done, "states": states})

    def restore(self, most: int) -> int:
        """Restore the states of all parts and return how far training had come; 0 if there is no file.

        Raises:
            ValueError: the file is damaged, says that more than `most` was done, or is of other parts. No part has been
                changed.
        """
        if not self.path.exists():
            return 0
        try:
            tensors, metadata = load_tensors(self.path, "checkpoint")
            with reading(self.path, "checkpoint"):
                return self._restored(tensors, parse(_Written, metadata), most)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({error}); take it away, and go on from the beginning") from error

    def _restored(self, tensors: Mapping[str, Tensor], written: _Written, most: int) -> int:
        check_count("done", written.done, 0, most + 1)
        if written.states.keys() != self.parts.keys():
            raise ValueError(f"expected the states of {list(self.parts)}, got {list(written.states)}")
        found = {name: _unpack(state, tensors) for name, state in written.states.items()}
        for name, part in self.parts.items():
            _check_state(name, found[name], part)
        for name, part in self.parts.items():
            part.set_state(found[name]) if isinstance(part, torch.Generator) else part.load_state_dict(found[name])
        return written.done


def _state(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a state as JSON can hold it, which names its tensors; these are put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):  # keys may be numbers, which JSON has not
        return {"items": [[key, _pack(each, f"{name}.{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(each, f"{name}.{i}", tensors) for i, each in enumerate(value)]}
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `_pack` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "items":
        return {key: _unpack(each, tensors) for key, each in inner}
    return {"list": list, "tuple": tuple}[kind](_unpack(each, tensors) for each in inner)


def _check_state(name: str, state: Any, part: Any) -> None:
    """Refuse, with a ValueError, a state that is not like that of `part`."""
    if isinstance(part, Optimizer):  # it has no state of its weights before its first step
        weights = [weight for group in part.param_groups for weight in group["params"]]
        for index, known in state["state"].items():
            shapes = ((), tuple(weights[index].shape))
            for key, value in known.items():
                if isinstance(value, Tensor) and not (tuple(value.shape) in shapes and value.is_floating_point()):
                    raise ValueError(f"{name}.state.{index}.{key}: expected a shape of {shapes}, got {value.shape}")
        _check_alike(f"{name}.param_groups", state["param_groups"], part.state_dict()["param_groups"])
    else:
        _check_alike(name, state, _state(part))


def _check_alike(name: str, got: Any, own: Any) -> None:
    """Refuse, with a ValueError, a value that has other names, lengths, shapes or types than `own`."""
    if isinstance(own, Mapping):
        fits = isinstance(got, dict) and got.keys() == own.keys()
        inner = own.keys()
    elif isinstance(own, list | tuple):
        fits, inner = type(got) is type(own) and len(got) == len(own), range(len(own))  # type: ignore[assignment]
    elif isinstance(own, Tensor):
        fits = isinstance(got, Tensor) and (got.shape, got.dtype) == (own.shape, own.dtype)
        inner = ()  # type: ignore[assignment]
    else:
        numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (got, own)]
        fits, inner = all(numbers) or type(got) is type(own), ()  # type: ignore[assignment]
    if not fits:
        raise ValueError(f"{name}: expected what is like {_told(own)}, got {_told(got)}")
    for key in inner:
        _check_alike(f"{name}.{key}", got[key], own[key])


def _told(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{str(value)[:80]!r}"
