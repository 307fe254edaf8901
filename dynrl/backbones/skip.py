"""Layer skipping: a residual network whose identity blocks may be left out, row by row (SkipNet, BlockDrop)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dynrl.backbones.base import END, Point, State, Walk
from dynrl.backbones.resnet import ResNet
from dynrl.cost import count_macs
from dynrl.ops.gated_residual import ResidualBlock, gated_residual
from dynrl.ops.pooled import pooled


class GatedResNet(ResNet):
    """A ResNet whose identity blocks are decision points: action 1 runs the block, 0 hands the row through.

    Blocks that change the shape have no identity to fall back on: they always run and are the floor of the cost.
    The state_dict of a torchvision ResNet of the same shape loads unchanged, and the full route is that network.

    Args: those of `ResNet`.
    """

    family = "gated_resnet"
    decision = "skip"

    def __init__(self, *shape: Any, **settings: Any) -> None:
        super().__init__(*shape, **settings)
        self._gated = [i for i, block in enumerate(self._blocks) if block.downsample is None]
        if not self._gated:
            raise ValueError("no block of this network has an identity to fall back on; add blocks to a stage")
        cost, shape_in = count_macs(nn.Sequential(self.conv1, self.bn1, self.maxpool), self.input_shape)
        gate_macs, fixed_macs = [], [cost]
        self.feature_width = 1
        for block in self._blocks:
            macs, shape_out = count_macs(block, shape_in)
            if block.downsample is None:
                gate_macs.append(macs)
                fixed_macs.append(0)
                self.feature_width = max(self.feature_width, shape_in[0])
            else:
                fixed_macs[-1] += macs
            shape_in = shape_out
        fixed_macs[-1] += count_macs(self.fc, (shape_in[0],))[0]
        self.points = tuple(Point(self._names[i], 2) for i in self._gated)
        self.max_steps = len(self.points)
        self.full_route = (1,) * len(self.points)
        self._set_costs(
            fixed_macs[0], [[fixed, gate + fixed] for gate, fixed in zip(gate_macs, fixed_macs[1:], strict=True)]
        )

    def _fixed(self, point: int) -> list[Any]:
        """The blocks between the gated one of `point` (-1: the stem) and the next."""
        ends = [-1, *self._gated, len(self._blocks)]
        return self._blocks[ends[point + 1] + 1 : ends[point + 2]]

    def _lead(self, x: Tensor) -> Tensor:
        """What runs before the first point."""
        x = self._stem(x)
        for block in self._fixed(-1):
            x = block(x)
        return x

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, self._lead(inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        assert state.features is not None
        return [self._go_on(state, gated_residual(state.features, action, self._blocks[self._gated[state.point]]))]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        x, block = state.features, self._blocks[self._gated[state.point]]
        assert x is not None
        keep, run = (gates[:, choice].view(-1, 1, 1, 1) for choice in (0, 1))
        # A folded block overwrites what it is given.
        return self._go_on(state, run * block(x.clone() if isinstance(block, ResidualBlock) else x) + keep * x)

    def _go_on(self, state: State, x: Tensor) -> State:
        """From behind the gated block to the next point or the end."""
        for block in self._fixed(state.point):
            x = block(x)
        if state.point + 1 < len(self.points):
            return State(state.walk, state.point + 1, state.rows, x)
        state.walk.put_output(state.rows, self._head(x))
        return State(state.walk, END, state.rows, None)

    def observe(self, state: State) -> Tensor:
        """Each channel's mean over the map."""
        assert state.features is not None
        return pooled(state.features)

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Each gated block on the first rows of the batch, as many as chose it; see `Backbone.ideal`."""
        counts = (route == 1).sum(0).tolist()

        def run() -> Tensor:
            x = self._lead(inputs)
            for point, count in enumerate(counts):
                if count:
                    self._blocks[self._gated[point]](x[:count])
                for block in self._fixed(point):
                    x = block(x)
            return self._head(x)

        return run
