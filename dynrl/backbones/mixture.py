"""A mixture of experts in a user's block is run with fewer experts, by its own code.

Such a layer says by a number, often its `top_k`, how many experts each token takes. Twins of the layer share all of its
weights and have another number, so they choose and weigh experts by the layer's own rule. The layer is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dynrl.backbones.held import calling, shallow
from dynrl.ops.move import beside
from dynrl.ops.partition import partition

Run = Callable[[int, Tensor], Tensor]  # from (choice, rows) to what the layer makes of rows at that choice
Mix = Callable[[Run, Tensor], Tensor]  # from a run and all rows to what the layer makes of them


def own_count(layer: nn.Module, attribute: str) -> int:
    """Return how many experts a layer takes, the number that it, or modules in it, have as `attribute`.

    Raises:
        ValueError: there is no such number, or several that differ.
    """
    found = {vars(part)[attribute] for part in layer.modules() if _has(part, attribute)}
    if len(found) != 1:
        raise ValueError(
            f"expected a layer that has the number of experts that a token takes as {attribute!r}, got "
            f"{sorted(found) or 'none'} in {type(layer).__name__}; say attribute= if it has another name"
        )
    return found.pop()


def _has(part: nn.Module, attribute: str) -> bool:
    return type(vars(part).get(attribute)) is int


def _at_count(layer: nn.Module, attribute: str, count: int) -> nn.Module:
    """Return a twin of a layer that takes `count` experts."""
    if not any(_has(part, attribute) for part in layer.modules()):
        return layer
    twin = shallow(layer)
    if _has(layer, attribute):
        twin.__dict__[attribute] = count
    twin.__dict__["_modules"] = {
        name: None if child is None else _at_count(child, attribute, count) for name, child in layer._modules.items()
    }
    return twin


def kinds_of(layer: nn.Module, attribute: str, counts: Sequence[int]) -> list[nn.Module]:
    """Return a layer at each of `counts`: its twins, and at its own number the layer itself."""
    own = own_count(layer, attribute)
    return [layer if count == own else _at_count(layer, attribute, count) for count in counts]


def mixed(block: nn.Module, name: str, kinds: Sequence[nn.Module], mix: Mix) -> nn.Module:
    """Return a twin of a block in which `mix` says what the layer `name` gives; an empty name is the block itself.

    `kinds` is the layer at each choice.
    """
    twin = shallow(block)
    if not name:
        return calling(twin, partial(_forward, kinds, mix))
    first, _, rest = name.partition(".")
    inner = mixed(block.get_submodule(first), rest, kinds, mix)
    twin.__dict__["_modules"] = {**block._modules, first: inner}
    return twin


def _forward(kinds: Sequence[nn.Module], mix: Mix, x: Tensor, *more: object, **options: object) -> object:
    """Do what the layer does; of several values that it returns, those behind the first become None."""
    if any(isinstance(given, Tensor) for given in (*more, *options.values())):
        raise ValueError("expected a layer of experts that is given no tensor but its features")
    behind = 0

    def run(choice: int, rows: Tensor) -> Tensor:
        nonlocal behind
        value = kinds[choice](rows, *more, **options)
        if isinstance(value, Tensor):
            return value
        behind = len(value) - 1
        return value[0]

    y = mix(run, x)
    return (y, *[None] * behind) if behind else y


def by_choice(action: Tensor, choices: int) -> Mix:
    """Return what runs each row of a batch at its choice, `action` [n]. A layer may be given several rows for each."""
    parts = partition(action, choices)

    def mix(run: Run, x: Tensor) -> Tensor:
        running = [choice for choice, size in enumerate(parts.sizes) if size]
        if len(running) == 1:
            return run(running[0], x)
        rows, done = _rows(x, len(action)), []
        for choice in running:
            mine = rows.index_select(0, parts.order[parts.ends[choice] : parts.ends[choice + 1]])
            done.append(_rows(run(choice, mine.flatten(0, 1)), len(mine)))
        together = torch.cat(done)
        return torch.empty_like(together).index_copy(0, parts.order, together).flatten(0, 1)

    return mix


def by_gates(gates: Tensor) -> Mix:
    """Return what runs all rows at each choice, and weighs what they give by `gates` [n, choices]."""

    def mix(run: Run, x: Tensor) -> Tensor:
        done = []
        for choice, gate in enumerate(gates.unbind(1)):
            y = _rows(run(choice, x.clone()), len(gates))  # a layer may overwrite its input
            done.append(beside(gate, y) * y)
        return torch.stack(done).sum(0).flatten(0, 1)

    return mix


def side_by_side(sizes: list[int]) -> Mix:
    """Return what runs the first rows at the first choice, and so on, and gives back what it was given."""

    def mix(run: Run, x: Tensor) -> Tensor:
        each = len(x) // sum(sizes)
        for choice, part in enumerate(x.split([each * size for size in sizes])):
            if len(part):
                run(choice, part)
        return x

    return mix


def _rows(x: Tensor, count: int) -> Tensor:
    """Return [count * each, ...] as [count, each, ...]."""
    return x.unflatten(0, (count, -1))
