"""The tokens of an input take more or fewer experts of the mixtures in a user's module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dynrl.backbones.channels import takes_channels_last
from dynrl.backbones.mixture import Mix, Run, by_choice, by_gates, kinds_of, mixed, own_count, side_by_side
from dynrl.backbones.module import Channels, OfModule, arrived
from dynrl.backbones.walk import Point, State, Walk
from dynrl.cost import executed, macs_of
from dynrl.ops.pooled import summary


class ExpertModule(OfModule):
    """A module of your own with mixtures of experts: action c lets each token take counts[c] experts of a layer.

    How many is the decision, for all tokens of an input alike; which ones is up to the layer's own router, and their
    weights are by its own rule. The layer's code runs with another number of experts, so a shared expert runs whatever
    is chosen. The full route is the module itself, with the same weights.

    Args:
        module: a module that maps a tensor, or tensors by name, to outputs, see `SkipModule`; it is held, not copied,
            and put into eval mode.
        input_shape: the shape of one input, or examples; see `SkipModule`.
        blocks: the names (as in `module.named_modules()`), in running order, of blocks that contain their shortcut and
            a mixture of experts.
        layer: the name of the mixture within each block, such as "mlp"; "" if it is the block itself.
        family, classes, channels, input_dtype: the same as in `SkipModule`.
        counts: the numbers of experts, one for each choice, rising to the layer's own; 0 leaves the mixture out, but
            for its router and a shared expert. None takes 1, 2, 4 and so on, and the layer's own.
        attribute: the name of the number in the layer, or in modules in it.

    Raises:
        ValueError: a layer has no such number, its code does not go by it or fails with another one, its experts are of
            unequal size, or a reason of `SkipModule`.

    Source: mixtures of experts of which each token takes k (Shazeer et al. 2017, ICLR); that easy inputs need fewer
    (Huang et al. 2024, ACL, "Harder Tasks Need More Experts").
    """

    family, decision = "expert_module", "expert"
    _kinds: list[list[nn.Module]] | None

    def __init__(
        self,
        module: nn.Module,
        input_shape: Any,
        blocks: Sequence[str],
        layer: str,
        family: str | None = None,
        classes: int | None = None,
        channels: Channels | None = None,
        input_dtype: Any = None,
        counts: tuple[int, ...] | None = None,
        attribute: str = "top_k",
    ) -> None:
        config: dict[str, Any] = {"blocks": list(blocks), "layer": layer, "attribute": attribute}
        super().__init__(module, input_shape, blocks, family, channels, input_dtype, **config)
        self._counts = self._known_counts(counts)
        self.config["counts"] = list(self._counts)
        block_macs, width, self._lasts = [], 1, list[bool]()
        stand: Any
        ops, stand = executed(lambda: self._cut.enter(self._example(1)))
        fixed_macs = [macs_of(ops)]
        for k in range(len(blocks)):
            x = stand.x
            ops, y = executed(lambda: stand(x.clone()))  # noqa: B023 (called at once)
            block_macs.append(self._macs(stand, macs_of(ops)))
            self._lasts.append(self._last(k, takes_channels_last(ops, x.shape)))
            width = max(width, summary(x, self._lasts[-1]).shape[1])
            ops, stand = executed(lambda: stand.follow(y))  # noqa: B023
            fixed_macs.append(macs_of(ops))
        self._set_classes(stand, classes)
        self._pose(
            [Point(name, len(self._counts)) for name in blocks],
            costs=[[fixed + one for one in macs] for fixed, macs in zip(fixed_macs[1:], block_macs, strict=True)],
            start_macs=fixed_macs[0],
            full_route=(len(self._counts) - 1,) * len(blocks),
            feature_width=width,
        )
        self._check_routes()

    def _known_counts(self, counts: tuple[int, ...] | None) -> tuple[int, ...]:
        """Return the numbers of experts, checked against the layers' own."""
        found = dict[str, int]()
        for name in self._names:
            block, layer = self.module.get_submodule(name), self.config["layer"]
            if layer not in (known := [inner for inner, _ in block.named_modules()]):
                near = get_close_matches(layer, known, 4, 0)
                raise ValueError(f"expected the name of a layer in {name!r}, such as one of {near}, got {layer!r}")
            found[name] = own_count(block.get_submodule(layer), self.config["attribute"])
        own = max(found.values())
        if min(found.values()) < own:
            raise ValueError(f"expected layers that take equally many experts, got {found}; name those that do")
        if counts is None:
            counts = (*(2**i for i in range(own.bit_length()) if 2**i < own), own)
        rising = all(less < more for less, more in pairwise((-1, *counts)))
        if len(counts) < 2 or not rising or counts[-1] != own:
            raise ValueError(
                f"expected two numbers of experts or more, such as (0, {own}), that rise to the layer's own, got "
                f"{tuple(counts)}"
            )
        return tuple(counts)

    def _macs(self, stand: Any, own: int) -> list[int]:
        """Return what the block costs at each number of experts, as `stand` is before it; refuse what does not fit."""
        name, x, found = self._names[stand.k], stand.x.detach(), list[int]()
        for choice, count in enumerate(self._counts):
            block, seen = self._mixed(stand.k, partial(_always, choice)), list[int]()
            for given in (x, torch.randn_like(x)):
                try:
                    seen.append(macs_of(executed(lambda: stand(given.clone(), by=block))[0]))  # noqa: B023 (at once)
                except Exception as error:  # a user's layer may raise anything
                    raise ValueError(
                        f"the mixture in {name!r} fails with {count} experts a token ({type(error).__name__}: {error})"
                        "; give other counts="
                    ) from error
            if seen[0] != seen[1]:
                raise ValueError(f"expected experts of equal size in {name!r}, so that MACs do not depend on the input")
            found.append(seen[0])
        if found[-1] != own or any(less >= more for less, more in pairwise(found)):
            raise ValueError(
                f"expected the MACs of {name!r} to rise with {self.config['attribute']!r} at {self._counts}, got "
                f"{found}; the code of the mixture does not go by it"
            )
        return found

    def _recut(self) -> None:
        super()._recut()
        self._kinds = None  # twins do not know that modules were moved, replaced or put into another mode

    def _mixed(self, point: int, mix: Mix) -> nn.Module:
        blocks, layer = [self.module.get_submodule(name) for name in self._names], self.config["layer"]
        kinds = self._kinds
        if kinds is None:
            layers = [block.get_submodule(layer) for block in blocks]
            self._kinds = kinds = [kinds_of(each, self.config["attribute"], self._counts) for each in layers]
        return mixed(blocks[point], layer, kinds[point], mix)

    def _start(self, walk: Walk, rows: Tensor, inputs: Any) -> State:
        return arrived(walk, rows, self._cut.enter(inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        stand: Any = self._standing(state)
        y = stand(state.features, by=self._mixed(state.point, by_choice(action, len(self._counts))))
        return [arrived(state.walk, state.rows, stand.follow(y))]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        stand: Any = self._standing(state)
        y = stand(state.features, by=self._mixed(state.point, by_gates(gates)))
        return arrived(state.walk, state.rows, stand.follow(y))

    def observe(self, state: State) -> Tensor:
        """Return the mean of each channel of the features before the block."""
        return summary(state.features, self._lasts[state.point])

    def ideal(self, inputs: Any, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each number of experts is for neighbouring rows, as many as chose it."""
        sizes = [torch.bincount(chosen, minlength=self.num_choices).tolist() for chosen in route.t()]
        blocks = [self._mixed(point, side_by_side(mine)) for point, mine in enumerate(sizes)]

        def run() -> Any:
            stand: Any = self._cut.enter(inputs)
            for block in blocks:
                stand = stand.follow(stand(stand.x, by=block))
            return stand

        return run


def _always(choice: int, run: Run, x: Tensor) -> Tensor:
    return run(choice, x)
