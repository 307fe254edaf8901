"""In a grid of scales, each layer of a network brings a map to a coarser or a finer scale, or keeps it at its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.resnet import BasicBlock, Normed
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.backbones.ways import Ways
from dynrl.cost import count_macs
from dynrl.ops.move import keep_rows
from dynrl.ops.pooled import summary
from dynrl.schema import MOST_ROWS, check_count, check_counts

CHOICES = DOWN, KEEP, UP = 0, 1, 2  # to the next coarser scale, at the same scale, to the next finer one
MOST_SCALES = 8


class Rise(nn.Module):
    """A rise brings maps to the next finer scale: a 1x1 convolution, each cell repeated, then a basic block.

    Args:
        inputs, outputs: the channels of the coarser and of the finer scale.
        size: height and width of the finer scale.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self.narrow, self.block, self.size = Normed(inputs, outputs, 1), BasicBlock(outputs, outputs), size

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, H, W] to [n, outputs, *size]."""
        finer: Tensor = self.block(F.interpolate(self.narrow(x), size=self.size))
        return finer


class ScaleGrid(Ways):
    """A grid of layers and scales: at each layer, action 0 goes to the next coarser scale, 1 stays, 2 goes to the finer.

    A scale has half the height and width of the next finer one. Each layer has a cell for each way: a basic block,
    which has stride 2 on the way down and comes behind a rise on the way up (`Rise`). Rows at one scale are together,
    wherever they come from. Choices that would leave the grid are closed.

    The output is for each pixel. From the scale where a row ends, a 1x1 convolution gives its map's answer, which is
    brought to the size of the image. A 3x3 convolution on the image itself, which knows where edges are, is added.

    The full route stays at the finest scale, where a layer costs most.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs at each pixel.
        layers: the number of layers.
        widths: the channels of each scale, from the finest to the coarsest.
        stem_stride: the stride of the first convolution, behind which is the finest scale.

    Raises:
        ValueError: there are not 2 to 8 scales, no layer, or the coarsest map would have fewer than 2x2 cells.

    Source: Learning Dynamic Routing for Semantic Segmentation (Li et al. 2020, CVPR), where a row takes all ways whose
    gates are not 0, and gates are trained by gradient. Here a row takes one way. The sum of ways is the walk under gates.
    """

    family = "scale_grid"
    opened: Tensor

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 11,
        layers: int = 4,
        widths: tuple[int, ...] = (12, 16, 16),
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        check_counts("widths", widths)
        for name, count in (("classes", classes), ("layers", layers), ("stem_stride", stem_stride)):
            check_count(name, count, 1, MOST_ROWS)
        if len(input_shape) != 3 or not 2 <= len(widths) <= MOST_SCALES:
            raise ValueError(
                f"expected images (channels, height, width) and the widths of 2 to {MOST_SCALES} scales, got inputs of "
                f"{tuple(input_shape)} and {len(widths)} widths"
            )
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "layers": layers, "widths": list(widths),
            "stem_stride": stem_stride,
        }  # fmt: skip
        self.stem = Normed(input_shape[0], widths[0], 3, stem_stride)
        start, size = count_macs(self.stem, self.input_shape)
        sizes = [(width, *(-(-side // 2**scale) for side in size[1:])) for scale, width in enumerate(widths)]
        if min(sizes[-1][1:]) < 2:
            raise ValueError(
                f"expected at least 2x2 cells at the coarsest of {len(widths)} scales, got {sizes[-1][1:]}; take fewer "
                "scales or larger images"
            )
        self._sizes = sizes
        self._stands = [(layer, scale) for layer in range(layers) for scale in range(min(layer + 1, len(widths)))]
        opened = [[0 <= self._goes(scale, choice) < len(widths) for choice in CHOICES] for _, scale in self._stands]
        self.register_buffer("opened", torch.tensor(opened), persistent=False)
        self.cells = nn.ModuleList(
            nn.ModuleList(self._cell(scale, choice) if is_open[choice] else nn.Identity() for choice in CHOICES)
            for (_, scale), is_open in zip(self._stands, opened, strict=True)
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths)
        self.edges = nn.Conv2d(input_shape[0], classes, 3, padding=1, bias=False)
        self._pose(
            [Point(f"layer{layer + 1}.scale{scale}", len(CHOICES)) for layer, scale in self._stands],
            costs=self._count(opened), start_macs=start,
            full_route=[-1 if scale else KEEP for _, scale in self._stands], feature_width=max(widths),
            # A finer scale is dearer in later layers, too.
            thrift=[[choice if is_open[choice] else -1 for choice in CHOICES] for is_open in opened],
            max_steps=layers,
        )  # fmt: skip

    def _goes(self, scale: int, choice: int) -> int:
        """Return the scale that an open choice leads to."""
        return scale + KEEP - choice

    def _cell(self, scale: int, choice: int) -> nn.Module:
        into, out = self._sizes[scale][0], self._sizes[self._goes(scale, choice)]
        return Rise(into, out[0], out[1:]) if choice == UP else BasicBlock(into, out[0], 2 if choice == DOWN else 1)

    def _count(self, opened: list[list[bool]]) -> list[list[int]]:
        """Return the MACs of each choice at each point; a closed one costs what runs in its place."""
        last = count_macs(self.edges, self.input_shape)[0]
        heads = [last + count_macs(*each)[0] for each in zip(self.heads, self._sizes, strict=True)]
        costs = list[list[int]]()
        for (layer, scale), cells, is_open in zip(self._stands, self.cells, opened, strict=True):
            costs.append([])
            for choice in CHOICES:
                run = choice if is_open[choice] else KEEP
                head = heads[self._goes(scale, run)] if self._ends(layer) else 0
                costs[-1].append(head + count_macs(cells[run], self._sizes[scale])[0])  # type: ignore[index]
        return costs

    def _ends(self, layer: int) -> bool:
        return bool(layer + 1 == self.config["layers"])

    def _leads(self, point: int, choice: int) -> tuple[int, int]:
        """Return the point and the scale that an open choice leads to."""
        layer, scale = self._stands[point]
        scale = self._goes(scale, choice)
        return END if self._ends(layer) else self._stands.index((layer + 1, scale)), scale

    def leads_to(self, column: int, choice: int) -> int:
        """Return `Backbone.leads_to`; a closed choice leads where the one leads that runs in its place."""
        return self._leads(column, choice if self.opened[column, choice] else KEEP)[0]

    def open_choices(self, state: State) -> Tensor:
        """Return `Backbone.open_choices`: there is no scale beyond the finest and the coarsest."""
        return self.opened[state.point].expand(state.rows.shape[0], -1)

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return State(walk, 0, rows, self.stem(inputs))

    def _answer(self, scale: int, x: Tensor, images: Tensor) -> Tensor:
        """Return the output [n, classes, height, width] of rows that end at a scale with maps `x`."""
        coarse = F.interpolate(self.heads[scale](x), size=images.shape[2:], mode="bilinear")
        answer: Tensor = coarse + self.edges(images)
        return answer

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, reached = state.walk, list[State]()
        for choice, cell in enumerate(self.cells[state.point]):  # type: ignore[arg-type]
            kept = keep_rows(action == choice, state.rows, state.features)
            if kept is None or isinstance(cell, nn.Identity):
                continue
            (rows, came), (point, scale) = kept, self._leads(state.point, choice)
            on = State(walk, point, rows, cell(came))
            if point == END:
                walk.put_output(rows, self._answer(scale, on.features, on.get(walk.inputs)))
                on.features = None
            reached.append(on)
        return reached

    def _gated_run(self, state: State, gates: Tensor) -> State:
        x, walk, likeliest = state.features, state.walk, gates.argmax(1)
        assert isinstance(walk, GatedWalk)
        came, present = walk.weight, walk.present
        for choice, cell in enumerate(self.cells[state.point]):  # type: ignore[arg-type]
            if isinstance(cell, nn.Identity):
                continue
            point, scale = self._leads(state.point, choice)
            done = cell(x.clone())  # a cell may overwrite its input
            if point == END:
                done = self._answer(scale, done, walk.inputs)
            self._come(walk, point, (done,), came * gates[:, choice], present & (likeliest == choice))
        following = state.point + 1 if state.point + 1 < len(self.points) else END
        (x,) = self._at(walk, following, 1)
        if following == END:
            walk.put_output(state.rows, x)
            x = None
        return State(walk, following, state.rows, x)

    def observe(self, state: State) -> Tensor:
        """Return the mean of each channel of the map at its scale."""
        return summary(state.features)

    def constant_routes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the routes that go straight to one scale and stay there."""
        return [
            (f"scale {goal}", tuple(DOWN if scale < goal else KEEP for _, scale in self._stands))
            for goal in range(min(self.config["layers"] + 1, len(self._sizes)))
        ]

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each cell runs on neighbouring rows of a map that is there already."""
        counts = [[int((column == choice).sum()) for choice in CHOICES] for column in route.t()]
        maps = [
            inputs.new_zeros(sum(sizes), *self._sizes[scale]).contiguous(memory_format=torch.channels_last)
            for sizes, (_, scale) in zip(counts, self._stands, strict=True)
        ]

        def run() -> Tensor:
            self.stem(inputs)
            done, answer = 0, inputs
            for point, sizes in enumerate(counts):
                for choice, rows in zip(CHOICES, maps[point].split(sizes), strict=True):
                    if not len(rows):
                        continue
                    on, scale = self._leads(point, choice)
                    x = self.cells[point][choice](rows)  # type: ignore[index]
                    if on == END:
                        answer = self._answer(scale, x, inputs[done : done + len(rows)])
                        done += len(rows)
            return answer

        return run
