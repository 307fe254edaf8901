"""In layer skipping, each row may leave out identity blocks of a residual network (SkipNet, BlockDrop)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynrl.backbones.base import Answer, Backbone
from dynrl.backbones.early import SCORES, early_classifier, early_inputs, seen_early
from dynrl.backbones.resnet import ResNet
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.cost import count_macs
from dynrl.ops.gated_residual import gated_residual, run_rows
from dynrl.ops.move import beside, each
from dynrl.ops.pooled import pooled_keeping, summary

SHALLOW = 0.5  # the share of pretraining's random routes that run their first blocks only
EARLY = 3.0  # the weight of answers that skip all that follows, of all points together, where that of whole walks is 1
TAIL = 0.02  # such answers are given where what runs all the same costs at most this share of the dense network


class Skipping(Backbone):
    """This is the base class of networks with skippable blocks: action 1 runs a block, 0 passes the row through.

    A family writes what runs before the first such block, which blocks these are, and what runs behind each. If its
    features are a tuple, so is what its blocks take and return, and it runs them on some of the rows itself.
    """

    decision = "skip"
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

    def draw(self, rate: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw routes as `Backbone.draw` does, but let some of them run their first blocks only, as many as were drawn.

        A policy that has seen enough skips all that follows. Independent choices hardly ever do.
        """
        route = super().draw(rate, generator)
        first = torch.arange(self.columns) < route.sum(1, keepdim=True)
        shallow = torch.rand(len(route), 1, generator=generator) < SHALLOW
        return torch.where(shallow, first.long(), route)

    def run_training(self, inputs: Tensor, choose: Callable[[State], Tensor]) -> tuple[Walk, list[Answer]]:
        """Do `Backbone.run_training`, with answers that rows at a point would give if they skipped all that follows.

        So one walk trains many depths, by the network's own end, as in LayerSkip (Elhoushi et al. 2024, ACL, section
        4.1). Where more than that end runs behind a point all the same, as a later stage's first block, none is given.
        """
        early: list[Answer] = []

        def listen(state: State) -> Tensor:
            if self._early[state.point]:
                early.append(Answer(self._skipping_on(state), state.rows, EARLY / len(self.points)))
            return choose(state)

        walk, answers = super().run_training(inputs, listen)
        return walk, [*answers, *early]

    def _skipping_on(self, state: State) -> Tensor:
        """Return the output of rows that skip everything from here on; nothing is recorded, and the state stays."""
        # A module of a user may write to what it is given.
        rest = State(copy.copy(state.walk), state.point, state.rows, each(Tensor.clone, state.features))
        while rest.point != END:
            rest = self._run_rest(rest)
        return rest.get(rest.walk.outputs)

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


class SkipResNet(Skipping, ResNet):
    """A ResNet whose identity blocks are decision points.

    Blocks that change the shape have no identity to fall back on. They always run, and no route costs less than they
    do. The state_dict of a torchvision ResNet of the same shape loads unchanged, and the full route is that network.

    Args:
        shape, settings: the arguments of `ResNet`.
        auxiliary: whether there is an early classifier in front of each decision point, for the router to see how sure
            it is. It is trained with the network, and every row pays for it.
    """

    family = "skip_resnet"
    captures: ClassVar[tuple[str, ...]] = ("kernels", "select", "pieces")

    def __init__(self, *shape: Any, auxiliary: bool = False, **settings: Any) -> None:
        super().__init__(*shape, **settings)
        self.config["auxiliary"] = auxiliary
        shapes, block_macs, fixed_macs = self._identities()
        self.heads = nn.ModuleList(early_classifier(shape, self.config["classes"]) for shape in shapes if auxiliary)
        for k, head in enumerate(self.heads):
            fixed_macs[k] += count_macs(head, (head.in_features,))[0]  # type: ignore[arg-type]
        width = max(shape[0] for shape in shapes)
        self._set_points([self._names[i] for i in self._skippable], block_macs, fixed_macs, width + SCORES * auxiliary)

    def _lead(self, inputs: Tensor) -> Tensor:
        return self._between(-1, inputs)

    def _block(self, point: int) -> Callable[[Tensor], Tensor]:
        return self._blocks[self._skippable[point]]

    def _follow(self, point: int, x: Tensor) -> Tensor:
        return self._between(point, x)

    def _run(self, state: State, action: Tensor) -> list[State]:
        return [self._passed(state, gated_residual(state.features, action, self._block(state.point), state.held))]

    def _passed(self, state: State, x: Tensor) -> State:
        """Go on from behind the block of a state; the sums of `x` come along if nothing runs up to the next point."""
        reached = self._go_on(state, x)
        if reached.features is x:
            reached.held = state.held
        return reached

    def auxiliary(self, state: State) -> Tensor | None:
        """Return what the early classifier in front of the state's point says, [n, classes], if there is one."""
        return self.heads[state.point](early_inputs(state.features)) if len(self.heads) else None

    def observe(self, state: State) -> Tensor:
        """Return the mean of each channel; if there are auxiliary classifiers, how sure one is comes before."""
        if not len(self.heads):
            features, state.held = pooled_keeping(state.features, state.held)
            return features
        head = self.heads[state.point]
        assert isinstance(head, nn.Linear)
        return seen_early(state.features, head)
