"""A user's own forward runs as it is and is held where it calls its parts, so that nothing needs to be traced.

The forward runs in a greenlet, on shallow twins of the modules that hold the parts. There, each part is a gate: a call
of it stops the forward, and whoever walks the backbone runs the part on those rows that need it and lets the forward go
on. All rows that began together stay in one forward. A row that has left takes no part in any later module.

A forward cannot be copied, and rows of two forwards cannot be put into one. Copies of a state and merged states have no
forward. They get one by running the module again up to where they stand, with stand-ins for the parts behind them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from dynrl.inputs import Named
from dynrl.ops.gated_residual import gated_residual
from dynrl.ops.move import take_rows

PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
Rows = Tensor | slice


def call(module: nn.Module, inputs: Any) -> Any:
    """Return what `module` gives for one tensor, or for tensors by name."""
    return module(**inputs) if isinstance(inputs, Named) else module(inputs)


def answer(output: Any, kind: str) -> Tensor:
    """Return a network's answer: `logits` where its output has them, else the first of several values."""
    said = getattr(output, "logits", output)
    if isinstance(said, Mapping):
        said = said.get("logits", next(iter(said.values()), None))
    if isinstance(said, tuple | list) and said:
        said = said[0]
    if not isinstance(said, Tensor) or not said.dim():
        raise ValueError(
            f"expected {kind} to return a tensor, a tuple that begins with one, or an object with `logits`, got "
            f"{type(output).__name__}"
        )
    return said


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
        ValueError: the module fails on the examples; a part is not run exactly once and in this order; what it is
            given or returns cannot be followed row by row; or something passes it by.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], examples: Callable[[int], Any], leaving: bool = False
    ) -> None:
        self.module, self.names, self.leaving = module, list(names), leaving
        self._opened = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)} | {""}
        self.parts = {name: module.get_submodule(name) for name in names}
        nested = sorted(self._opened & set(names))
        if nested:
            raise ValueError(f"expected parts that do not lie in one another, got {nested} and what lies in them")
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
        stand = go(greenlet(forward.run), forward)
        assert isinstance(stand, Stand), "a forward that has not run all parts says so itself"
        return stand

    # what the forward runs on ------------------------------------------------------------------------------

    def twin(self, gate: Callable[..., Any]) -> nn.Module:
        """Return a shallow copy of the module whose gated parts call `gate(name, module, *args, **kwargs)` instead."""
        return self._twin_of(self.module, "", gate, {})

    def _twin_of(self, module: nn.Module, name: str, gate: Callable[..., Any], made: dict[int, nn.Module]) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        opened = name in self._opened
        if not opened and name not in self.parts and not self.leaving:
            return module
        made[id(module)] = twin = _shallow(module)
        if opened:
            inside = f"{name}." if name else ""
            twin.__dict__["_modules"] = {
                at: None if child is None else self._twin_of(child, inside + at, gate, made)
                for at, child in module._modules.items()
            }
            return twin
        twin.__dict__["forward"] = partial(gate, name, module)
        for hooks in _HOOKS:  # the module itself, which the gate runs, has them
            twin.__dict__[hooks] = OrderedDict()
        return twin

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

    # what the parts are given and return -------------------------------------------------------------------

    def _checked(self, calls: list[Seen]) -> list[Seen]:
        """Return the calls of the parts, in order."""
        parts = [seen for seen in calls if seen.key[0] in self.parts]
        order = [seen.key[0] for seen in parts]
        for name in self.names:
            if order.count(name) != 1:
                raise ValueError(
                    f"expected {self.kind} to run {name!r} once for an input, it does so {order.count(name)} times; "
                    "name other parts"
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


class Forward:
    """One run of a held module on a batch.

    It knows neither the greenlet that it runs in nor where it stands. Frames of a greenlet would keep these alive, and
    with them everything that was computed, after the last state that could go on from there.

    Attributes:
        left: [k] int64, the rows that have not left; None while these are all.
    """

    def __init__(self, held: Held, inputs: Any, start: int = 0) -> None:
        self.held, self.inputs, self.size = held, inputs, len(inputs)
        self.left: Tensor | None = None
        self.next, self.grad = 0, torch.is_grad_enabled()
        self._start, self._counts = start, dict[str, int]()

    def run(self, nothing: None) -> Any:
        """Run the module, in a greenlet of its own."""
        return call(self.held.twin(self._gate), self.inputs)

    def _gate(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        if name not in self.held.parts:
            return self._between((name, count), module, args, kwargs)
        k = self.held.names.index(name)
        if k != self.next:
            raise ValueError(f"{self.held.kind} ran {name!r} in another order, or more often, for these inputs")
        self.next += 1
        own = torch.is_grad_enabled()
        if k < self._start:
            return Stand(None, self, k, args, kwargs, own).stand_in()
        value = getcurrent().parent.switch((k, args, kwargs, own))
        if own != self.grad:  # a mode of the forward's own; else, it has that of whoever lets it go on
            torch.set_grad_enabled(own)
        return value

    def _between(self, key: tuple[str, int], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module that is no part on the rows that are left; the others get zeros."""
        if self.left is None:
            return module(*args, **kwargs)
        held, left = self.held, self.left
        leaves, spec = tree_flatten_with_path((args, kwargs))
        values = [leaf for _, leaf in leaves]
        for i, each in held.rows_at(key, "given", leaves, self.size, self.inputs).items():
            values[i] = _rows(values[i], left, each)
        args, kwargs = tree_unflatten(values, spec)
        leaves, spec = tree_flatten_with_path(module(*args, **kwargs))
        values = [leaf for _, leaf in leaves]
        for i, each in held.rows_at(key, "made", leaves, len(left), self.inputs).items():
            values[i] = _joined(self.spread(_parted(values[i], each)), each)
        return tree_unflatten(values, spec)

    def spread(self, x: Tensor) -> Tensor:
        """Return rows that are left as a tensor of all rows, with zeros for the others."""
        return x if self.left is None else x.new_zeros(self.size, *x.shape[1:]).index_copy(0, self.left, x)


def go(runner: Any, forward: Forward, value: Any = None) -> Stand | Tensor:
    """Let `forward` go on with `value` for its part, to the next part, or to the answer of the rows that are left."""
    runner.parent = getcurrent()
    outside = torch.is_grad_enabled()
    try:
        got = runner.switch(value)
    finally:
        torch.set_grad_enabled(outside)  # the forward may be held inside of a mode of its own
    if not runner.dead:
        return Stand(runner, forward, *got)
    held = forward.held
    if forward.next < len(held.names):
        raise ValueError(f"{held.kind} did not run {held.names[forward.next]!r} for these inputs")
    said = answer(got, held.kind)
    return said if forward.left is None else take_rows(said, forward.left)


class Stand:
    """A forward that stands before a part.

    Attributes:
        k: the part.
        x: [n, ...], the features of the rows that are left.
    """

    def __init__(self, runner: Any, forward: Forward, k: int, args: Any, kwargs: Any, grad: bool) -> None:
        held = forward.held
        self._runner, self._forward, self.k, self._grad = runner, forward, k, grad
        leaves, self._spec = tree_flatten_with_path((args, kwargs))
        self._leaves = [leaf for _, leaf in leaves]
        rows = held.rows_at((held.names[k], 0), "given", leaves, forward.size, forward.inputs)
        self._further = {i: each for i, each in rows.items() if i}  # the tensors beside the features that have rows
        self._each = rows.get(0, 1)
        x = _parted(self._leaves[0], self._each)
        self.x = x if forward.left is None else take_rows(x, forward.left)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy is entered anew

    @property
    def weight_bytes(self) -> int:
        """The size of the part's weights, by which rows are computed in pieces."""
        return self._forward.held.weight_bytes[self.k]

    def __call__(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        """Run the part on `x`, the features of `rows` among those left; None where no tensor beside `x` has rows."""
        held, left, leaves = self._forward.held, self._forward.left, list(self._leaves)
        leaves[0] = _joined(x, self._each)
        at = rows if left is None else left if rows is None else left[rows]
        if at is not None:
            for i, each in self._further.items():
                leaves[i] = _rows(leaves[i], at, each)
        args, kwargs = tree_unflatten(leaves, self._spec)
        own = self._grad != self._forward.grad  # inside of a mode of the forward's own
        with torch.set_grad_enabled(self._grad) if own else nullcontext():
            value = held.parts[held.names[self.k]](*args, **kwargs)
        if not held.knows(self.k, leaves):
            held.learn(self.k, leaves, value)
        y = value if isinstance(value, Tensor) else value[0]
        return _parted(y, y.shape[0] // x.shape[0])

    def part(self, rows: slice | None = None) -> Tensor:
        """Run the part on all rows that are left, or on some of them."""
        return self(self.x if rows is None else self.x[rows], rows)

    def through(self, run: Tensor) -> Tensor:
        """Run the part on the rows where `run` [n] is not 0, and pass the others through."""
        index = run.nonzero().squeeze(1)
        if len(index) == 0:
            return self.x
        if len(index) == len(run):
            return self.part().to(self.x.dtype)
        if not self._further:  # a copy, since the forward may still need its features
            return gated_residual(self.x.clone(), run, self)
        return self.x.index_copy(0, index, self(take_rows(self.x, index), index).to(self.x.dtype))

    def follow(self, y: Tensor, going: Tensor | None = None) -> Stand | Tensor:
        """Go on behind the part with its features `y`, to the next part or to the answer.

        Args:
            y: [n, ...], the features of the rows that go on.
            going: the indexes, among the rows that were left, of those that go on; None for all.
        """
        forward = self._forward
        if going is not None:
            forward.left = going if forward.left is None else forward.left[going]
        full = forward.spread(y)
        if full.dim() > 1 + len(forward.held.shapes[self.k]):
            full = full.flatten(0, 1)
        return go(self._runner, forward, self._returned(full))

    def _returned(self, features: Tensor) -> Any:
        """Return `features` of all rows as the part returns them; if that is not known, it runs on one row."""
        held = self._forward.held
        if not held.knows(self.k, self._leaves):
            with torch.no_grad():
                self(_parted(self._leaves[0], self._each)[:1].clone(), slice(1))
        return held.returned(self.k, features, self._leaves)

    def stand_in(self) -> Any:
        """Return what may stand for the value of the part where only what comes with its features is needed."""
        shape, x = self._forward.held.shapes[self.k], self._leaves[0]
        return self._returned(x if x.shape[1:] == shape else x.new_zeros(x.shape[0], *shape))

    def end(self) -> None:
        """End the forward, since no row goes on."""
        self._runner.parent = getcurrent()
        self._runner.throw()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _shallow(module: nn.Module) -> nn.Module:
    """Return a module of the same class and attributes, with the very parameters and submodules."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _compiled_call_impl=None)
    return twin


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


def _parted(x: Tensor, each: int) -> Tensor:
    """Return [n * each, ...], the rows of `n` inputs, as [n, each, ...]; as it is if there is one for each."""
    return x if each == 1 else x.unflatten(0, (-1, each))


def _joined(x: Tensor, each: int) -> Tensor:
    """Undo `_parted`."""
    return x if each == 1 else x.flatten(0, 1)


def _rows(x: Tensor, rows: Rows, each: int = 1) -> Tensor:
    if isinstance(rows, slice):
        return _joined(_parted(x, each)[rows], each)
    return _joined(take_rows(_parted(x, each), rows), each)
