"""With early exits, a residual network may stop at classifiers on its way (BranchyNet, MSDNet)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynrl.backbones.base import Answer, Backbone
from dynrl.backbones.early import EXIT_SCORES, SCORES, early_classifier, early_inputs
from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.resnet import ResNet
from dynrl.backbones.walk import END, GO_ON, STOP, Point, State, Walk
from dynrl.cost import count_macs
from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.move import each, keep_rows, take_rows
from dynrl.ops.pooled import summary
from dynrl.schema import check_one_of

SEES = ("scores+features", "scores")


class Exits(Backbone):
    """This is the base class of networks with exits: at each exit, action 0 stops with its answer, 1 goes on.

    A row pays for the stage before an exit and for the exit's classifier when it arrives there. The last exit is the
    network's own output. A row that arrives there is done, so K exits have K - 1 decision points. A family writes the
    stages and the exits. Its features are a tensor, or a tuple of tensors that move together.
    """

    decision, stops = "exit", STOP
    scores: ClassVar = EXIT_SCORES
    rule = "threshold"
    speaks = True
    exports = True
    captures: ClassVar[tuple[str, ...]] = ("pieces",)

    def _advance_to(self, k: int, x: Any) -> Any:
        """Run the stage from exit k - 1 (or the inputs) to exit k."""
        raise NotImplementedError

    def _exit(self, k: int, x: Any) -> Tensor:
        """Return the output of the classifier of exit k: [n, classes]."""
        raise NotImplementedError

    def _set_points(self, names: list[str], stage_macs: list[int], widths: list[int], sees: str) -> None:
        """Pose a point at each exit.

        Args:
            names: the names of the points.
            stage_macs: the MACs of each stage with its classifier; there is one more stage than points.
            widths: the number of channels at each exit.
            sees: what a policy is shown at an exit, one of `SEES`: how sure it is, and each channel's mean; or how sure
                it is alone, by which a policy cannot know the inputs by heart that it learns on, where these are few.

        Raises:
            ValueError: `sees` is something else.
        """
        check_one_of("sees", sees, SEES)
        if sees != SEES[0]:
            self.config["sees"] = sees
        self._pose(
            [Point(name, 2) for name in names],
            costs=[[0, macs] for macs in stage_macs[1:]],
            start_macs=stage_macs[0],
            full_route=(GO_ON,) * len(names),
            feature_width=SCORES + (max(widths) if sees == SEES[0] else 0),
        )

    def _arrive(self, walk: Walk, k: int, rows: Tensor, x: Any) -> State:
        """Run the stage before exit k, and keep the exit's answer as the rows' output."""
        x = self._advance_to(k, x)
        walk.put_output(rows, self._exit(k, x))
        return State(walk, k, rows, x) if k < len(self.points) else State(walk, END, rows)

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return self._arrive(walk, 0, rows, inputs)

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, rows, x = state.walk, state.rows, state.features
        ended, going, reached = keep_rows(action == STOP, rows), keep_rows(action == GO_ON, rows, x), []
        if ended is not None:
            reached.append(State(walk, END, ended[0]))
        if going is not None:
            reached.append(self._arrive(walk, state.point + 1, *going))
        return reached

    def _run_rows(self, state: State, index: Tensor) -> State:
        x = each(lambda part: take_rows(part, index), state.features)
        return self._arrive(state.walk, state.point + 1, state.rows.index_select(0, index), x)

    def _gated_run(self, state: State, gates: Tensor) -> State:
        assert isinstance(state.walk, GatedWalk)
        state.walk.leave(gates, STOP)
        return self._arrive(state.walk, state.point + 1, state.rows, state.features)

    def observe(self, state: State) -> Tensor:
        """Return how sure the exit is (`exit_scores`), then each channel's mean over all places if that is seen."""
        sure = exit_scores(self.output(state))
        return sure if "sees" in self.config else torch.cat([sure, self._summary(state.point, state.features)], 1)

    def _summary(self, k: int, x: Any) -> Tensor:
        """Return each channel's mean over the features `x` that rows have at exit k."""
        return summary(x)

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield all exits of one pass, weighted equally (Huang et al. 2018, section 4); without a rate, the last."""
        x: Any = inputs
        answers, rows = [], torch.arange(len(inputs), device=inputs.device)
        for k in range(len(self.points) + 1):
            x = self._advance_to(k, x)
            if rate is not None or k == len(self.points):
                answers.append(Answer(self._exit(k, x), rows))
        yield answers

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each stage and its exit run on the first rows of the batch, as many as arrive."""
        counts = [len(route), *(route == GO_ON).sum(0).tolist()]

        def run() -> None:
            x: Any = inputs
            for k, count in enumerate(counts):
                if count:
                    x = self._advance_to(k, each(lambda part: part[:count], x))  # noqa: B023 (runs now)
                    self._exit(k, x)

        return run


class ExitResNet(Exits, ResNet):
    """A ResNet with classifiers between its blocks.

    An early classifier is one linear layer on the maps reduced to 4x4 (`early_classifier`).

    Args:
        shape, settings: the arguments of `ResNet`.
        exits: the blocks, counted from 0, behind which there is an exit; the last exit is always there.
        sees: what a policy is shown at an exit: "scores+features", how sure it is and the mean of each channel, or
            "scores" alone.
    """

    family = "exit_resnet"

    def __init__(
        self, *shape: Any, exits: tuple[int, ...] = (1, 3, 5, 7, 9), sees: str = SEES[0], **settings: Any
    ) -> None:
        super().__init__(*shape, **settings)
        last = len(self._blocks) - 1
        if not exits or list(exits) != sorted(set(exits)) or not 0 <= exits[0] <= exits[-1] < last:
            raise ValueError(
                f"expected rising exits in 0..{last - 1}, behind blocks before the last of {last + 1}, got "
                f"exits={tuple(exits)}; name others, or give the network more layers"
            )
        self.config["exits"] = list(exits)
        cost, size = count_macs(nn.Sequential(self.conv1, self.bn1, self.maxpool), self.input_shape)
        self._ends = [0, *(i + 1 for i in exits), last + 1]
        self.heads, stage_macs, widths = nn.ModuleList(), [], []
        for k in range(len(exits) + 1):
            for block in self._stage(k):
                macs, size = count_macs(block, size)
                cost += macs
            if k < len(exits):
                head = early_classifier(size, self.config["classes"])
                self.heads.append(head)
                widths.append(size[0])
                cost += count_macs(head, (head.in_features,))[0]
            else:
                cost += count_macs(self.fc, (size[0],))[0]
            stage_macs.append(cost)
            cost = 0
        self._set_points([f"exit{i}" for i in exits], stage_macs, widths, sees)

    @property
    def whole_macs(self) -> int:
        """The MACs of `whole` for one row: no early classifier runs."""
        heads: list[nn.Linear] = list(self.heads)  # type: ignore[arg-type]
        return self.dense_macs - sum(head.weight.numel() for head in heads)

    def _stage(self, k: int) -> list[Any]:
        """Return the blocks between exit k - 1 (or the stem) and exit k."""
        return self._blocks[self._ends[k] : self._ends[k + 1]]

    def _exit(self, k: int, x: Tensor) -> Tensor:
        return self._head(x) if k == len(self.heads) else self.heads[k](early_inputs(x))

    def _advance_to(self, k: int, x: Tensor) -> Tensor:
        if k == 0:
            x = self._stem(x)
        for block in self._stage(k):
            x = block(x)
        return x
