"""In a grid of scales, each layer of a network brings a map to a coarser or a finer scale, or keeps it at its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.multiscale import MOST_SCALES
from dynrl.backbones.resnet import BasicBlock, Normed
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.backbones.ways import Ways
from dynrl.cost import count_macs
from dynrl.ops.move import keep_rows
from dynrl.ops.pooled import summary
from dynrl.schema import MOST_ROWS, check_count, check_counts

CHOICES = DOWN, KEEP, UP = 0, 1, 2  # to the next coarser scale, at the same scale, to the next finer one


class Step(nn.Module):
    """A step brings maps to a scale, where a basic block runs.

    On the way to a coarser scale, the means of 2x2 cells are taken. On the way to a finer one, each cell is repeated.

    Args:
        width: the number of channels.
        size: height and width of the scale; None if maps are of that scale already.
    """

    def __init__(self, width: int, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.size, self.block = size, BasicBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, width, H, W] to [n, width, *size]."""
        if self.size is not None:
            coarser = self.size[0] < x.shape[2] or self.size[1] < x.shape[3]
            x = F.avg_pool2d(x, 2, ceil_mode=True) if coarser else F.interpolate(x, size=self.size)
        done: Tensor = self.block(x)
        return done


class ScaleGrid(Ways):
    """A grid of layers and scales: at each layer, action 0 goes to the next coarser scale, 1 stays, 2 goes to a finer.

    A scale has half the height and width of the next finer one, and as many channels. Each layer has a cell for each
    way from each scale (`Step`). Rows at one scale are together, wherever they come from. Choices that would leave the
    grid are closed.

    The output is for each pixel. From the scale where a row ends, a 1x1 convolution gives its map's answer, which is
    brought to the size of the image. A 3x3 convolution on the image itself, which knows where edges are, is added.

    The full route stays at the finest scale, where a layer costs most.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs at each pixel.
        layers: the number of layers.
        scales: the number of scales.
        width: the number of channels.
        stem_stride: the stride of the first convolution, behind which is the finest scale.

    Raises:
        ValueError: there are not 2 to 8 scales, no layer, or the coarsest map would have fewer than 2x2 cells.

    Source: Learning Dynamic Routing for Semantic Segmentation (Li et al. 2020, CVPR), where a row takes all ways whose
    gates are not 0, and gates are trained by gradient. Here a row takes one way, and the walk under gates takes all.
    """

    family = "scale_grid"
    exports = True
    opened: Tensor

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 11,
        layers: int = 4,
        scales: int = 3,
        width: int = 12,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        check_count("scales", scales, 2, MOST_SCALES)
        for name, count in (("classes", classes), ("layers", layers), ("width", width), ("stem_stride", stem_stride)):
            check_count(name, count, 1, MOST_ROWS)
        if len(input_shape) != 3:
            raise ValueError(f"expected images (channels, height, width), got inputs of {tuple(input_shape)}")
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "layers": layers, "scales": scales, "width": width,
            "stem_stride": stem_stride,
        }  # fmt: skip
        self.stem = Normed(input_shape[0], width, 3, stem_stride)
        start, (_, height, wide) = count_macs(self.stem, self.input_shape)
        self._sizes = [(-(-height // 2**scale), -(-wide // 2**scale)) for scale in range(scales)]
        if min(self._sizes[-1]) < 2:  # batch norm needs more than one cell of one row
            raise ValueError(
                f"expected at least 2x2 cells at the coarsest of {scales} scales, got {self._sizes[-1]}; take fewer "
                "scales or larger images"
            )
        self._stands = [(layer, scale) for layer in range(layers) for scale in range(min(layer + 1, scales))]
        opened = [[0 <= self._goes(scale, choice) < scales for choice in CHOICES] for _, scale in self._stands]
        self.register_buffer("opened", torch.tensor(opened), persistent=False)
        self.cells = nn.ModuleList(
            nn.ModuleList(self._cell(scale, choice) if is_open[choice] else nn.Identity() for choice in CHOICES)
            for (_, scale), is_open in zip(self._stands, opened, strict=True)
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, classes, 1) for _ in range(scales))
        self.edges = nn.Conv2d(input_shape[0], classes, 3, padding=1, bias=False)
        self._pose(
            [Point(f"layer{layer + 1}.scale{scale}", len(CHOICES)) for layer, scale in self._stands],
            costs=self._count(), start_macs=start,
            full_route=[-1 if scale else KEEP for _, scale in self._stands], feature_width=scales * width,
            # A finer scale is dearer in later layers, too.
            thrift=[[choice if is_open[choice] else -1 for choice in CHOICES] for is_open in opened],
            max_steps=layers,
        )  # fmt: skip

    def _goes(self, scale: int, choice: int) -> int:
        """Return the scale that an open choice leads to."""
        return scale + KEEP - choice

    def _cell(self, scale: int, choice: int) -> Step:
        return Step(self.config["width"], None if choice == KEEP else self._sizes[self._goes(scale, choice)])

    def _shape(self, scale: int) -> tuple[int, int, int]:
        return (self.config["width"], *self._sizes[scale])

    def _steps(self, point: int) -> dict[int, Step]:
        """Return the cell of each open choice."""
        cells: Any = self.cells[point]
        return {choice: cell for choice, cell in enumerate(cells) if isinstance(cell, Step)}

    def _count(self) -> list[list[int]]:
        """Return the MACs of each choice at each point; a closed one costs what runs in its place."""
        last = count_macs(self.edges, self.input_shape)[0]
        heads = [last + count_macs(head, self._shape(scale))[0] for scale, head in enumerate(self.heads)]
        costs = list[list[int]]()
        for point, (layer, scale) in enumerate(self._stands):
            macs = {
                choice: count_macs(cell, self._shape(scale))[0]
                + (heads[self._goes(scale, choice)] if self._ends(layer) else 0)
                for choice, cell in self._steps(point).items()
            }
            costs.append([macs.get(choice, macs[KEEP]) for choice in CHOICES])
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
        for choice, cell in self._steps(state.point).items():
            kept = keep_rows(action == choice, state.rows, state.features)
            if kept is None:
                continue
            (rows, came), (point, scale) = kept, self._leads(state.point, choice)
            done, on = cell(came), State(walk, point, rows)
            if point == END:
                walk.put_output(rows, self._answer(scale, done, on.get(walk.inputs)))
            else:
                on.features = done
            reached.append(on)
        return reached

    def _gated_run(self, state: State, gates: Tensor) -> State:
        x, walk, likeliest = state.features, state.walk, gates.argmax(1)
        assert isinstance(walk, GatedWalk)
        came, present = walk.weight, walk.present
        for choice, cell in self._steps(state.point).items():
            point, scale = self._leads(state.point, choice)
            done = cell(x.clone())  # a cell may overwrite its input
            if point == END:
                done = self._answer(scale, done, walk.inputs)
            self._come(walk, point, (done,), came * gates[:, choice], present & (likeliest == choice))
        following = state.point + 1 if state.point + 1 < len(self.points) else END
        (x,) = self._at(walk, following, 1)
        if following != END:
            return State(walk, following, state.rows, x)
        walk.put_output(state.rows, x)
        return State(walk, END, state.rows)

    def open_up(self) -> None:
        """Give all cells of a layer, and all heads, the weights of the finest scale's: they know things of any size.

        Large things at a coarse scale look like small ones at a fine scale.
        """
        for point, (layer, _) in enumerate(self._stands):
            finest = self._steps(self._stands.index((layer, 0)))[KEEP]
            for cell in self._steps(point).values():
                cell.load_state_dict(finest.state_dict())
        for head in self.heads:
            head.load_state_dict(self.heads[0].state_dict())

    def observe(self, state: State) -> Tensor:
        """Return the mean of each channel of the map, and how much detail each coarser scale in turn would lose.

        The detail is the mean difference of a cell from the mean of its 2x2 cells, the levels of a Laplacian pyramid
        (Burt & Adelson 1983, IEEE Transactions on Communications 31): the larger a thing, the coarser its levels.
        """
        x, told = state.features, [summary(state.features)]
        for _ in self._sizes[1:]:
            coarser = F.avg_pool2d(x, 2, ceil_mode=True)
            told.append((x - F.interpolate(coarser, size=x.shape[2:])).abs().mean((2, 3)).float())
            x = coarser
        return torch.cat(told, 1)

    def constant_routes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the routes that go straight to one scale and stay there."""
        return [
            (f"scale {goal}", tuple(DOWN if scale < goal else KEEP for _, scale in self._stands))
            for goal in range(min(self.config["layers"] + 1, len(self._sizes)))
        ]

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each cell runs on neighbouring rows of a map that is there already."""
        counts = self._counts(route.cpu())
        maps = [
            inputs.new_zeros(sum(sizes), *self._shape(scale)).contiguous(memory_format=torch.channels_last)
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
                    x = self._steps(point)[choice](rows)
                    if on == END:
                        answer = self._answer(scale, x, inputs[done : done + len(rows)])
                        done += len(rows)
            return answer

        return run

    def _counts(self, route: Tensor) -> list[list[int]]:
        """Return how many rows run each choice at each point along `route` [B, columns]."""
        leads = torch.tensor([[self.leads_to(point, choice) for choice in CHOICES] for point in range(self.columns)])
        at, counts = torch.zeros(len(route), dtype=torch.int64), torch.zeros_like(leads)
        for _ in range(self.config["layers"]):  # a route may hold choices in columns that its row never comes to
            choice = route.gather(1, at.unsqueeze(1)).squeeze(1)
            choice = torch.where(self.opened.cpu()[at, choice], choice, KEEP)
            counts += torch.bincount(len(CHOICES) * at + choice, minlength=counts.numel()).view_as(counts)
            at = leads[at, choice]
        return counts.tolist()
