"""These networks read a text by jumps: after each token read, each row decides which token it reads next, if any."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Answer, Parts
from dynrl.backbones.recurrent import Recurrent
from dynrl.backbones.walk import END, STOP, Point, State, Walk
from dynrl.ops.gated_cell import gated_cell, gated_cell_macs, recurrent_cell
from dynrl.routes import draw_routes
from dynrl.schema import MOST_ROWS, check_count, check_counts
from dynrl.vocabulary import PADDING


class Texts(Recurrent):
    """This is the base class of networks that read texts: token ids, int64, each text followed by zeros.

    Attributes:
        tokens: the number of token ids, the padding's included.
    """

    input_dtype = "int64"
    tokens: int

    def check_inputs(self, inputs: Tensor) -> None:
        """Also refuse ids that are no token's, and texts without a token."""
        super().check_inputs(inputs)
        least, most = (int(each) for each in inputs.aminmax())
        if not 0 <= least <= most < self.tokens:
            raise ValueError(f"expected token ids in 0..{self.tokens - 1}, got {least}..{most}")
        if bool((inputs[:, 0] == PADDING).any()):
            raise ValueError(f"expected texts of one token or more, got one that begins with {PADDING}, the padding")

    def random_inputs(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """Return texts of random tokens, without padding."""
        return torch.randint(1, self.tokens, (rows, *self.input_shape), generator=generator)

    def _set_sizes(self, input_shape: tuple[int], classes: int, tokens: int, width: int, hidden: int) -> None:
        """Check the sizes that all such networks have, and make the embedding."""
        if len(input_shape) != 1:
            raise ValueError(f"expected token ids, inputs of shape (length,), got {tuple(input_shape)}")
        check_count("the length of a text", input_shape[0], 2, MOST_ROWS)
        for count, value in (("classes", classes), ("tokens", tokens), ("width", width), ("hidden", hidden)):
            check_count(count, value, 2 if count == "tokens" else 1, MOST_ROWS)
        self.input_shape, self.tokens, self.hidden = tuple(input_shape), tokens, hidden
        self.embedding = nn.Embedding(tokens, width, PADDING)

    @staticmethod
    def lengths(inputs: Tensor) -> Tensor:
        """Return how many tokens each text has: [n]."""
        return (inputs != PADDING).cumprod(1).sum(1)


class JumpRNN(Texts):
    """A GRU that reads a text: after each token, a row goes on to another token or stops with the answer it has.

    Choice 0 stops. The next choices are jumps of `jumps` tokens, of which the first, 1, reads on. Then follows a choice
    for each entry of `ends`: to the token behind the next mark of that kind, the next sentence for example. With
    `follow`, the last choice goes to the position that the token just read names: token 1 names the first one. A choice
    that leads beyond the end of the text is a stop.

    Each row has a cursor. The cell runs on the embedding of the token there, for the rows that read one. Looking an
    embedding up and looking for marks are no MACs. Nothing is known of a position but what the state remembers.

    Args:
        input_shape: (length,), the number of tokens of the longest text. Inputs are token ids, int64; texts are
            followed by zeros.
        classes: the number of outputs of the head.
        tokens: the number of token ids, the padding's included.
        width: the number of numbers of an embedding.
        hidden: the number of hidden units.
        jumps: the lengths of jumps, from 1 on, rising.
        ends: for each kind of end, the ids of the tokens that mark it, from short parts (clauses) to long ones.
        follow: whether a row may go where the token names.

    Source: LSTM-Jump (Yu et al. 2017, ACL), whose jumps are numbers of tokens; Structural-Jump-LSTM (Hansen et al.
    2019, ICLR), whose jumps go to the ends of words, clauses and sentences.
    """

    family, decision, layer, name = "jump_rnn", "jump", nn.GRU, "gru"
    speaks = True
    stops = STOP
    gates = False  # the mean of two texts' positions is none
    budgets = (0.03, 0.1, 0.2, 0.35, 0.5)  # of a text, not of a network: a few words may do
    _marks: Tensor  # [kinds, tokens] bool
    _hops: Tensor  # [choices]

    def __init__(
        self,
        input_shape: tuple[int],
        classes: int = 10,
        tokens: int = 256,
        width: int = 32,
        hidden: int = 64,
        jumps: tuple[int, ...] = (1, 2, 5),
        ends: tuple[tuple[int, ...], ...] = (),
        follow: bool = False,
    ) -> None:
        super().__init__()
        self._set_sizes(input_shape, classes, tokens, width, hidden)
        check_counts("jumps", jumps)
        if jumps[0] != 1 or list(jumps) != sorted(set(jumps)):
            raise ValueError(f"expected jumps that rise from 1, which reads on, got {tuple(jumps)}")
        for marks in ends:
            check_counts("ends", marks, 1, tokens)
        (length,) = input_shape
        self.config = {
            "input_shape": [length], "classes": classes, "tokens": tokens, "width": width, "hidden": hidden,
            "jumps": list(jumps), "ends": [list(marks) for marks in ends], "follow": follow,
        }  # fmt: skip
        self.follow = follow
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, classes)
        self.read_macs = gated_cell_macs(1, width, hidden, 3)
        kinds = len(ends) + follow
        # A stop, like a mark that is not there, leads beyond the end of any text.
        self.register_buffer("_hops", torch.tensor([length, *jumps, *[0] * kinds]), persistent=False)
        marked = torch.zeros(len(ends), tokens, dtype=torch.bool)
        for kind, marks in enumerate(ends):
            marked[kind, list(marks)] = True
        self.register_buffer("_marks", marked, persistent=False)
        self._pose(
            [Point("next", 1 + len(jumps) + kinds, visits=length - 1)],
            costs=[[0, *[self.read_macs] * (len(jumps) + kinds)]],
            start_macs=self.read_macs + hidden * classes,
            full_route=(1,) * (length - 1),
            feature_width=hidden + 2,
            thrift=[[0.0, *(1 / far for far in _distances(jumps, len(ends), length if follow else 0))]],
        )

    @classmethod
    def from_module(cls, embedding: nn.Embedding, rnn: nn.GRU, head: nn.Linear, length: int, **settings: Any) -> Self:
        """Build the backbone from a trained embedding, layer and head, all of which are copied.

        Args:
            embedding: of token ids, of which 0 is the padding.
            rnn: an `nn.GRU`.
            head: the layer that reads the hidden state after a text's last token.
            length: the number of tokens of the longest text.
            settings: `jumps`, `ends` and `follow`.

        Raises:
            ValueError: the layer is of another type, has more than one layer or direction, or the parts do not fit.
        """
        cls._check_modules(rnn, head)
        if not isinstance(embedding, nn.Embedding) or embedding.embedding_dim != rnn.input_size:
            raise ValueError(f"expected an nn.Embedding of {rnn.input_size} numbers, got {embedding}")
        if embedding.padding_idx not in (None, PADDING):
            raise ValueError(f"expected token id {PADDING} as the padding, got {embedding}")
        tokens, width = embedding.num_embeddings, rnn.input_size
        backbone = cls((length,), head.out_features, tokens, width, rnn.hidden_size, **settings)
        for mine, given in ((backbone.embedding, embedding), (backbone.gru, rnn), (backbone.fc, head)):
            mine.load_state_dict(given.state_dict())
        return backbone.eval().to(head.weight)

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        lengths = self.lengths(inputs)
        own = {"at": torch.zeros_like(lengths), "length": lengths, "behind": self._behind(inputs)}
        for name, value in own.items():
            if rows is walk.all_rows:
                walk.own[name] = value
            else:
                walk.own[name][rows] = value
        h = self.fc.weight.new_zeros(inputs.shape[0], self.hidden)
        return State(walk, 0, rows, recurrent_cell(self.embedding(inputs[:, 0]), h, *self._weights()))

    def _behind(self, inputs: Tensor) -> Tensor:
        """Return the position behind the next mark of each kind, from each position on: [n, kinds, length]."""
        length = inputs.shape[1]
        after = torch.arange(1, length + 1, device=inputs.device)
        found = after.where(self._marks[:, inputs].transpose(0, 1), length)
        return found.flip(2).cummin(2).values.flip(2)

    def _goal(self, state: State, action: Tensor) -> Tensor:
        """Return the position that each row's choice leads to, beyond the text for a stop: [n]."""
        walk, at = state.walk, state.get(state.walk.own["at"])
        goal, kinds = at + self._hops[action], len(self._marks)
        first = self.points[0].n - kinds - self.follow
        for kind in range(kinds):
            behind = walk.own["behind"][state.rows, kind, at]
            goal = behind.where(action == first + kind, goal)
        if self.follow:
            goal = (walk.inputs[state.rows, at] - 1).where(action == first + kinds, goal)
        return goal

    def advance(self, state: State, action: Tensor) -> list[State]:
        """Do `Backbone.advance`; a choice that leads beyond the end of its text is a stop, and recorded as one."""
        walk, goal = state.walk, self._goal(state, action)
        walk.own["at"][state.rows] = goal
        return super().advance(state, action.where(goal < state.get(walk.own["length"]), STOP))

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, rows = state.walk, state.rows
        goal, length = (state.get(walk.own[name]) for name in ("at", "length"))  # the cursor has moved
        reads = goal < length
        ids = walk.inputs[rows, goal.where(reads, 0)]
        h = gated_cell(self.embedding.weight, state.features, reads, *self._weights(), x_rows=ids)
        on, going = State(walk, 0, rows, h), (goal + 1 < length) & (state.visit < self.max_steps)
        ended = on.where(~going, END)
        if not ended.count:
            return [on]
        walk.put_output(ended.rows, self.fc(ended.features))
        ended.features = None
        return [part for part in (ended, on.where(going, 0)) if part.count]

    def output(self, state: State) -> Tensor:
        """Return the outputs: those that rows ended with, or those that they would stop with now."""
        return super().output(state) if state.ended else self.fc(state.features)

    def observe(self, state: State) -> Tensor:
        """Return the hidden state, and how much of the longest text lies before the cursor and behind it."""
        at, length = (state.get(state.walk.own[name]) for name in ("at", "length"))
        place = torch.stack([at, length - at], 1).float() / self.input_shape[0]
        return torch.cat([state.features.float(), place], 1)

    def run_training(self, inputs: Tensor, choose: Callable[[State], Tensor]) -> tuple[Walk, list[Answer]]:
        """Do `Backbone.run_training` in float32.

        Rows leave at every step. For each new number of rows, oneDNN would make new kernels for bfloat16, which takes
        longer than the products.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            return super().run_training(inputs, choose)

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield `Backbone.training_outputs`: of rows that read all by torch's own layer, and of short random routes.

        Random routes stop after some twice the square root of the longest text's tokens. A step of a walk costs as
        much time for one row as for many, so the few rows that read on would cost most of the time.
        """
        rate = torch.ones(len(inputs)) if rate is None else rate
        whole, rest = (((rate == 1) == alike).nonzero().flatten() for alike in (True, False))
        if len(whole):
            yield [Answer(self.whole(inputs[whole]), whole.to(inputs.device), len(whole) / len(inputs))]
        if len(rest):
            reads = min(self.columns, math.ceil(2 * self.input_shape[0] ** 0.5))
            route = F.pad(draw_routes(self.thrift[:reads], rate[rest], generator), (0, self.columns - reads))
            route = route.to(inputs.device)
            walk, _ = self.run_training(inputs[rest], lambda state: state.along(route))
            assert walk.outputs is not None
            yield [Answer(walk.outputs, rest.to(inputs.device), len(rest) / len(inputs))]

    def whole(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the full route, by torch's own layer."""
        last = self.lengths(inputs) - 1
        states = self.gru(self.embedding(inputs))[0]
        return self.fc(states[torch.arange(len(inputs), device=inputs.device), last])

    def constant_routes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return `Backbone.constant_routes`, each by the name of its jump."""
        jumps, kinds = self.config["jumps"], range(1, len(self._marks) + 1)
        names = ["first word", *(f"jumps of {far}" for far in jumps), *(f"ends {kind}" for kind in kinds)]
        names += ["follow"] * self.follow
        return [(name, (choice,) * self.columns) for choice, name in enumerate(names)]

    def regions(self, inputs: Tensor, route: Tensor) -> list[list[Parts]]:
        """Return `Backbone.regions`: the tokens that are read, of a text as an image of one line.

        The first token, which is read before the first decision, comes first.
        """
        found = [[[[0, 0, 1, 1]]] for _ in range(len(inputs))]

        def watch(state: State) -> Tensor:
            action = state.along(route)
            goals, lengths = self._goal(state, action), state.get(state.walk.own["length"])
            for row, goal, length in zip(state.rows.tolist(), goals.tolist(), lengths.tolist(), strict=True):
                if goal < length:
                    found[row].append([[0, goal, 1, 1]])
            return action

        self.run(inputs, watch)
        return found

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: the cell runs on the first rows of the batch, as many as read at each step."""
        with torch.no_grad():
            walk = self.run_route(inputs, route.clamp_min(0))
        reads = (walk.macs - self.start_macs) // self.read_macs  # after the first token
        counts = [len(inputs), *(int((reads > step).sum()) for step in range(int(reads.max())))]

        def run() -> Tensor:
            h = self.fc.weight.new_zeros(inputs.shape[0], self.hidden)
            for step, count in enumerate(counts):
                x = self.embedding.weight[inputs[:count, step]]
                recurrent_cell(x, h[:count], *self._weights(), out=h[:count])
            return self.fc(h)

        return run


def _distances(jumps: Sequence[int], kinds: int, length: int) -> list[float]:
    """Return how far each choice that reads leads, as random routes are drawn by it; no `length` is no `follow`.

    A mark is taken to be farther than the longest jump and each further kind farther still; a named position is half of
    the text away.
    """
    ends = [jumps[-1] * 2 ** (kind + 1) for kind in range(kinds)]
    return [*jumps, *ends, *([max(1, length / 2)] if length else [])]
