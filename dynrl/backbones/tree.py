"""In a tree of modules, each node's own router says which of two children comes next, or in which shares both do.

Several trees are a forest, which votes. Behind each tree, a row stops with the vote so far or goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Answer
from dynrl.backbones.early import SCORES
from dynrl.backbones.gated import GatedWalk, straight_through
from dynrl.backbones.resnet import BasicBlock, Normed
from dynrl.backbones.walk import END, GO_ON, STOP, Point, State, Walk
from dynrl.backbones.ways import Ways
from dynrl.cost import count_macs
from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.move import keep_rows, take_rows
from dynrl.ops.pooled import summary
from dynrl.routes import draw_routes
from dynrl.schema import MOST_ROWS, check_count, check_counts

OWN, BOTH, OTHER = range(3)  # the child that the node's router prefers; both children; the other child
TOLD = 3  # what is observed of routers: how sure one is, where it points, and how much the path weighs
SHARP = 4.0  # how much more a router's log-odds are than its layer says: unsure ones part rows by chance, for too long
EVEN = 0.1  # how much a router leans away, in a batch, from a child that all rows come to
DEEPEST, LARGEST = 8, 16  # levels of a tree: 128 leaves; one more than the trees of a forest

# A node's map, and [n, 2]: its router's log-odds of the right child, and the path's weight.
Features = tuple[Tensor, Tensor]


class _Node(NamedTuple):
    """A node with two children, by the numbers of modules and of points; leaves are no points."""

    tree: int
    level: int
    module: int
    children: tuple[int, int]  # the modules of the left and the right child
    points: tuple[int, int]  # the points of these children; END for leaves
    turns: tuple[tuple[int, int], ...]  # nodes above, from the nearest, on whose left this one is: (point, right child)
    after: int  # where rows stand once they are through the tree: the point between it and the next one, or END


def _grow(depth: int, forest: int) -> dict[int, _Node]:
    """Return the nodes of full trees by their points, which have the order in which a row that takes all meets them.

    The point behind each tree but the last has no node: there, a row stops or goes on.
    """
    nodes, size = dict[int, _Node](), 2**depth  # the points of a tree, with the one behind it

    def grow(tree: int, level: int, point: int, module: int, turns: tuple[tuple[int, int], ...]) -> None:
        half = 2 ** (depth - level)  # the modules of one child's side, and one more
        right, last = point + half // 2, level + 1 == depth
        points = (END, END) if last else (point + 1, right)
        after = END if tree + 1 == forest else (tree + 1) * size - 1
        nodes[point] = _Node(tree, level, module, (module + 1, module + half), points, turns, after)
        if not last:
            grow(tree, level + 1, point + 1, module + 1, ((point, right), *turns))
            grow(tree, level + 1, right, module + half, turns)

    for tree in range(forest):
        grow(tree, 0, tree * size, tree * (2 * size - 1), ())
    return nodes


def _stage(level: int, layers: tuple[int, ...], widths: tuple[int, ...]) -> nn.Sequential:
    """Make the blocks of a level's stage."""
    first = BasicBlock(widths[max(0, level - 1)], widths[level], 2 if level else 1)
    return nn.Sequential(first, *(BasicBlock(widths[level], widths[level]) for _ in range(layers[level] - 1)))


class NeuralTree(Ways):
    """A tree of residual stages: at each node, a row goes to one child, or to both, whose answers are mixed.

    The root holds the first stage of a residual network, and each level below holds the next stage, twice as often. So
    each way from the root to a leaf is a residual network of its own, which shares its first stages with others. Each
    node has a router, a linear layer on the mean of each channel. Action 0 takes the child that the router prefers, 2
    the other child, and 1 both: then their answers count by the router's probabilities. A row first finishes the left
    side of a node and then takes the right one.

    The full route takes both children everywhere. It is the soft tree, whose answer is the mixture of all leaves'.
    Every row pays for one way to a leaf before its first decision, and for one more where it takes both children.

    Pretraining begins with the soft tree. Then rows part more and more: where one child is drawn, it is drawn by the
    router, which learns by straight-through gates. In each batch, routers lean a little towards the child that fewer
    rows come to, or a few leaves would learn everything.

    Several trees, which share the stem, are a forest. Its answer is the mean of the answers of the trees that a row has
    been through, the vote. Between two trees there is one more point, where action 0 stops with the vote so far, and 1
    pays for a way through the next tree. The full route goes through all trees, each of them soft. Pretraining trains
    the vote behind each tree, so the vote of any number of trees is an answer.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs.
        layers: the number of basic blocks of each level's stages, 2 to 8 levels; every level but the first halves
            height and width.
        widths: the number of channels of each level's stages.
        stem: "cifar" (3x3) or "imagenet" (7x7 of stride 2, then max pooling of stride 2).
        stem_stride: the stride of the "cifar" stem.
        forest: the number of trees, up to 15.

    Raises:
        ValueError: there are not 2 to 8 levels, or not as many widths, or inputs are no images; or a forest has less
            than two classes, of which it could be sure.

    Sources: Deep Neural Decision Forests (Kontschieder et al. 2015, ICCV, section 2.2: a forest's answer is the mean of
    its trees'), trained here by gradient alone, with leaves that give answers to any task; Adaptive Neural Trees (Tanno
    et al. 2019, ICML), where nodes transform features and a single path is as good as the mixture. Even use of the
    children is the aim of the penalty of Frosst & Hinton (2017); here it is reached by a lean that has no gradient
    (Wang et al. 2024).
    """

    family = "neural_tree"
    scores: ClassVar = {"router": (0, True)}
    rule = "trees"
    budgets: ClassVar = (0.3, 0.4, 0.5, 0.6, 0.8)
    lean: Tensor

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        layers: tuple[int, ...] = (1, 1, 1, 1),
        widths: tuple[int, ...] = (16, 32, 64, 128),
        stem: Literal["cifar", "imagenet"] = "cifar",
        stem_stride: int = 1,
        forest: int = 1,
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        check_counts("layers", layers)
        check_counts("widths", widths)
        check_count("forest", forest, 1, LARGEST)
        check_count("classes", classes, min(forest, 2), MOST_ROWS)
        check_count("stem_stride", stem_stride, 1, MOST_ROWS)
        if len(input_shape) != 3 or not 2 <= len(layers) == len(widths) <= DEEPEST:
            raise ValueError(
                f"expected images (channels, height, width) and a width for each of 2 to {DEEPEST} levels, got inputs "
                f"of {tuple(input_shape)}, {len(layers)} levels and {len(widths)} widths"
            )
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "layers": list(layers), "widths": list(widths),
            "stem": stem, "stem_stride": stem_stride, "forest": forest,
        }  # fmt: skip
        kernel, stride = (3, stem_stride) if stem == "cifar" else (7, 2)
        pool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.stem = nn.Sequential(Normed(input_shape[0], widths[0], kernel, stride), pool)
        self._nodes, last = _grow(len(layers) - 1, forest), len(layers) - 1
        levels = {node.module: node.level for node in self._nodes.values()}
        stages = [levels.get(module, last) for module in range(2 * len(self._nodes) + forest)]
        self.stages = nn.ModuleList(_stage(level, layers, widths) for level in stages)
        self.routers = nn.ModuleList(nn.Linear(widths[node.level], 1, bias=False) for node in self._nodes.values())
        leaves = [module for module, level in enumerate(stages) if level == last]
        self.heads = nn.ModuleDict({str(module): nn.Linear(widths[-1], classes) for module in leaves})
        self.register_buffer("lean", torch.zeros(len(self._nodes)))  # no weight: only pretraining moves it
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._pose_nodes(*self._level_macs(stages))

    def _level_macs(self, stages: list[int]) -> tuple[int, list[int]]:
        """Return the MACs of the stem, and of one stage of each level with the router or the classifier behind it."""
        (start, size), widths, costs = count_macs(self.stem, self.input_shape), self.config["widths"], list[int]()
        behind = [*widths[:-1], widths[-1] * self.config["classes"]]
        for level, small in enumerate(behind):
            macs, size = count_macs(self.stages[stages.index(level)], size)
            costs.append(macs + small)
        return start, costs

    def _pose_nodes(self, start: int, costs: list[int]) -> None:
        """Pose a point at each node and between trees, for a stem of `start` MACs and levels of `costs`."""
        points, choices = list[Point](), list[list[int]]()
        for point in range(max(self._nodes) + 1):
            node = self._nodes.get(point)
            points.append(Point(f"node{point}", 3) if node else Point(f"stop{point}", 2))
            choices.append([0, sum(costs[node.level + 1 :]), 0] if node else [0, sum(costs)])
        widths, forest = self.config["widths"], self.config["forest"]
        self._pose(
            points,
            costs=choices,
            start_macs=start + sum(costs),
            full_route=[BOTH if point in self._nodes else GO_ON for point in range(len(points))],
            feature_width=max(TOLD + max(widths[:-1]), SCORES + widths[0]),
        )
        if forest > 1:  # one tree's part of all trees' MACs is less
            self.budgets = (*(round(share / forest, 3) for share in self.budgets), 0.5)  # type: ignore[misc]

    def _stage(self, module: int, x: Tensor) -> Tensor:
        done: Tensor = self.stages[module](x)
        return done

    def _arrive(self, point: int, x: Tensor, weight: Tensor) -> Features:
        """Return the features of rows at a node, of its map [n, C, H, W] and of the weight [n] of their path."""
        router = point - self._nodes[point].tree  # there is none between trees
        odds = SHARP * (self.routers[router](summary(x).to(x.dtype)).float() + self.lean[router])
        return x, torch.cat([odds, weight.float().unsqueeze(1)], 1)

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        x = self.stem(inputs)
        walk.put_output(rows, x.new_zeros(len(x), self.config["classes"]))
        if self.config["forest"] > 1:
            walk.keep("stem", rows, x)
        return self._enter(walk, 0, rows, x)

    def _enter(self, walk: Walk, root: int, rows: Tensor, stem: Tensor) -> State:
        """Let rows stand at the root of a tree, with the vote of the trees before it as a part of the vote with it."""
        node = self._nodes[root]
        if node.tree:
            walk.put_output(rows, self.output(State(walk, END, rows)) * (node.tree / (node.tree + 1)))
        # For inference, a root's stage overwrites its input, which the next tree needs.
        x = self._stage(node.module, stem if node.after == END else stem.clone())
        if isinstance(walk, GatedWalk):  # what stops is lost to the trees behind, what parts within this one is not
            self._come(walk, node.after, (), walk.weight, walk.present)
        return State(walk, root, rows, self._arrive(root, x, x.new_ones(len(x))))

    def _leave(self, walk: Walk, after: int, rows: Tensor) -> State:
        """Let rows stand behind a tree: at the next point, where they have the stem's map, or at the end."""
        state = State(walk, after, rows)
        if after != END:
            state.features = state.get(walk.own["stem"])
        return state

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, node, reached = state.walk, self._nodes.get(state.point), list[State]()
        if node is None:
            if (stopping := keep_rows(action == STOP, state.rows)) is not None:
                reached.append(State(walk, END, *stopping))
            if (going := keep_rows(action == GO_ON, state.rows, state.features)) is not None:
                reached.append(self._enter(walk, state.point + 1, *going))
            return reached
        x, told = state.features
        odds, weight = told.unbind(1)
        both = action == BOTH
        for side, (module, point) in enumerate(zip(node.children, node.points, strict=True)):
            # The own child is the right one where the log-odds are above 0; the other one is where they are not.
            chosen = both | ((action == OWN) == ((odds > 0) == bool(side)))
            share = torch.where(both, torch.sigmoid(odds if side else -odds), 1)
            kept = keep_rows(chosen, state.rows, x, weight * share, both)
            if kept is None:
                continue
            rows, came, weights, again = kept
            done = self._stage(module, came)
            if point == END:
                self._say(walk, module, rows, done, weights / (node.tree + 1))
                continue
            features = self._arrive(point, done, weights)
            if side:  # rows that are on the left now come here later
                later, now = keep_rows(again, rows, features), keep_rows(~again, rows, features)
                if later is not None:
                    for name, value in zip(self._waiting(point, 2), later[1], strict=False):
                        walk.keep(name, later[0], value)
                reached += [State(walk, point, *now)] if now is not None else []
            else:
                reached.append(State(walk, point, rows, features))
        return reached or self._turn(state, node)

    def _say(self, walk: Walk, module: int, rows: Tensor, x: Tensor, weight: Tensor) -> None:
        """Add a leaf's answer to the outputs of `rows`."""
        said = self.heads[str(module)](x.mean((2, 3)))
        before = self.output(State(walk, END, rows))
        walk.put_output(rows, before + weight.to(said.dtype).unsqueeze(1) * said)

    def _turn(self, state: State, node: _Node) -> list[State]:
        """Return where rows go behind a leaf: to the right of the nearest node where that waits, or out of the tree."""
        walk, rows, reached = state.walk, state.rows, list[State]()
        for above, point in node.turns:
            waits = State(walk, END, rows).get(walk.route[:, above]) == BOTH
            turning, rest = keep_rows(waits, rows), keep_rows(~waits, rows)
            if turning is not None:
                held: Any = tuple(walk.own[name] for name in self._waiting(point, 2)[:2])
                if turning[0] is not walk.all_rows:
                    held = tuple(take_rows(whole, turning[0]) for whole in held)
                reached.append(State(walk, point, turning[0], held))
            if rest is None:
                return reached
            (rows,) = rest
        return [*reached, self._leave(walk, node.after, rows)]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        walk, node = state.walk, self._nodes.get(state.point)
        assert isinstance(walk, GatedWalk)
        if node is None:
            walk.leave(gates, STOP)
            return self._enter(walk, state.point + 1, state.rows, state.features)
        x, told = state.features
        odds, weight = told.unbind(1)
        own, both, other = gates.unbind(1)
        came, likeliest, present = walk.weight, gates.argmax(1), walk.present
        for side, (module, point) in enumerate(zip(node.children, node.points, strict=True)):
            preferred = (odds > 0) == bool(side)
            alone = torch.where(preferred, own, other)
            done = self._stage(module, x)
            weights = weight * (alone + both * torch.sigmoid(odds if side else -odds))
            if point == END:
                self._say(walk, module, state.rows, done, weights / (node.tree + 1))
                continue
            here = present & ((likeliest == BOTH) | ((likeliest == OWN) == preferred))
            self._come(walk, point, self._arrive(point, done, weights), came * (alone + both), here)
        following = state.point + 1
        if following not in self._nodes:
            self._at(walk, node.after, 0)
            return self._leave(walk, node.after, state.rows)
        return State(walk, following, state.rows, self._at(walk, following, 2))

    def observe(self, state: State) -> Tensor:
        """Return the router's probability of its own child and of the right one, the path's weight, channels' means.

        The weight is 1 for rows that took one child everywhere above, and less for parts of a mixture. Between trees,
        return how sure the vote is (`exit_scores`), and the means of the stem's channels.
        """
        if state.point not in self._nodes:
            return torch.cat([exit_scores(self.output(state)), summary(state.features)], 1)
        x, told = state.features
        odds, weight = told.split(1, 1)
        return torch.cat([torch.sigmoid(odds.abs()), torch.sigmoid(odds), weight, summary(x)], 1)

    def leads_to(self, column: int, choice: int) -> int:
        """Return `Backbone.leads_to`; all ways out of a tree cost the same, so the left one stands for them."""
        node = self._nodes.get(column)
        if node is None:
            return END if choice == STOP else column + 1
        return node.after if node.points[0] == END else node.points[0]

    def waiting(self, state: State) -> Tensor | None:
        """Return `Backbone.waiting`: those on the right of nodes above, and of this one if both children are taken."""
        node, route = self._nodes.get(state.point), state.walk.route
        if node is None:
            return None
        depth = len(self.config["layers"]) - 1
        behind = torch.tensor([0, depth - node.level - 1, 0], device=route.device)
        waits = behind.expand(state.count, -1)
        for above, right in node.turns:
            waits = waits + ((state.get(route[:, above]) == BOTH) * (depth - self._nodes[right].level)).unsqueeze(1)
        return waits

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the soft trees' votes; with a rate, those of trees in which rows take one child now and then.

        Which child that is, gates draw by the router's probabilities. No row stops before the last tree.
        """
        size, votes = len(inputs), list[Answer]()
        route = self.dense_actions(size) if rate is None else draw_routes(self.thrift, rate, generator)
        route, met = route.to(inputs.device), list[Tensor]()

        def choose(state: State) -> Tensor:
            if state.point not in self._nodes:
                votes.append(Answer(self.output(state), state.rows))
                return F.one_hot(torch.full_like(state.rows, GO_ON), 3).float()
            odds, weight = state.features[1].unbind(1)
            met.append((weight * torch.sigmoid(odds)).sum() / weight.sum().clamp_min(1e-9))
            if rate is None:
                return F.one_hot(state.along(route), 3).to(odds)
            # Noise is drawn on the CPU, as the generator is there.
            drawn = straight_through(torch.stack([odds.abs(), torch.zeros_like(odds)], 1).cpu(), generator).to(odds)
            one = torch.stack([drawn[:, 0], torch.zeros_like(odds), drawn[:, 1]], 1)
            both = (state.along(route) == BOTH).unsqueeze(1)
            return torch.where(both, F.one_hot(state.along(route), 3).to(odds), one)

        walk = self.gated(inputs, choose)
        assert walk.outputs is not None
        yield [*votes, Answer(walk.outputs, walk.all_rows)]
        if self.training:
            self.lean -= EVEN * (2 * torch.stack(met).detach() - 1)

    def constant_routes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the paths that the nodes' own routers prefer, of all trees and of fewer; and fewer soft trees."""
        forest, points = self.config["forest"], range(len(self.points))
        size = (len(self.points) + 1) // forest  # with the point behind the tree

        def through(trees: int, choice: int) -> tuple[int, ...]:
            return tuple(choice if point in self._nodes else int(point // size + 1 < trees) for point in points)

        own = [("own routers", through(trees, OWN)) for trees in range(forest, 0, -1)]
        return own + [("soft trees", through(trees, BOTH)) for trees in range(forest - 1, 0, -1)]

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each stage runs on the first rows of the batch, as many as come to it.

        A route does not tell left from right; leaves get equal parts of the rows that take one of two.
        """
        came, twice = (route >= 0).sum(0).tolist(), (route == BOTH).sum(0).tolist()

        def run() -> Tensor:
            def go(point: int, x: Tensor) -> Tensor:
                node, half = self._nodes[point], (came[point] - twice[point] + 1) // 2
                counts = [half + twice[point], came[point] - half]
                for count, module, below in zip(counts, node.children, node.points, strict=True):
                    count = count if below == END else came[below]
                    if count:
                        done = self._stage(module, x[:count])
                        said = self.heads[str(module)](done.mean((2, 3))) if below == END else go(below, done)
                return said

            stem = self.stem(inputs)
            for root, node in self._nodes.items():
                if node.level == 0 and came[root]:
                    said = go(root, self._stage(node.module, stem[: came[root]]))
            return said

        return run
