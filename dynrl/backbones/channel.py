"""Each row chooses how wide the blocks of a residual network are inside (RNP, slimmable networks)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.resnet import Block, ResNet
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.ops.move import take_rows
from dynrl.ops.partition import partition
from dynrl.ops.pooled import pooled_keeping
from dynrl.ops.sliced_conv import SlicedBlock, sliced_conv

# In training mode, groups of fewer rows are normalised by the running statistics and not counted in them. The mean and
# variance of one or two rows say little, but would have a weight of a tenth in the running statistics.
LEAST_ROWS = 8


class SlimmableBlock(Block):
    """A slimmable block is a residual block of several widths: choice c uses the first widths[c] inner channels.

    All widths share the weights, under the block's names; each width has its own batch norms.

    Args:
        block: a block whose shortcut is an identity, not a projection.
        shares: the shares of the inner channels, one for each choice.

    Source: slimmable networks (Yu et al. 2019, ICLR, sections 3.1 and 3.2).
    """

    expansion = 1

    def __init__(self, block: Block, shares: tuple[float, ...]) -> None:
        block.check_plain()
        layers = block.layers()
        inner, outer = layers[0][0].out_channels, layers[-1][0].out_channels
        super().__init__(outer, outer, stride=1)
        self.widths = tuple(round(share * inner) for share in shares)
        rising = all(narrow < wide for narrow, wide in pairwise((0, *self.widths)))
        if len(shares) < 2 or not rising or self.widths[-1] != inner:
            raise ValueError(
                f"expected two shares or more, each of more of the {inner} inner channels, the last of all; got "
                f"{tuple(shares)}: {self.widths} channels"
            )
        for i, (convolution, _) in enumerate(layers, start=1):
            self.add_module(f"conv{i}", convolution)
            channels = self.widths if i < len(layers) else (outer,) * len(shares)
            self.add_module(f"bn{i}", nn.ModuleList(nn.BatchNorm2d(count) for count in channels))

    def weights(self, choice: int) -> list[Tensor]:
        """Return the slices of the convolutions' weights at the width of `choice`."""
        width, layers = self.widths[choice], self.layers()
        first, last = 0, len(layers) - 1
        return [
            layer.weight[: None if i == last else width, : None if i == first else width]
            for i, (layer, _) in enumerate(layers)
        ]

    def sliced(self, x: Tensor, choice: int) -> Tensor:
        """Run the block at one width, [n, C, H, W] to [n, C, H, W]."""
        y = x
        for (layer, norms), weight in zip(self.layers(), self.weights(choice), strict=True):
            y = F.conv2d(y if y is x else F.relu(y, inplace=True), weight, padding=layer.padding)
            y = normalised(y, norms[choice])  # type: ignore[index]
        return F.relu(x + y, inplace=True)

    def narrow(self, choice: int) -> Callable[[Tensor], Tensor]:
        """Return the block at one width, as a function of rows."""
        return partial(self.sliced, choice=choice)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block at its full width."""
        return self.sliced(x, len(self.widths) - 1)

    def mixed(self, x: Tensor, choice: Tensor) -> Tensor:
        """Run each row of `x` [n, C, H, W] at the width of its own `choice` [n]; differentiable."""
        parts = partition(choice, len(self.widths))
        if max(parts.sizes) == len(x):  # all rows chose the same width
            return self.sliced(x, parts.sizes.index(len(x)))
        groups = take_rows(x, parts.order).split(parts.sizes)
        # All groups are moved at once, there and back, because one copy a group makes training much slower.
        done = torch.cat([self.sliced(rows, c) for c, rows in enumerate(groups) if len(rows)])
        return take_rows(done, parts.order.argsort())

    def folded(self) -> SlicedBlock:
        """Return a frozen copy for inference."""
        convolutions, norms = zip(*self.layers(), strict=True)
        return SlicedBlock(convolutions, norms, self.widths)


def normalised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Return `norm(x)`, by the running statistics if there are few rows."""
    if norm.training and len(x) < LEAST_ROWS:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)


class SlimmableResNet(ResNet):
    """A ResNet whose identity blocks are decision points: action c computes the share shares[c] of inner channels.

    The features between blocks keep their full width, so rows of different choices continue together. Blocks that
    change the shape always run whole; no route costs less than they do.

    Args:
        input_shape: (channels, height, width) of one image.
        shares: the shares of a block's inner channels, one for each choice, rising to 1.
        network: the other arguments of `ResNet`.
    """

    family = "slimmable_resnet"
    decision = "channel"
    captures: ClassVar[tuple[str, ...]] = ("kernels", "select")

    def __init__(
        self, input_shape: tuple[int, int, int], shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0), **network: Any
    ) -> None:
        super().__init__(input_shape, **network)
        self.config = {**self.config, "shares": list(shares)}
        shapes, block_macs, fixed_macs = self._identities()
        costs = []
        for i, macs, fixed in zip(self._skippable, block_macs, fixed_macs[1:], strict=True):
            block = self._blocks[i] = SlimmableBlock(self._blocks[i], tuple(shares))
            self.set_submodule(self._names[i], block)
            sizes = [sum(weight.numel() for weight in block.weights(c)) for c in range(len(shares))]
            costs.append([fixed + macs * size // sizes[-1] for size in sizes])
        self._pose(
            [Point(self._names[i], len(shares)) for i in self._skippable],
            costs=costs,
            start_macs=fixed_macs[0],
            full_route=(len(shares) - 1,) * len(shapes),
            feature_width=max(shape[0] for shape in shapes),
        )

    def _renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `state` with, for each width, a slice of the full width's batch norm, from which training begins."""
        own, renamed = self.state_dict(), {}
        for name, value in state.items():
            layer, _, part = name.rpartition(".")
            copies = [key for key in own if key.startswith(f"{layer}.") and key.endswith(f".{part}")]
            for key in copies if name not in own else [name]:
                renamed[key] = value[: len(own[key])] if value.dim() else value
            if not copies:
                renamed[name] = value
        return renamed

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, self._between(-1, inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        x, block = self._standing(state)
        if not isinstance(block, SlicedBlock):
            return [self._go_on(state, block.mixed(x, action))]
        return [self._go_on(state, sliced_conv(x, action, block, state.held))]

    def _go_on(self, state: State, x: Tensor) -> State:
        """Go on from behind a block; what is known of the sums of `x` comes along if nothing runs up to the next."""
        y = self._between(state.point, x)
        if state.point + 1 < len(self.points):
            return State(state.walk, state.point + 1, state.rows, y, state.held if y is x else None)
        state.walk.put_output(state.rows, y)
        return State(state.walk, END, state.rows)

    def _gated_run(self, state: State, gates: Tensor) -> State:
        x, block = self._standing(state)
        weighted = [gate.view(-1, 1, 1, 1) * block.sliced(x, choice) for choice, gate in enumerate(gates.unbind(1))]
        return self._go_on(state, torch.stack(weighted).sum(0))

    def observe(self, state: State) -> Tensor:
        """Return the mean of each channel."""
        means, state.held = pooled_keeping(state.features, state.held)
        return means

    def _standing(self, state: State) -> tuple[Tensor, SlimmableBlock | SlicedBlock]:
        """Return the features of a state and the block that comes next."""
        return state.features, self._blocks[self._skippable[state.point]]

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each block runs at each width on neighbouring rows, as many as chose that width."""
        parts = []
        for column in route.unbind(1):
            ends = [0, *accumulate((column == choice).sum().item() for choice in range(self.num_choices))]
            parts.append([(c, start, end) for c, (start, end) in enumerate(pairwise(ends)) if start < end])

        def run() -> Tensor:
            walk = Walk(inputs, self.points, self.mac_table)
            state = self._start(walk, walk.all_rows, inputs)
            for part in parts:
                x, block = self._standing(state)
                for choice, start, end in part:
                    block.narrow(choice)(x[start:end])
                state = self._go_on(state, x)
            assert walk.outputs is not None
            return walk.outputs

        return run
