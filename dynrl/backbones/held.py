"""A user's own module is held at its parts: what a few runs of it tell, so that nothing needs to be traced.

`dynrl.backbones.forward` runs it. The module itself is never changed: its forward runs on shallow twins of the modules
that hold the parts. Runs of two sizes tell which tensors have a row for each input.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from dynrl.backbones.chance import drawing
from dynrl.backbones.forward import Forward, LeftOut, Stand, answer, begin, call
from dynrl.backbones.traced import holders

PASSES = 32  # how often a forward that draws in training is asked whether it leaves a part out
PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


@dataclass(frozen=True)
class Seen:
    """A call of a gated module, as it was seen on examples.

    Attributes:
        key: the module's name and how often it had been called before.
        given, made: the arguments and the results, by their places.
        value: what was returned.
    """

    key: tuple[str, int]
    given: dict[str, Any]
    made: dict[str, Any]
    value: Any


class Held:
    """A module that is run as it is, and held at its parts of given names.

    Args:
        module: a module that maps inputs to outputs (see `answer`).
        names: the names of the parts, in the order in which the module runs them.
        examples: a function from a number of rows to that many inputs.
        leaving: whether rows may leave behind a part. Then, every module between parts is run on the other rows only.

    Raises:
        ValueError: the module fails on the examples; a part is not run exactly once and in this order, or is left out
            in training; what it is given or returns cannot be followed row by row; or something passes it by.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], examples: Callable[[int], Any], leaving: bool = False
    ) -> None:
        self.module, self.names, self.leaving = module, list(names), leaving
        self._opened = {"", *holders(names)}
        self.parts = {name: module.get_submodule(name) for name in names}
        self.weight_bytes = [
            sum(p.numel() * p.element_size() for p in part.parameters()) for part in self.parts.values()
        ]
        # How many rows a tensor has for each input, by the module that it is given to or made by, and its place there.
        # This is 0 where it has as many whatever the inputs; some networks fold the patches of an image into its rows.
        self._by_row: dict[tuple[Any, str], int] = {}
        # What a part returns behind its features, by the part and by which of its arguments are None: some are given
        # for some inputs only, such as a mask. None where the features are all.
        self._returns: dict[tuple[int, tuple[int, ...]], tuple[type, list[int | None]] | None] = {}
        with torch.no_grad():
            one, inputs = self._record(examples(1)), examples(3)
            self._learn(one, 1, self._record(inputs), 3)
            calls = self._checked(one)
            for k, seen in enumerate(calls):
                self.learn(k, list(seen.given.values()), seen.value)
            self.shapes = [tensors(seen.made)[0].shape[1:] for seen in calls]
            self._check_chain(inputs)
            self._check_drop(examples(2))

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    def output(self, inputs: Any) -> Tensor:
        """Return the answer of the module itself."""
        return answer(call(self.module, inputs), self.kind)

    def again(self) -> Held:
        """Return what holds the module after it was moved or changed: the same."""
        return self

    def enter(self, inputs: Any) -> Stand:
        """Begin a forward on `inputs`, and stand before the first part."""
        return self._begun(Forward(self, inputs))

    def at(self, k: int, x: Tensor, inputs: Any) -> Stand:
        """Stand before part `k` with the features `x`, in a new forward whose rows have these inputs."""
        stand = self._begun(Forward(self, inputs, k))
        stand.x = x
        return stand

    def _begun(self, forward: Forward) -> Stand:
        stand = begin(forward)
        assert isinstance(stand, Stand), "a forward that has not run all parts says so itself"
        return stand

    # what the forward runs on ------------------------------------------------------------------------------

    def twin(self, gate: Callable[..., Any], between: bool | None = None) -> nn.Module:
        """Return a shallow copy of the module whose gated parts call `gate(name, module, *args, **kwargs)` instead.

        So do the modules between parts if rows may leave, or if `between` says so.
        """
        return self._twin_of(self.module, "", gate, self.leaving if between is None else between, {})

    def _twin_of(
        self, module: nn.Module, name: str, gate: Callable[..., Any], between: bool, made: dict[int, nn.Module]
    ) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        opened = name in self._opened
        if not opened and name not in self.parts and not between:
            return module
        made[id(module)] = twin = shallow(module)
        if opened:
            inside = f"{name}." if name else ""
            twin.__dict__["_modules"] = {
                at: None if child is None else self._twin_of(child, inside + at, gate, between, made)
                for at, child in module._modules.items()
            }
            return twin
        return calling(twin, partial(gate, name, module))

    # which tensors have a row for each input ---------------------------------------------------------------

    def _record(self, inputs: Any) -> list[Seen]:
        seen: list[Seen] = []
        counts: dict[str, int] = {}

        def gate(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            key = name, counts.get(name, 0)
            counts[name] = key[1] + 1
            given = _by_place((args, kwargs))
            value = module(*args, **kwargs)
            seen.append(Seen(key, given, _by_place(value), value))
            return value

        call(self.twin(gate), inputs)
        return seen

    def _learn(self, some: list[Seen], rows: int, more: list[Seen], more_rows: int) -> None:
        """Learn from two runs on so many inputs how many rows each tensor has for an input."""
        known = {seen.key: seen for seen in some}
        for seen in more:
            other = known.get(seen.key)
            for side in ("given", "made") if other is not None else ():
                before = getattr(other, side)
                for path, leaf in getattr(seen, side).items():
                    was = before.get(path)
                    if isinstance(leaf, Tensor) and isinstance(was, Tensor) and leaf.dim() and was.dim():
                        each = leaf.shape[0] // more_rows
                        follows = (was.shape[0], leaf.shape[0]) == (rows * each, more_rows * each)
                        self._by_row[(*seen.key, side), path] = each if follows else 0

    def rows_at(self, key: tuple[str, int], side: str, leaves: list[Any], count: int, inputs: Any) -> dict[int, int]:
        """Return the indexes of those `leaves`, (path, value), that have rows for each of `count`, and how many.

        Args:
            key: the call of a gated module (`Seen.key`).
            side: "given" or "made".
            leaves: the arguments or results of that call.
            count: the number of rows.
            inputs: the inputs of the forward.
        """
        found = {}
        for i, (path, leaf) in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] and leaf.shape[0] % count == 0:
                where = (*key, side), keystr(path)
                if where not in self._by_row:
                    # The examples had no such tensor, for example no mask. One row more tells what it is.
                    with torch.no_grad():
                        more = _one_more(inputs)
                        self._learn(self._record(inputs), len(inputs), self._record(more), len(more))
                if where not in self._by_row:
                    raise ValueError(
                        f"{key[0]!r} has a {tuple(leaf.shape)} tensor at {where[1]} for some inputs only, so it cannot "
                        "be told whether it has a row for each input; let it be there always"
                    )
                if leaf.shape[0] == count * self._by_row[where]:
                    found[i] = self._by_row[where]
        return found

    def _check_chain(self, inputs: Any) -> None:
        """Refuse parts that something passes by: then, it would not be enough to know their features."""
        stand: Stand | Tensor = self.enter(inputs)
        while isinstance(stand, Stand):
            k, y = stand.k, stand.part()
            again, stand = self.at(k, stand.x, inputs).follow(y.clone()), stand.follow(y)
            found, wanted = (there.x if isinstance(there, Stand) else there for there in (again, stand))
            if not torch.allclose(found, wanted, equal_nan=True):
                raise ValueError(
                    f"{self.kind} needs something that was made before {self.names[k]!r} after it, too: such a part is "
                    "no whole block; name the block that has its shortcut inside"
                )

    def _check_drop(self, inputs: Any) -> None:
        """Refuse a module that leaves parts out in training, as layer drop does: no row could stand before them."""
        device = inputs.device

        def gate(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if name in self.parts:
                return forward.gate(name, module, *args, **kwargs)
            with drawing(device):  # what a layer draws, such as dropout, decides nothing
                return module(*args, **kwargs)

        self.module.train()
        try:
            with drawing(device) as drawn, _unchanged_buffers(self.module):
                for _ in range(PASSES):
                    forward = Forward(self, inputs, len(self.names))  # so that no part runs
                    call(self.twin(gate, between=True), inputs.clone())
                    if forward.next < len(self.names):
                        raise forward.left_out()
                    if not drawn():
                        break
        except LeftOut:
            raise
        except Exception:  # a user's forward may want more than examples in training, such as targets
            return
        finally:
            self.module.eval()

    # what the parts are given and return -------------------------------------------------------------------

    def _checked(self, calls: list[Seen]) -> list[Seen]:
        """Return the calls of the parts, in order."""
        parts = [seen for seen in calls if seen.key[0] in self.parts]
        order = [seen.key[0] for seen in parts]
        for name in self.names:
            if order.count(name) != 1:
                own = [at or self.kind for at in self._opened if "forward" in vars(self.module.get_submodule(at))]
                advice = f"make a class of the forward that was set on {own}" if own else "name other parts"
                raise ValueError(
                    f"expected {self.kind} to run {name!r} once for an input, it does so {order.count(name)} times; "
                    f"{advice}"
                )
        if order != self.names:
            raise ValueError(f"expected the parts in the order in which {self.kind} runs them: {order}")
        for seen in parts:
            name, (first, x) = seen.key[0], next(iter(seen.given.items()))
            if not isinstance(x, Tensor) or not self._by_row.get(((*seen.key, "given"), first), 0):
                raise ValueError(
                    f"expected {name!r} to be given features first, a tensor with a row for each input, got "
                    f"{type(x).__name__} at {first}"
                )
            for path, leaf in seen.given.items():
                if not isinstance(leaf, PLAIN):
                    cache = "cache" in type(leaf).__name__.lower()
                    advice = "set use_cache=False in the model's config" if cache else "leave it out"
                    raise ValueError(
                        f"{name!r} is given a {type(leaf).__name__} at {path}, whose rows cannot be cut down; {advice}"
                    )
        return parts

    def knows(self, k: int, leaves: list[Any]) -> bool:
        """Tell whether it is known what part `k` returns if just these of its arguments are None."""
        return (k, _missing(leaves)) in self._returns

    def learn(self, k: int, leaves: list[Any], value: Any) -> None:
        """Learn from a call of part `k`, with the arguments `leaves`, how its value is made up of its features.

        Behind the features, there may be None and arguments that the part hands on.

        Raises:
            ValueError: there is something else.
        """
        name, kind, others = self.names[k], type(value), list[int | None]()
        if not isinstance(value, Tensor):
            if kind not in (tuple, list) or not value or not isinstance(value[0], Tensor):
                raise ValueError(
                    f"expected {name!r} to return features, or a tuple that begins with them, got {kind.__name__}"
                )
            for i, more in enumerate(value[1:], 1):
                at = next((j for j, leaf in enumerate(leaves) if leaf is more), None)
                if more is not None and at is None:
                    raise ValueError(
                        f"{name!r} returns a {type(more).__name__} of its own behind its features (value {i}), which "
                        "rows that leave the part out do not have; let it return features alone, or name other parts"
                    )
                others.append(None if more is None else at)
        self._returns[k, _missing(leaves)] = None if isinstance(value, Tensor) else (kind, others)

    def returned(self, k: int, features: Tensor, leaves: list[Any]) -> Any:
        """Return `features` as part `k` returns them."""
        made = self._returns[k, _missing(leaves)]
        if made is None:
            return features
        kind, others = made
        return kind([features, *(None if at is None else leaves[at] for at in others)])


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def shallow(module: nn.Module) -> nn.Module:
    """Return a module of the same class and attributes, with the very parameters and submodules."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _compiled_call_impl=None)
    return twin


def calling(twin: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Let a shallow twin call `forward`, which runs the module itself and so its hooks; return the twin."""
    twin.__dict__["forward"] = forward
    for hooks in _HOOKS:
        twin.__dict__[hooks] = OrderedDict()
    return twin


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Behind the block, a module has the buffers of before, such as the statistics of batch norms."""
    owners = [(part, name, x) for part in module.modules() for name, x in part._buffers.items() if x is not None]
    copies = [x.clone() for _, _, x in owners]
    try:
        yield
    finally:
        for (part, name, x), copy in zip(owners, copies, strict=True):
            part._buffers[name] = x
            if not torch.equal(x, copy):
                x.copy_(copy)


def _missing(leaves: list[Any]) -> tuple[int, ...]:
    return tuple(i for i, leaf in enumerate(leaves) if leaf is None)


def _by_place(tree: Any) -> dict[str, Any]:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def tensors(leaves: Mapping[str, Any]) -> list[Tensor]:
    """Return those values that are tensors."""
    return [leaf for leaf in leaves.values() if isinstance(leaf, Tensor)]


def _one_more(inputs: Any) -> Any:
    """Return `inputs` with the first row once more, at the end."""
    return inputs[torch.tensor([*range(len(inputs)), 0], device=inputs.device)]
