"""Layer skipping: a residual network whose identity blocks may be left out, row by row (SkipNet, BlockDrop)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dynrl.backbones.base import END, Backbone, Point, State, Walk
from dynrl.backbones.resnet import ResNet
from dynrl.cost import count_macs
from dynrl.ops.gated_residual import gated_residual
from dynrl.ops.pooled import summary


class Skipping(Backbone):
    """What networks of blocks that may be left out share: action 1 runs the block, 0 hands the row through.

    A family says what runs before the first such block, which these are, and what runs behind each.
    """

    decision = "skip"

    def _lead(self, inputs: Tensor) -> Tensor:
        """What runs before the first point."""
        raise NotImplementedError

    def _block(self, point: int) -> Callable[[Tensor], Tensor]:
        """The block of a point."""
        raise NotImplementedError

    def _follow(self, point: int, x: Tensor) -> Tensor:
        """What runs behind the block of `point`, up to the next point or to the output."""
        raise NotImplementedError

    def _set_points(self, names: list[str], gate_macs: list[int], fixed_macs: list[int], width: int) -> None:
        """Pose a point for each block of `names`; `fixed_macs` before the first and behind each."""
        self.points = tuple(Point(name, 2) for name in names)
        self.feature_width, self.max_steps, self.full_route = width, len(names), (1,) * len(names)
        behind = zip(gate_macs, fixed_macs[1:], strict=True)
        self._set_costs(fixed_macs[0], [[fixed, gate + fixed] for gate, fixed in behind])

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, self._lead(inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        assert state.features is not None
        return [self._go_on(state, gated_residual(state.features, action, self._block(state.point)))]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        x = state.features
        assert x is not None
        skip, run = (gates[:, choice].view(-1, *[1] * (x.dim() - 1)) for choice in (0, 1))
        # A block may overwrite what it is given.
        return self._go_on(state, run * self._block(state.point)(x.clone()) + skip * x)

    def _go_on(self, state: State, x: Tensor) -> State:
        x = self._follow(state.point, x)
        if state.point + 1 < len(self.points):
            return State(state.walk, state.point + 1, state.rows, x)
        state.walk.put_output(state.rows, x)
        return State(state.walk, END, state.rows, None)

    def observe(self, state: State) -> Tensor:
        """Each channel's mean over the map, or over the tokens."""
        assert state.features is not None
        return summary(state.features)

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Each gated block on the first rows of the batch, as many as chose it; see `Backbone.ideal`."""
        counts = (route == 1).sum(0).tolist()

        def run() -> Tensor:
            x = self._lead(inputs)
            for point, count in enumerate(counts):
                if count:
                    self._block(point)(x[:count])
                x = self._follow(point, x)
            return x

        return run


class SkipResNet(Skipping, ResNet):
    """A ResNet whose identity blocks are decision points.

    Blocks that change the shape have no identity to fall back on: they always run and are the floor of the cost.
    The state_dict of a torchvision ResNet of the same shape loads unchanged, and the full route is that network.

    Args: those of `ResNet`.
    """

    family = "skip_resnet"

    def __init__(self, *shape: Any, **settings: Any) -> None:
        super().__init__(*shape, **settings)
        self._gated = [i for i, block in enumerate(self._blocks) if block.downsample is None]
        if not self._gated:
            raise ValueError("no block of this network has an identity to fall back on; add blocks to a stage")
        cost, shape_in = count_macs(nn.Sequential(self.conv1, self.bn1, self.maxpool), self.input_shape)
        gate_macs, fixed_macs, width = [], [cost], 1
        for block in self._blocks:
            macs, shape_out = count_macs(block, shape_in)
            if block.downsample is None:
                gate_macs.append(macs)
                fixed_macs.append(0)
                width = max(width, shape_in[0])
            else:
                fixed_macs[-1] += macs
            shape_in = shape_out
        fixed_macs[-1] += count_macs(self.fc, (shape_in[0],))[0]
        self._set_points([self._names[i] for i in self._gated], gate_macs, fixed_macs, width)

    def _fixed(self, point: int) -> list[Any]:
        """The blocks between the gated one of `point` (-1: the stem) and the next."""
        ends = [-1, *self._gated, len(self._blocks)]
        return self._blocks[ends[point + 1] + 1 : ends[point + 2]]

    def _lead(self, inputs: Tensor) -> Tensor:
        x = self._stem(inputs)
        for block in self._fixed(-1):
            x = block(x)
        return x

    def _block(self, point: int) -> Callable[[Tensor], Tensor]:
        return self._blocks[self._gated[point]]

    def _follow(self, point: int, x: Tensor) -> Tensor:
        for block in self._fixed(point):
            x = block(x)
        return x if point + 1 < len(self.points) else self._head(x)
