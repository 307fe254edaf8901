"""A neural module network answers questions about images: for each question, modules are put together step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Answer, Backbone
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.cost import count_macs
from dynrl.ops.move import keep_rows
from dynrl.ops.partition import run_by_choice
from dynrl.schema import MOST_ROWS, check_count, check_counts

AND, ANSWER, ONE = range(3)  # the first choices; moves and finds follow
BLUR = 0.2  # the weights of moves at first
ASKED = 3.0  # the log-odds of modules that the question still asks for; those of others are as far below 0
JOINED = 6.0  # the log-odds of And: maps of one thing meet no more if one of them is moved first
ROLES, THING, OTHER = 3, 0, 2  # a word of the question is for the thing, for the side (1) or for the other


def _find(channels: int) -> nn.Sequential:
    """Make a module that makes a map [n, 1, H, W] of cells [n, C, H, W]."""
    return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, 1, 1))


def _move() -> nn.Conv2d:
    """Make a module that moves a map. Untrained, it blurs it: then a thing near the other is told from one far away."""
    move = nn.Conv2d(1, 1, 3, padding=1)
    nn.init.normal_(move.weight, BLUR, BLUR / 10)
    return move


class _And(nn.Module):
    """A cell of two maps that are joined has the smaller number: there are no weights, and it counts no MACs."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map [n, 2, H, W] to [n, 1, H, W]."""
        return maps.amin(1, keepdim=True)


class _Answer(nn.Module):
    """The answer is read off the greatest number of a map. Untrained, a greater one speaks for the last class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.said = nn.Linear(1, classes)
        nn.init.zeros_(self.said.bias)
        with torch.no_grad():  # modules that do not know which way is yes would have to agree on it first
            self.said.weight.copy_(torch.linspace(-1, 1, classes).unsqueeze(1))

    def forward(self, maps: Tensor) -> Tensor:
        """Map [n, 1, H, W] to [n, classes]."""
        said: Tensor = self.said(maps.amax((2, 3)))
        return said


class _OneNetwork(nn.Module):
    """One network answers all questions: what a question asks for scales and shifts channels of a map (FiLM)."""

    def __init__(self, channels: int, width: int, bits: int, cells: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(n, width, 3, padding=1) for n in (channels, width))
        self.asked = nn.Linear(bits, 4 * width)
        self.hidden, self.answer = nn.Linear(width * cells, width), nn.Linear(width, classes)

    def forward(self, cells: Tensor, question: Tensor) -> Tensor:
        """Map cells [n, C, H, W] and questions [n, bits] to answers [n, classes]."""
        scale, shift, again, more = self.asked(question)[:, :, None, None].chunk(4, 1)
        x = F.relu((1 + scale) * self.first(cells) + shift)
        x = F.relu((1 + again) * self.second(x) + more)
        return self.answer(F.relu(self.hidden(x.flatten(1))))


class NeuralModules(Backbone):
    """A stack machine of modules, which a policy puts together for each question about an image.

    The first layers cut the image into cells. A module finds one property, a colour for example, and pushes a map of
    the cells that have it. A move takes the top map and pushes that of the cells next to those it shows, on one side.
    And joins the two top maps into one. Answer reads the answer off the last map and ends the walk. A choice for which
    the stack holds too few or too many maps is closed, and so is one that leaves no step for the way to an answer. A
    point is how many maps the stack holds.

    At the empty stack, a row may also ask one network, which sees the image and the question as a whole. This is the
    full route. It is trained as the plain network, before there are modules.

    The last channel of an input holds the question in its first numbers: a 1 for each property of the thing that is
    asked for, for the side on which it lies of another thing, and for each property of that. From a question, a parser
    lays out the modules that answer it. Modules are trained on these layouts; policies are not told them.

    Args:
        input_shape: (channels, height, width) of the image with the channel of the question.
        classes: the number of answers.
        properties: how many properties a thing may have, with a module each to find it.
        moves: how many sides a thing may lie on of another, with a module each.
        cell: the height and width of a cell in pixels.
        channels: the channels of a cell.
        width: the channels of the one network.
        depth: the most maps on the stack.
        steps: the most modules of a layout.

    Raises:
        ValueError: the channel of the question is too small, an image has no whole cell, or steps do not suffice for
            the deepest stack.

    Sources: Neural Module Networks (Andreas et al. 2016, CVPR), whose layouts come from a parser; End-to-End Module
    Networks (Hu et al. 2017, ICCV), where they are learned, in reverse Polish notation. The one network is a FiLM
    network (Perez et al. 2018, AAAI).
    """

    family = "neural_modules"
    decision = "branch"
    rule = "layouts"
    speaks = True
    gates = False  # the mean of two stacks of different depths is none
    budgets: ClassVar = (0.17, 0.18, 0.19, 0.2, 0.21)  # one property more or less is 0.015
    needs: Tensor

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 2,
        properties: int = 6,
        moves: int = 4,
        cell: int = 10,
        channels: int = 32,
        width: int = 64,
        depth: int = 2,
        steps: int = 10,
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        given = dict(properties=properties, moves=moves, cell=cell, channels=channels, width=width)
        for name, count in ({"classes": classes} | given).items():
            check_count(name, count, 1, MOST_ROWS)
        check_count("depth", depth, 2, 9)
        check_count("steps", steps, 2 * depth, 1_000)
        self.bits = 2 * properties + moves
        if len(input_shape) != 3 or input_shape[0] < 2 or not self.bits <= input_shape[1] * input_shape[2]:
            raise ValueError(
                f"expected images of one channel or more and a channel of at least {self.bits} numbers, the question, "
                f"got inputs of {tuple(input_shape)}"
            )
        if min(input_shape[1:]) < cell:
            raise ValueError(f"expected images of at least one cell of {cell}x{cell}, got {tuple(input_shape)}")
        self.input_shape = tuple(input_shape)
        self.config = {"input_shape": list(input_shape), "classes": classes, **given, "depth": depth, "steps": steps}
        self.properties, self.find = properties, ONE + 1 + moves
        image, side = (input_shape[0] - 1, *input_shape[1:]), (input_shape[1] // cell, input_shape[2] // cell)
        self.stem = nn.Sequential(
            nn.Conv2d(image[0], channels, cell, cell), nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.ReLU()
        )
        self.join = _And()
        self.moves = nn.ModuleList(_move() for _ in range(moves))
        self.finds = nn.ModuleList(_find(channels) for _ in range(properties))
        cells = side[0] * side[1]
        self.answer = _Answer(classes)
        self.network = _OneNetwork(channels, width, self.bits, cells, classes)
        start, shape = count_macs(self.stem, image)
        find, one = count_macs(self.finds[0], shape)[0], count_macs(self.network, shape, (self.bits,))[0]
        move, answer = (count_macs(module, (1, *side))[0] for module in (self.moves[0], self.answer))
        self._pose_stack(start, find, move, answer, one, depth, steps)

    def _pose_stack(self, start: int, find: int, move: int, answer: int, one: int, depth: int, steps: int) -> None:
        """Pose a point for each number of maps on the stack; the numbers before `depth` are MACs."""
        count = self.suggested = self.find + self.properties
        points, costs, needs = [Point("empty", count)], list[list[int]](), list[list[int]]()
        points += [Point(f"maps{held}", count, visits=steps + 1 - 2 * held) for held in range(1, depth + 1)]
        for held in range(depth + 1):
            costs.append([0 if held > 1 else -1, answer if held == 1 else -1, -1 if held else one])
            costs[held] += [move if held else -1] * len(self.moves)
            costs[held] += [find if held < depth else -1] * self.properties
            # The steps that a choice leaves to be done: each map but one is joined to another, and one answers.
            needs.append([0 if c in (ANSWER, ONE) else held + self._grows(c) for c in range(count)])
        columns = sum(point.visits for point in points)
        self._pose(
            points, costs=costs, start_macs=start, full_route=(ONE, *[-1] * (columns - 1)),
            feature_width=ROLES + (2 + ROLES) * depth + (ROLES + 1) * self.suggested, max_steps=steps,
        )  # fmt: skip
        self.register_buffer("needs", self._table(needs).long(), persistent=False)

    def question(self, inputs: Tensor) -> Tensor:
        """Return the questions of `inputs` [n, ...]: [n, bits]."""
        return inputs[:, -1].flatten(1)[:, : self.bits]

    def random_inputs(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """Return images of random numbers with random questions, half of them for one thing alone."""
        inputs = super().random_inputs(rows, generator)
        told, first = torch.zeros(rows, self.bits), 0
        for count in (self.properties, len(self.moves), self.properties):
            drawn = torch.randint(count, (rows, 1), generator=generator)
            told.scatter_(1, first + drawn, 1.0)
            first += count
        told[: rows // 2, self.properties :] = 0
        inputs[:, -1] = 0
        inputs[:, -1].flatten(1)[:, : self.bits] = told.to(inputs)
        return inputs

    def layout(self, question: Tensor) -> Tensor:
        """Return the route of the modules that answer each of `question` [n, bits]: [n, columns].

        The other thing is found, property by property, each joined to those before; its map is moved; the thing's own
        properties are found and joined, too; and the last map gives the answer. Modules that no visit is left for are
        left out.
        """
        told, device = question > 0.5, question.device
        visits = torch.tensor([point.visits for point in self.points], device=device)
        starts = visits.cumsum(0) - visits
        held, been = torch.zeros_like(told[:, 0], dtype=torch.int64), visits.new_zeros(len(told), len(visits))
        route = visits.new_zeros(len(told), self.columns)

        def lay(choice: int, rows: Tensor, grows: int) -> None:
            rows = (rows & (been.gather(1, held.unsqueeze(1)).squeeze(1) < visits[held])).nonzero().squeeze(1)
            point = held[rows]
            route[rows, starts[point] + been[rows, point]] = choice
            been[rows, point] += 1
            held[rows] += grows

        thing, move, other = told.split([self.properties, len(self.moves), self.properties], 1)
        for properties, moved in ((other, move), (thing, move[:, :0])):
            for k, rows in enumerate(properties.unbind(1)):
                lay(self.find + k, rows, 1)
                lay(AND, held == 2, -1)
            for k, rows in enumerate(moved.unbind(1)):
                lay(ONE + 1 + k, rows & (held == 1), 0)
        lay(ANSWER, held == 1, 0)
        return route

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        asked, cells = self.question(inputs), self.stem(inputs[:, :-1])
        walk.keep("question", rows, asked)
        left = self._in_roles(asked > 0.5)
        words = torch.zeros(len(rows), 0, ROLES, device=cells.device)  # of each role, how many made each map
        return State(walk, 0, rows, (cells, cells[:, :0], left, words))

    def open_choices(self, state: State) -> Tensor:
        """Return `Backbone.open_choices`: what the stack has maps and room for, and what leaves the steps it needs."""
        left = self.max_steps - 1 - state.get(state.walk.steps)
        return (self.costs[state.point] >= 0) & (self.needs[state.point] <= left.unsqueeze(1))

    def leads_to(self, column: int, choice: int) -> int:
        """Return `Backbone.leads_to`: the first column of the next point, whose columns are all alike."""
        if choice in (ANSWER, ONE):
            return END
        point = int(self.column_point[column]) + self._grows(choice)
        return sum(point.visits for point in self.points[:point])

    def _grows(self, choice: int) -> int:
        """Return by how many maps a choice changes the stack."""
        return -1 if choice == AND else int(choice >= self.find)

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, held, reached = state.walk, state.point, list[State]()
        for first, modules, takes in self._kinds():
            which = action - first
            kept = keep_rows((which >= 0) & (which < len(modules)), state.rows, action, which, state.features)
            if kept is None:
                continue
            rows, chosen, which, (cells, stack, left, words) = kept
            made = run_by_choice(modules, which, stack[:, held - takes :] if takes else cells)
            left, used = self._use(left, chosen)
            used = (words[:, held - takes :].sum(1) + used).unsqueeze(1)
            below = slice(held - takes)
            stack, words = torch.cat([stack[:, below], made], 1), torch.cat([words[:, below], used], 1)
            reached.append(State(walk, held - takes + 1, rows, (cells, stack, left, words)))
        for choice in (ANSWER, ONE):
            kept = keep_rows(action == choice, state.rows, state.features)
            if kept is None:
                continue
            rows, (cells, stack, *_) = kept
            ended = State(walk, END, rows)
            asked = ended.get(walk.own["question"])
            walk.put_output(rows, self.answer(stack) if choice == ANSWER else self.network(cells, asked))
            reached.append(ended)
        return reached

    def output(self, state: State) -> Tensor:
        """Return the outputs that rows ended with, or what they would say if all maps on the stack were joined now.

        The empty stack says nothing.
        """
        if state.ended:
            return super().output(state)
        cells, stack, *_ = state.features
        if not state.point:
            return cells.new_zeros(state.count, self.config["classes"])
        said: Tensor = self.answer(stack.amin(1, keepdim=True))
        return said

    def _kinds(self) -> list[tuple[int, Any, int]]:
        """Return the kinds of modules that make maps: the first one's choice, the modules, how many maps each takes."""
        return [(AND, [self.join], 2), (ONE + 1, self.moves, 1), (self.find, self.finds, 0)]

    def _in_roles(self, told: Tensor) -> Tensor:
        """Return which modules questions [n, bits] bool name in each role: [n, ROLES, choices] bool."""
        thing, side, other = told.split([self.properties, len(self.moves), self.properties], 1)
        moved = F.pad(side, (ONE + 1, self.properties))
        return torch.stack([F.pad(thing, (self.find, 0)), moved, F.pad(other, (self.find, 0))], 1)

    def _use(self, left: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the words that are left [n, ROLES, choices] after each row's module, and those it used [n, ROLES].

        A module uses up one word, the last one in the question that names it. The words of the other come last.
        """
        named = left & F.one_hot(action, self.num_choices)[:, None].bool()
        named[:, THING] &= ~named[:, OTHER]
        return left & ~named, named.any(2).float()

    def observe(self, state: State) -> Tensor:
        """Return how many words are left, what the maps are, and the words that are left.

        First comes how many words are left of those for the thing, for the side and for the other. Each map follows,
        the top one first: its greatest and its mean number, and how many words of each kind made it; where the stack
        holds fewer maps than it may, there are zeros. Then there is a 1 for each choice that a word for the thing still
        asks for, and so on for the side and the other. Last are the log-odds of all choices: moves and finds that any
        word asks for are likely, others are not; And is likeliest.
        """
        _, stack, left, words = state.features
        numbers = torch.stack([stack.amax((2, 3)), stack.mean((2, 3))], 2).float()
        maps = torch.cat([numbers, words], 2).flip(1).flatten(1)
        missing = (2 + ROLES) * (len(self.points) - 1) - maps.shape[1]
        asked = ASKED * (2 * left.any(1).float() - 1)
        asked[:, AND], asked[:, ANSWER : ONE + 1] = JOINED, 0.0
        return torch.cat([left.sum(2).float(), F.pad(maps, (0, missing)), left.flatten(1).float(), asked], 1)

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the one network's answers; with a rate, those of the parser's layouts.

        Rows of rate 1 are the one network's then, too.
        """
        if rate is None:
            yield from super().training_outputs(inputs, rate, generator)
            return
        route, whole = self.layout(self.question(inputs)), (rate == 1).unsqueeze(1).to(inputs.device)
        route = torch.where(whole, self.dense_actions(len(inputs), inputs.device), route)
        yield self.run_training(inputs, lambda state: state.along(route))[1]

    def constant_routes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return no routes: a layout for one question answers no other."""
        return []

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each module runs on the first rows of the batch, as many as chose it."""
        counts = [torch.bincount(column[column >= 0], minlength=self.num_choices).tolist() for column in route.t()]
        asked = self.question(inputs)
        kinds = [(first + k, module, takes) for first, kind, takes in self._kinds() for k, module in enumerate(kind)]

        def run() -> Tensor:
            cells = self.stem(inputs[:, :-1])
            said = maps = cells.new_zeros(len(cells), 2, *cells.shape[2:])
            for sizes in counts:
                for choice, module, takes in kinds:
                    if size := sizes[choice]:
                        module(maps[:size, :takes] if takes else cells[:size])
                if size := sizes[ANSWER]:
                    said = self.answer(maps[:size, :1])
                if size := sizes[ONE]:
                    said = self.network(cells[:size], asked[:size])
            return said

        return run
