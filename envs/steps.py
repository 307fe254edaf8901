"""On a CUDA device, an environment records what a step launches, and replays it without Python in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dynrl.backbones import END, Backbone, CostTable, State
from dynrl.backbones.pieces import Pieces
from dynrl.ops.recorder import Recorder, Replay, recorder_for, records

See = Callable[[State, Tensor], Tensor]


class Steps:
    """These steps are those of a batch whose rows all stand at one point, as in a chain of blocks that are skipped.

    Args:
        backbone: a network that can be recorded in pieces, whose rows end together.
        inputs: a batch of inputs; only its size and type count.
        recorder: what records.
        see: a function from a state and the prices [B] to observations [B, width].
        table: the cost table of the walk; None charges MACs.

    Attributes:
        walk: the walk, whose records stay where they are.
    """

    def __init__(
        self, backbone: Backbone, inputs: Tensor, recorder: Recorder, see: See, table: CostTable | None
    ) -> None:
        self._inputs, self._recorder = torch.zeros_like(inputs), recorder
        self._prices = torch.zeros(len(inputs), dtype=torch.float32, device=inputs.device)
        self._actions = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        self._seen: Tensor | None = None
        self._decisions = dict[int, Replay]()

        def arrived(_: Pieces, state: State) -> None:
            seen = see(state, self._prices)
            if self._seen is None:
                self._seen = torch.empty_like(seen)
            self._seen.copy_(seen)

        self._pieces = Pieces(backbone, self._inputs, recorder, arrived, table)
        self.walk, self._next = self._pieces.walk, [*range(1, len(backbone.points)), END]
        self._at = END

    def begin(self, inputs: Tensor, prices: Tensor) -> State:
        """Put `inputs` [B, ...] at the first point, at `prices` [B], and return their state."""
        self._inputs.copy_(inputs)
        self._prices.copy_(prices)
        self._pieces.start()
        return self._stand(0)

    def holds(self, state: State) -> bool:
        """Tell whether `state` is where the last replay has led."""
        return state.walk is self.walk and state.together and state.point == self._at

    def advance(self, state: State, action: Tensor) -> State:
        """Do `Backbone.advance` with all rows of the batch, whose `state` `holds`."""
        point, pieces = state.point, self._pieces
        self._actions.copy_(action)
        if point not in self._decisions:
            decide = partial(self._decide, state)
            self._decisions[point] = self._recorder.record(decide, pieces.changing(point))
        self._decisions[point]()
        pieces.go_on(point, pieces.running(point))
        return self._stand(self._next[point])

    def seen(self) -> Tensor:
        """Return what is seen of the state that `holds`: [B, width], a new tensor."""
        assert self._seen is not None
        return self._seen.clone()

    def _decide(self, state: State) -> None:
        with self._recorder.counts():
            self._pieces.decide(state, self._actions)

    def _stand(self, point: int) -> State:
        self._at = point
        return self._pieces.state(point)


def steps_for(backbone: Backbone, inputs: object, see: See, table: CostTable | None) -> Steps | None:
    """Return the steps of a batch like `inputs`; None where nothing can be recorded, which runs as it is."""
    if not records(inputs) or "pieces" not in backbone.captures or backbone.speaks:
        return None
    assert isinstance(inputs, Tensor)
    try:
        return Steps(backbone, inputs, recorder_for(inputs), see, table)
    except Exception as error:  # a user's block may do what cannot be recorded; memory may be short
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"environments run without CUDA graphs: {why}", stacklevel=2)
        return None
