"""The layers of a user's module get exits, which may answer early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting

from dynrl.backbones.base import Answer
from dynrl.backbones.channels import gives_channels_last
from dynrl.backbones.early import early_inputs
from dynrl.backbones.exit import SEES, Exits
from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.module import Channels, OfModule, Standing, arrived
from dynrl.backbones.traced import Traced, TracedStand
from dynrl.backbones.walk import END, GO_ON, STOP, State, Walk
from dynrl.cost import Executed, executed, macs_of
from dynrl.ops.move import keep_rows, replace_some, take_rows
from dynrl.ops.pooled import summary


class ExitModule(OfModule, Exits):
    """A module of your own with classifiers behind some of its layers: action 0 stops with an answer, 1 goes on.

    An early classifier is one linear layer on images' maps reduced to 4x4, or on each channel's mean of other features.
    The classifiers are made here and are untrained; `dynrl.pretraining.pretrain` trains all exits together. The last
    exit is the module's own output.

    Args:
        module: a module with outputs [B, classes]; see `SkipModule`.
        input_shape: the shape of one input, or examples; see `SkipModule`.
        layers: the names (as in `module.named_modules()`), in running order, of layers that everything the module
            computes goes through; there is an exit behind each.
        family, classes, channels, input_dtype: the same as in `SkipModule`.
        sees: see `ExitResNet`.

    Raises:
        ValueError: the outputs are no classes, or a reason of `SkipModule`.
    """

    family = "exit_module"

    def __init__(
        self,
        module: nn.Module,
        input_shape: Any,
        layers: Sequence[str],
        family: str | None = None,
        classes: int | None = None,
        channels: Channels | None = None,
        input_dtype: Any = None,
        sees: str = SEES[0],
    ) -> None:
        super().__init__(module, input_shape, layers, family, channels, input_dtype, leaving=True, layers=list(layers))
        with torch.no_grad():
            said = self._cut.output(self._example(1))
        if said.dim() != 2:
            raise ValueError(f"expected a module with outputs [batch, classes] for exits, got {tuple(said.shape)}")
        self._set_classes(said, classes)
        self.heads, stage_macs, widths, self._lasts = nn.ModuleList(), [], [], list[bool]()
        self._shapes = list[torch.Size]()
        stand: Any
        before, stand = executed(lambda: self._cut.enter(self._example(1)))
        for k in range(len(layers)):
            ops, x = executed(stand.part)
            stage: list[Executed] = [*before, *ops]
            macs = macs_of(stage)
            self._lasts.append(self._last(k, gives_channels_last(stage, x.shape)))
            seen = early_inputs(x.detach(), self._lasts[k])
            self.heads.append(nn.Linear(seen.shape[1], self.config["classes"], device=x.device, dtype=x.dtype))
            widths.append(summary(x, self._lasts[k]).shape[1])
            self._shapes.append(x.shape[1:])
            ops, _ = executed(lambda: self.heads[k](seen))  # noqa: B023 (called at once)
            stage_macs.append(macs + macs_of(ops))
            before, stand = executed(lambda: stand.follow(x))  # noqa: B023
        stage_macs.append(macs_of(before))
        self._set_points(list(layers), stage_macs, widths, sees)
        self._check_routes()

    def _exit(self, k: int, x: Tensor) -> Tensor:
        return self.heads[k](early_inputs(x, self._lasts[k]))

    def _summary(self, k: int, x: Tensor) -> Tensor:
        return summary(x, self._lasts[k])

    def _reach(self, walk: Walk, rows: Tensor, stand: Standing | Tensor) -> State:
        """Run the part that `stand` is before, whose state has the features behind it, and keep the exit's answer."""
        if isinstance(stand, Tensor):
            return arrived(walk, rows, stand)
        x = stand.part()
        walk.put_output(rows, self._exit(stand.k, x))
        return State(walk, stand.k, rows, x, stand)

    def _start(self, walk: Walk, rows: Tensor, inputs: Any) -> State:
        return self._reach(walk, rows, self._cut.enter(inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        if is_exporting():
            return self._exported_run(state, action)
        walk, rows, reached = state.walk, state.rows, []
        ended, places = keep_rows(action == STOP, rows), None
        if ended is not None:
            reached.append(State(walk, END, ended[0]))
            places = torch.arange(rows.shape[0], device=rows.device)
        if ended is None or ended[0] is not rows:
            x = state.features
            if places is not None:
                going = keep_rows(action == GO_ON, rows, x, places)
                assert going is not None, "some rows go on if not all of them stop"
                rows, x, places = going
            reached.append(self._reach(walk, rows, self._standing(state).follow(x, places)))
        elif state.held is not None:
            state.held.end()
        return reached

    def _run_rows(self, state: State, index: Tensor) -> State:
        stand: Any = self._standing(state)
        x, rows = take_rows(state.features, index), state.rows.index_select(0, index)
        return self._reach(state.walk, rows, stand.follow(x, index))

    def _exported_run(self, state: State, action: Tensor) -> list[State]:
        """Do `_run` in a program that is exported. Such a state holds the features of all slots, too."""
        walk, k = state.walk, state.point
        whole: Tensor = state.features if state.together else state.held
        stopped, going = keep_rows(action == STOP, state.rows), keep_rows(action == GO_ON, state.rows)
        assert stopped is not None and going is not None and isinstance(self._cut, Traced)
        (rows,), cut, size = going, self._cut, (walk.all_rows.shape[0],)

        def stage(x: Tensor) -> list[Tensor]:
            reached = TracedStand(cut, k, x).follow(x)
            if isinstance(reached, Tensor):
                return [reached]
            y = reached.part()
            return [self._exit(k + 1, y), y]

        classes = whole.new_zeros(*size, self.config["classes"])
        more = [whole.new_zeros(*size, *self._shapes[k + 1])] if k + 1 < len(self.points) else []
        run = torch.zeros_like(walk.all_rows, dtype=torch.bool).index_fill(0, rows, True)
        said, *features = replace_some(run, stage, whole, classes, *more)
        walk.put_output(rows, said.index_select(0, rows))
        on = [State(walk, k + 1, rows, x.index_select(0, rows), x) for x in features] or [State(walk, END, rows)]
        return [State(walk, END, stopped[0]), *on]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        assert isinstance(state.walk, GatedWalk)
        state.walk.leave(gates, STOP)
        return self._reach(state.walk, state.rows, self._standing(state).follow(state.features))

    def training_outputs(
        self, inputs: Any, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield all exits of one pass, weighted equally (Huang et al. 2018, section 4); without a rate, the last."""
        stand: Standing | Tensor = self._cut.enter(inputs)
        answers, rows = [], torch.arange(len(inputs), device=inputs.device)
        while not isinstance(stand, Tensor):
            x = stand.part()
            if rate is not None:
                answers.append(Answer(self._exit(stand.k, x), rows))
            # What follows may write in place, into what the exit needs for its gradients.
            stand = stand.follow(x.clone() if torch.is_grad_enabled() else x)
        yield [*answers, Answer(stand, rows)]

    def ideal(self, inputs: Any, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each stage and its exit run on the first rows of the batch, as many as arrive."""
        counts = (route == GO_ON).sum(0).tolist()

        def run() -> Any:
            stand: Any = self._cut.enter(inputs)
            for count in counts:
                x = stand.part()
                self._exit(stand.k, x)
                if not count:
                    return stand.end()
                stand = stand.follow(x[:count], torch.arange(count, device=x.device))
            return stand

        return run
