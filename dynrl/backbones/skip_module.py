"""The blocks of a user's module may be skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dynrl.backbones.channels import takes_channels_last
from dynrl.backbones.module import Channels, OfModule, arrived
from dynrl.backbones.skip import Skipping
from dynrl.backbones.walk import State, Walk
from dynrl.cost import executed, macs_of
from dynrl.ops.gated_residual import run_rows
from dynrl.ops.move import beside
from dynrl.ops.pooled import summary


class SkipModule(OfModule, Skipping):
    """A module of your own with blocks that may be skipped: action 1 runs a block, 0 passes the row through.

    Any chain of residual blocks will do: the blocks of a ViT or a language model, or those blocks of a convolutional
    network that keep the shape of their input. The full route is the module itself, with the same weights.

    A block may be given further tensors and may return a tuple: its first argument and the first value are the
    features. Tensors with a row for each input are cut down to the rows that run the block. Further values must be None
    or arguments that the block hands on. Caches are refused.

    Args:
        module: a module that maps a tensor, or tensors by name, to outputs: a tensor [B, ...], a tuple that begins with
            one, or an object with `logits`. It is held, not copied, and put into eval mode.
        input_shape: the shape of one input, or a batch of examples [n, ...]; a dict of either if the module takes
            tensors by name. Of examples, only shapes and the types of integers are kept.
        blocks: the names (as in `module.named_modules()`), in running order, of blocks that keep their input's shape
            and contain their shortcut.
        family: the name under which `FAMILIES` holds a function that builds this backbone from the other arguments
            without `module`, for `load_backbone`; None for a backbone that is never loaded by name.
        classes: the number of outputs; may be left out.
        channels: "first" if features are [n, C, ...], "last" if they are [n, ..., C]. None reads it off the ops that
            compute on them: convolutions have channels first, linear layers and layer norms have them last.
        input_dtype: the type of inputs whose shape is given, by its name in torch, or a dict of these; None is the
            weights' type.

    Raises:
        ValueError: a block changes its input's shape, the module cannot be cut there (see `dynrl.backbones.traced` and
            `dynrl.backbones.held`), it fails on inputs of that form, or no op tells the channels.
    """

    family = "skip_module"

    def __init__(
        self,
        module: nn.Module,
        input_shape: Any,
        blocks: Sequence[str],
        family: str | None = None,
        classes: int | None = None,
        channels: Channels | None = None,
        input_dtype: Any = None,
    ) -> None:
        super().__init__(module, input_shape, blocks, family, channels, input_dtype, blocks=list(blocks))
        block_macs, width, self._lasts = [], 1, list[bool]()
        stand: Any
        ops, stand = executed(lambda: self._cut.enter(self._example(1)))
        fixed_macs = [macs_of(ops)]
        for k, name in enumerate(blocks):
            x = stand.x
            ops, y = executed(lambda: stand(x.clone()))  # noqa: B023 (called at once)
            block_macs.append(macs_of(ops))
            self._lasts.append(self._last(k, takes_channels_last(ops, x.shape)))
            width = max(width, summary(x, self._lasts[-1]).shape[1])
            if y.shape != x.shape:
                shapes = f"{tuple(y.shape)} of {tuple(x.shape)}"
                raise ValueError(
                    f"expected blocks that keep their input's shape; {name!r} makes {shapes}: leave it out"
                )
            ops, stand = executed(lambda: stand.follow(y))  # noqa: B023
            fixed_macs.append(macs_of(ops))
        self._set_classes(stand, classes)
        self._set_points(list(blocks), block_macs, fixed_macs, width)
        self._check_routes()

    def _start(self, walk: Walk, rows: Tensor, inputs: Any) -> State:
        return arrived(walk, rows, self._cut.enter(inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        stand = self._standing(state)
        return [arrived(state.walk, state.rows, stand.follow(stand.through(action)))]

    def _run_block(self, state: State, index: Tensor) -> Tensor:
        stand: Any = self._standing(state)
        return run_rows(stand.x, index, stand)

    def _run_rest(self, state: State) -> State:
        stand: Any = self._standing(state)
        return arrived(state.walk, state.rows, stand.follow(stand.x))

    def _gated_run(self, state: State, gates: Tensor) -> State:
        stand, x = self._standing(state), state.features
        skip, run = (beside(gates[:, choice], x) for choice in (0, 1))
        # A block may overwrite its input, so it gets a copy.
        return arrived(state.walk, state.rows, stand.follow(run * stand(x.clone()) + skip * x))

    def _summary(self, point: int, x: Tensor) -> Tensor:
        return summary(x, self._lasts[point])

    def ideal(self, inputs: Any, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each block runs on the first rows of the batch, as many as chose to run it."""
        counts = (route == 1).sum(0).tolist()

        def run() -> Any:
            stand: Any = self._cut.enter(inputs)
            for count in counts:
                if count:
                    stand.part(slice(count))
                stand = stand.follow(stand.x)
            return stand

        return run
