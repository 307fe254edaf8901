"""One run of a user's own forward is held where it calls the module's parts.

The forward runs in a greenlet. There, each part is a gate: a call of it stops the forward, and whoever walks the
backbone runs the part on those rows that need it and lets the forward go on. All rows that began together stay in one
forward. A row that has left takes no part in any later module.

A forward cannot be copied, and rows of two forwards cannot be put into one. Copies of a state and merged states have no
forward. They get one by running the module again up to where they stand, with stand-ins for the parts behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from greenlet import error as GreenletError
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from dynrl.backbones.modes import Modes, kept
from dynrl.inputs import Named
from dynrl.ops.gated_residual import gated_residual
from dynrl.ops.move import put_rows, take_rows

if TYPE_CHECKING:
    from dynrl.backbones.held import Held

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


class LeftOut(ValueError):
    """This says that a forward left out one of the parts."""


class Forward:
    """One run of a held module on a batch.

    It knows neither the greenlet that it runs in nor where it stands. Frames of a greenlet would keep these alive, and
    with them everything that was computed, after the last state that could go on from there.

    Attributes:
        left: [k] int64, the rows that have not left; None while these are all.
        begun: the modes in which it began.
        made: what was made for the last part, which the next one may overwrite if it is handed on as it is.
    """

    def __init__(self, held: Held, inputs: Any, start: int = 0) -> None:
        self.held, self.inputs, self.size = held, inputs, len(inputs)
        self.left: Tensor | None = None
        self.made: Tensor | None = None
        self.next, self.begun = 0, Modes.now()
        self._start, self._counts = start, dict[str, int]()

    def run(self, nothing: None) -> Any:
        """Run the module, in a greenlet of its own."""
        return call(self.held.twin(self.gate), self.inputs)

    def gate(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Take a call of a module: stop there if it is a part, else run it on the rows that are left."""
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        if name not in self.held.parts:
            return self._between((name, count), module, args, kwargs)
        k = self.held.names.index(name)
        if k > self.next:
            raise self.left_out()
        if k < self.next:
            raise ValueError(f"{self.held.kind} ran {name!r} in another order, or more often, for these inputs")
        self.next += 1
        here = Modes.now()
        if k < self._start:
            return Stand(None, self, k, args, kwargs, here).stand_in()
        value = getcurrent().parent.switch((k, args, kwargs, here))
        if here != self.begun:  # modes of the forward's own; else, it has those of whoever lets it go on
            here.since(self.begun).set()
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

    def left_out(self) -> LeftOut:
        """Return the error that the next part was not run."""
        drop = "; a block that training leaves out by chance cannot be routed: set the rate of layer drop to 0"
        return LeftOut(
            f"{self.held.kind} did not run {self.held.names[self.next]!r} for these inputs"
            f"{drop if self.held.module.training else ''}"
        )

    def spread(self, x: Tensor) -> Tensor:
        """Return rows that are left as a tensor of all rows, with zeros for the others."""
        return x if self.left is None else x.new_zeros(self.size, *x.shape[1:]).index_copy(0, self.left, x)


class Runner:
    """The greenlet of a forward, which may be given up at any part."""

    def __init__(self, forward: Forward) -> None:
        self._greenlet = greenlet(forward.run)

    def go(self, value: Any) -> Any:
        """Let the forward run with `value` for its part; return what it gives at the next part, or at its end."""
        self._greenlet.parent = getcurrent()
        with kept():  # the forward may be held inside of modes of its own
            return self._greenlet.switch(value)

    @property
    def ended(self) -> bool:
        """Whether the forward has come to its end."""
        return bool(self._greenlet.dead)

    def end(self) -> None:
        """End the forward, since no row goes on; what it has begun is ended as by an exception."""
        self._greenlet.parent = getcurrent()
        with kept():
            self._greenlet.throw()

    def __del__(self) -> None:
        # greenlet would end it, too, but leave the modes to which the forward's own contexts return.
        if self._greenlet and not self._greenlet.dead:
            with suppress(GreenletError):  # in another thread, greenlet ends it later
                self.end()


def begin(forward: Forward) -> Stand | Tensor:
    """Let `forward` run to its first part."""
    return go(Runner(forward), forward)


def go(runner: Runner, forward: Forward, value: Any = None) -> Stand | Tensor:
    """Let `forward` go on with `value` for its part, to the next part, or to the answer of the rows that are left."""
    inference = torch.is_inference_mode_enabled()
    got, held = runner.go(value), forward.held
    if not runner.ended:
        if torch.is_inference_mode_enabled() != inference:
            runner.end()
            raise ValueError(
                f"{held.kind} runs {held.names[got[0]]!r} in torch.inference_mode(), which cannot be left for a while; "
                "use torch.no_grad() there"
            )
        return Stand(runner, forward, *got)
    if forward.next < len(held.names):
        raise forward.left_out()
    said = answer(got, held.kind)
    return said if forward.left is None else take_rows(said, forward.left)


class Stand:
    """A forward that stands before a part.

    Attributes:
        k: the part.
        x: [n, ...], the features of the rows that are left.
    """

    def __init__(self, runner: Any, forward: Forward, k: int, args: Any, kwargs: Any, modes: Modes) -> None:
        held = forward.held
        self._runner, self._forward, self.k, self._modes = runner, forward, k, modes
        leaves, self._spec = tree_flatten_with_path((args, kwargs))
        self._leaves = [leaf for _, leaf in leaves]
        rows = held.rows_at((held.names[k], 0), "given", leaves, forward.size, forward.inputs)
        self._further = {i: each for i, each in rows.items() if i}  # the tensors beside the features that have rows
        self._each = rows.get(0, 1)
        # Other features may be weights or the user's inputs. A forward that kept them for later is no chain of parts.
        self._free = self._leaves[0] is forward.made and not torch.is_grad_enabled()
        x = _parted(self._leaves[0], self._each)
        self.x = x if forward.left is None else take_rows(x, forward.left)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy is entered anew

    @property
    def weight_bytes(self) -> int:
        """The size of the part's weights, by which rows are computed in pieces."""
        return self._forward.held.weight_bytes[self.k]

    def __call__(
        self, x: Tensor, rows: Rows | None = None, places: Tensor | None = None, by: nn.Module | None = None
    ) -> Tensor:
        """Run the part on `x`, the features of `rows` among those left; None where no tensor beside `x` has rows.

        If only the tokens at `places` [m, k] of these rows are in `x`, tensors beside it are cut down to them, too: in
        each dimension but the first that is as long as the features have tokens. `by` is what runs in the part's place.
        """
        held, left, leaves = self._forward.held, self._forward.left, list(self._leaves)
        leaves[0] = _joined(x, self._each)
        at = rows if left is None else left if rows is None else left[rows]
        if at is not None:
            for i, each in self._further.items():
                leaves[i] = _rows(leaves[i], at, each)
        if places is not None:
            tokens = self.x.shape[1]
            leaves[1:] = [_at_places(leaf, places, tokens) for leaf in leaves[1:]]
        args, kwargs = tree_unflatten(leaves, self._spec)
        own, begun = self._modes, self._forward.begun
        with own.since(begun).hold() if own != begun else nullcontext():
            value = (held.parts[held.names[self.k]] if by is None else by)(*args, **kwargs)
        if not held.knows(self.k, leaves):
            held.learn(self.k, leaves, value)
        y = value if isinstance(value, Tensor) else value[0]
        return _parted(y, y.shape[0] // x.shape[0])

    def part(self, rows: slice | None = None) -> Tensor:
        """Run the part on all rows that are left, or on some of them."""
        return self(self.x if rows is None else self.x[rows], rows)

    def through(self, run: Tensor) -> Tensor:
        """Run the part on the rows where `run` [n] is not 0, and pass the others through."""
        made = self._through(run)
        if not torch.is_grad_enabled():
            alias = made.untyped_storage().data_ptr() == self.x.untyped_storage().data_ptr()
            self._forward.made = None if alias and not self._free else made
        return made

    def _through(self, run: Tensor) -> Tensor:
        index = run.nonzero().squeeze(1)
        if len(index) == 0:
            return self.x
        if len(index) == len(run):
            return self.part().to(self.x.dtype)
        x = self.x if self._free else self.x.clone()
        if not self._further:
            return gated_residual(x, run, self)
        rows = self(take_rows(x, index), index).to(x.dtype)
        return x.index_copy(0, index, rows) if torch.is_grad_enabled() else put_rows(x, index, rows)

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
        self._runner.end()


def _parted(x: Tensor, each: int) -> Tensor:
    """Return [n * each, ...], the rows of `n` inputs, as [n, each, ...]; as it is if there is one for each."""
    return x if each == 1 else x.unflatten(0, (-1, each))


def _at_places(leaf: Any, places: Tensor, tokens: int) -> Any:
    """Return a tensor with each row's `places` [m, k] in the dimensions behind the first that have `tokens`."""
    for dim in range(1, leaf.dim() if isinstance(leaf, Tensor) else 0):
        if leaf.shape[dim] == tokens:
            index = places.view(len(places), *[1] * (dim - 1), -1, *[1] * (leaf.dim() - dim - 1))
            leaf = leaf.take_along_dim(index, dim)
    return leaf


def _joined(x: Tensor, each: int) -> Tensor:
    """Undo `_parted`."""
    return x if each == 1 else x.flatten(0, 1)


def _rows(x: Tensor, rows: Rows, each: int = 1) -> Tensor:
    if isinstance(rows, slice):
        return _joined(_parted(x, each)[rows], each)
    return _joined(take_rows(_parted(x, each), rows), each)
