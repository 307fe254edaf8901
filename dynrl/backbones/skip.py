"""In layer skipping, each row may leave out identity blocks of a residual network (SkipNet, BlockDrop)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from dynrl.backbones.base import Backbone
from dynrl.backbones.early import EXIT_SCORES, SCORES, SeenEnd
from dynrl.backbones.resnet import ResNet
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.ops.gated_residual import gated_residual, run_rows
from dynrl.ops.move import beside, each
from dynrl.ops.pooled import pooled_keeping, summary

TAIL = 0.02  # rows may skip to the end where what runs all the same costs at most this share of the dense network


class Skipping(Backbone):
    """This is the base class of networks with skippable blocks: action 1 runs a block, 0 passes the row through.

    A family writes what runs before the first such block, which blocks these are, and what runs behind each. If its
    features are a tuple, so is what its blocks take and return, and it runs them on some of the rows itself.
    """

    decision = "skip"
    auxiliary_weight = 3.0  # with less, such answers are worse; with more, those of the full route are
    exports = True
    captures: ClassVar[tuple[str, ...]] = ("select", "pieces")

    def _lead(self, inputs: Tensor) -> Any:
        """Run what comes before the first point."""
        raise NotImplementedError

    def _block(self, point: int) -> Callable[[Any], Any]:
        """Return the block that the choice at `point` runs or skips."""
        raise NotImplementedError

    def _follow(self, point: int, x: Any) -> Any:
        """Run what comes behind the block of `point`, up to the next point or to the output."""
        raise NotImplementedError

    def _set_points(self, names: list[str], block_macs: list[int], fixed_macs: list[int], width: int) -> None:
        """Pose a point for each block.

        Args:
            names: the names of the points.
            block_macs: the MACs of each block.
            fixed_macs: the MACs before the first block and behind each block, one more than blocks.
            width: the most numbers that `observe` shows.
        """
        behind = zip(block_macs, fixed_macs[1:], strict=True)
        self._pose(
            [Point(name, 2) for name in names],
            costs=[[fixed, macs + fixed] for macs, fixed in behind],
            start_macs=fixed_macs[0],
            full_route=(1,) * len(names),
            feature_width=width,
        )
        self._early = [sum(fixed_macs[point + 1 :]) <= TAIL * self.dense_macs for point in range(len(names))]

    def auxiliary(self, state: State) -> Tensor | None:
        """Return the output of rows that skip all that follows; None where a later stage's first block runs for them.

        So one walk trains many depths, by the network's own end, as in LayerSkip (Elhoushi et al. 2024, ACL, section
        4.1). Nothing is recorded, and the state stays as it is.
        """
        if not self._early[state.point]:
            return None
        # A module of a user may write to what it is given.
        rest = State(copy.copy(state.walk), state.point, state.rows, each(Tensor.clone, state.features))
        while rest.point != END:
            rest = self._run_rest(rest)
        said: Tensor = rest.get(rest.walk.outputs)
        return said

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, self._lead(inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        return [self._go_on(state, gated_residual(state.features, action, self._block(state.point)))]

    def _run_block(self, state: State, index: Tensor) -> Tensor:
        return run_rows(state.features, index, self._block(state.point))

    def _run_rest(self, state: State) -> State:
        return self._go_on(state, state.features)

    def _gated_run(self, state: State, gates: Tensor) -> State:
        def mixed(done: Tensor, x: Tensor) -> Tensor:
            skip, run = (beside(gates[:, choice], x) for choice in (0, 1))
            return run * done + skip * x

        # A block may overwrite its input, so it gets a copy.
        done = self._block(state.point)(each(Tensor.clone, state.features))
        return self._go_on(state, each(mixed, done, state.features))

    def _go_on(self, state: State, x: Any) -> State:
        x = self._follow(state.point, x)
        if state.point + 1 < len(self.points):
            return State(state.walk, state.point + 1, state.rows, x)
        state.walk.put_output(state.rows, x)
        return State(state.walk, END, state.rows)

    def observe(self, state: State) -> Tensor:
        """Return the mean of each channel over all places, such as pixels or tokens."""
        return self._summary(state.point, state.features)

    def _summary(self, point: int, x: Any) -> Tensor:
        """Return each channel's mean over the features `x` that rows have at `point`."""
        return summary(x)

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each block runs on the first rows of the batch, as many as chose to run it."""
        counts = (route == 1).sum(0).tolist()

        def run() -> Tensor:
            x = self._lead(inputs)
            for point, count in enumerate(counts):
                if count:
                    self._block(point)(each(lambda part: part[:count], x))  # noqa: B023 (runs now)
                x = self._follow(point, x)
            return x

        return run


class SkipResNet(SeenEnd, Skipping, ResNet):
    """A ResNet whose identity blocks are decision points.

    Blocks that change the shape have no identity to fall back on. They always run, and no route costs less than they
    do. The state_dict of a torchvision ResNet of the same shape loads unchanged, and the full route is that network.

    In the last stage, the router sees how sure the last layer is of a row that skips all that follows. By the rule of
    thumb, rows skip where it is sure enough.

    Args:
        shape, settings: the arguments of `ResNet`.
    """

    family = "skip_resnet"
    scores: ClassVar = EXIT_SCORES
    rule = "threshold"
    captures: ClassVar[tuple[str, ...]] = ("kernels", "select", "pieces")

    def __init__(self, *shape: Any, **settings: Any) -> None:
        super().__init__(*shape, **settings)
        shapes, block_macs, fixed_macs = self._identities()
        names, width = [self._names[i] for i in self._skippable], max(shape[0] for shape in shapes)
        self._set_points(names, block_macs, self._see_end(fixed_macs), SCORES + width)

    def _lead(self, inputs: Tensor) -> Tensor:
        return self._between(-1, inputs)

    def _block(self, point: int) -> Callable[[Tensor], Tensor]:
        return self._blocks[self._skippable[point]]

    def _follow(self, point: int, x: Tensor) -> Tensor:
        return self._between(point, x)

    def _run(self, state: State, action: Tensor) -> list[State]:
        x = gated_residual(state.features, action, self._block(state.point), state.held)
        reached = self._go_on(state, x)
        if reached.features is x:  # nothing runs up to the next point, so what is known of the sums of x comes along
            reached.held = state.held
        return [reached]

    def observe(self, state: State) -> Tensor:
        """Return how sure the last layer is (`_with_end`), and then the mean of each channel."""
        means, state.held = pooled_keeping(state.features, state.held)
        return self._with_end(state.point, means)
