"""Unrolled networks apply one block again and again, and each row stops when it has an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynrl.backbones.base import Answer, Backbone
from dynrl.backbones.early import EXIT_SCORES, SCORES
from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.walk import END, GO_ON, STOP, Point, State, Walk
from dynrl.cost import count_macs
from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.move import keep_rows
from dynrl.schema import MOST_ROWS, check_count, check_counts

MOST_STEPS = 1_000
LEAST = 1e-4  # sizes below that, in pixels of 0 to 1, look alike to a policy

Features = tuple[Tensor, ...]


class Unrolling(Backbone):
    """This is the base class of networks with one block in a loop: action 0 stops with the present answer, 1 goes on.

    Every row applies the block once before its first decision, so a network of K steps has K - 1 decisions, all at one
    point. A row pays for a step and for the step's answer when it takes the step. A family writes what comes before the
    loop, one step, and the answer.
    """

    decision, stops = "unroll", STOP
    rule = "threshold"
    speaks = True
    exports = True

    def _lead(self, inputs: Tensor) -> Features:
        """Run what comes before the first step; return the features, each [n, ...]."""
        raise NotImplementedError

    def _step(self, features: Features) -> Features:
        """Apply the block once."""
        raise NotImplementedError

    def _answer(self, features: Features) -> Tensor:
        """Return the output [n, ...] after a step."""
        raise NotImplementedError

    def _set_loop(self, steps: int, lead_macs: int, step_macs: int, width: int) -> None:
        """Pose the loop.

        Args:
            steps: how often the dense network applies the block.
            lead_macs: the MACs of what comes before the first step.
            step_macs: the MACs of a step with its answer.
            width: the numbers that `observe` shows.
        """
        check_count("steps", steps, 2, MOST_STEPS)
        self._steps = steps
        self._pose(
            [Point("again", 2, visits=steps - 1)],
            costs=[[0, step_macs]], start_macs=lead_macs + step_macs, full_route=(GO_ON,) * (steps - 1),
            feature_width=width,
        )  # fmt: skip

    def lengthen(self, max_steps: int) -> None:
        """Do `Backbone.lengthen`; the full route, in whose MACs shares are counted, stays as long as it was trained."""
        trained = self._steps - 1
        check_count("max_steps", max_steps, trained, MOST_STEPS)
        beyond, device = max_steps - trained, self.costs.device
        self._pose(
            [Point("again", 2, visits=max_steps)],
            costs=self.costs.tolist(), start_macs=self.start_macs, feature_width=self.feature_width,
            full_route=(GO_ON,) * trained + (STOP,) * min(beyond, 1) + (-1,) * (beyond - 1),
        )  # fmt: skip
        self.costs = self.costs.to(device)

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        return self._go_on(walk, rows, self._lead(inputs))

    def _go_on(self, walk: Walk, rows: Tensor, features: Features) -> State:
        features = self._step(features)
        walk.put_output(rows, self._answer(features))
        return State(walk, 0, rows, features)

    def _run(self, state: State, action: Tensor) -> list[State]:
        walk, rows = state.walk, state.rows
        ended, going = keep_rows(action == STOP, rows), keep_rows(action == GO_ON, rows, state.features)
        reached = [] if ended is None else [State(walk, END, ended[0])]
        if going is None:
            return reached
        on = self._go_on(walk, *going)
        if isinstance(on.visit, int):
            return [*reached, self._at(on)]
        last = on.visit == self.max_steps
        return reached + [part for part in (on.where(last, END), on.where(~last, 0)) if part.count]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        assert isinstance(state.walk, GatedWalk)
        state.walk.leave(gates, STOP)
        return self._at(self._go_on(state.walk, state.rows, state.features))

    def _at(self, on: State) -> State:
        """Return the state of rows that have gone on together: where the last step is done, they have ended."""
        return State(on.walk, END, on.rows) if on.visit == self.max_steps else on

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the answers of all steps in one pass, weighted equally; without a rate, the last."""
        features, answers, rows = self._lead(inputs), [], torch.arange(len(inputs), device=inputs.device)
        for step in range(1, self._steps + 1):
            features = self._step(features)
            if rate is not None or step == self._steps:
                answers.append(Answer(self._answer(features), rows))
        yield answers

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each step runs on the first rows of the batch, as many as take it."""
        counts = [len(route), *(route == GO_ON).sum(0).tolist()]

        def run() -> None:
            features = self._lead(inputs)
            for count in counts:
                if count:
                    features = self._step(tuple(part[:count] for part in features))
                    self._answer(features)

        return run


class Unrolled(Unrolling):
    """A network of places that pass messages along links: each step moves what a place knows by one link.

    An input has a row for each place: the weights of its links to all places, then the place's own numbers. The block
    is one gated recurrent unit, shared by all places, on the sum of the messages that come in; so a place can hold what
    it knows. The answer is read off all places.

    Args:
        input_shape: (places, places + numbers of a place).
        classes: the number of outputs of the head.
        hidden: the number of units of each place.
        steps: how often the dense network applies the block.

    Sources: Gated Graph Sequence Neural Networks (Li et al. 2016, ICLR); Adaptive Computation Time for Recurrent Neural
    Networks (Graves 2016).
    """

    family = "unrolled"
    scores: ClassVar = EXIT_SCORES | {"change": (SCORES, False)}

    def __init__(self, input_shape: tuple[int, ...], classes: int = 10, hidden: int = 32, steps: int = 8) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        if len(input_shape) != 2 or input_shape[1] <= input_shape[0]:
            raise ValueError(
                f"expected inputs of shape (places, places + numbers of a place), got {tuple(input_shape)}"
            )
        for count, value in (("classes", classes), ("hidden", hidden)):
            check_count(count, value, 1, MOST_ROWS)
        self.input_shape = tuple(input_shape)
        self.config = {"input_shape": list(input_shape), "classes": classes, "hidden": hidden, "steps": steps}
        places, numbers = input_shape[0], input_shape[1] - input_shape[0]
        self.stem = nn.Linear(numbers, hidden)
        self.update, self.candidate = nn.Linear(2 * hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)
        self.head = nn.Linear(places * hidden, classes)
        step = sum(count_macs(layer, (places, 2 * hidden))[0] for layer in (self.update, self.candidate))
        step += places * places * hidden + count_macs(self.head, (places * hidden,))[0]
        self._set_loop(steps, count_macs(self.stem, (places, numbers))[0], step, SCORES + 1 + hidden)

    def _lead(self, inputs: Tensor) -> Features:
        places = self.input_shape[0]
        known = self.stem(inputs[:, :, places:]).tanh()
        # Links are laid out as the product reads them, since rows that go on are copied at each step.
        return known, inputs[:, :, :places].transpose(1, 2).contiguous(), known.new_zeros(known.shape[0])

    def _step(self, features: Features) -> Features:
        known, links, _ = features
        told = torch.bmm(links, known)
        keep, use = self.update(torch.cat([told, known], 2)).sigmoid().chunk(2, 2)
        new = self.candidate(torch.cat([told, use * known], 2)).tanh()
        moved = keep * (new - known)
        return known + moved, links, moved.float().square().mean((1, 2)).sqrt()

    def _answer(self, features: Features) -> Tensor:
        return self.head(features[0].flatten(1))

    def observe(self, state: State) -> Tensor:
        """Return how sure the present answer is (`exit_scores`), how far the last step moved the places, their mean."""
        known, _, change = state.features
        return torch.cat([exit_scores(self.output(state)), change.unsqueeze(1), known.mean(1).float()], 1)


class RecallNet(Unrolling):
    """A network over a row of cells: each step is two convolutions, by which a cell sees two neighbours each way.

    All steps see the input again (recall), so that nothing of it need be kept; there is no norm. The answer is read at
    the last cell that is not all zeros. An answer that depends on L cells needs L / 2 steps.

    Args:
        input_shape: (cells, numbers of a cell).
        classes: the number of outputs of the head.
        width: the number of channels of each cell.
        steps: how often the dense network applies the block.

    Sources: Schwarzschild et al. 2021 (NeurIPS, "Can You Learn an Algorithm?"); Bansal et al. 2022 (NeurIPS, recall).
    """

    family = "recall_net"
    scores: ClassVar = EXIT_SCORES | {"change": (SCORES, False)}

    def __init__(self, input_shape: tuple[int, int], classes: int = 2, width: int = 32, steps: int = 12) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        if len(input_shape) != 2:
            raise ValueError(f"expected inputs of shape (cells, numbers of a cell), got {tuple(input_shape)}")
        for count, value in (("classes", classes), ("width", width)):
            check_count(count, value, 1, MOST_ROWS)
        self.input_shape = tuple(input_shape)
        self.config = {"input_shape": list(input_shape), "classes": classes, "width": width, "steps": steps}
        cells, numbers = input_shape
        self.stem = nn.Conv1d(numbers, width, 3, padding=1)
        self.first = nn.Conv1d(width + numbers, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, classes)
        for layer in (self.stem, self.first, self.second):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.second.weight.data.mul_(0.1)  # at first, a step changes little
        lead, *step = (cells * layer.weight.numel() for layer in (self.stem, self.first, self.second))
        self._set_loop(steps, lead, sum(step) + count_macs(self.head, (width,))[0], SCORES + 1 + width)

    def _lead(self, inputs: Tensor) -> Features:
        given = inputs.mT.contiguous()
        told = (inputs != 0).any(2) * torch.arange(inputs.shape[1], device=inputs.device)
        return self.stem(given).relu(), given, told.argmax(1), inputs.new_zeros(inputs.shape[0])

    def _step(self, features: Features) -> Features:
        known, given, last, _ = features
        moved = (known + self.second(self.first(torch.cat([known, given], 1)).relu())).relu()
        return moved, given, last, _size(moved - known)

    def _answer(self, features: Features) -> Tensor:
        known, _, last, _ = features
        return self.head(known.gather(2, last.view(-1, 1, 1).expand(-1, known.shape[1], 1)).squeeze(2))

    def observe(self, state: State) -> Tensor:
        """Return how sure the present answer is (`exit_scores`), how far the last step moved the cells, their mean."""
        known, _, _, change = state.features
        told = [exit_scores(self.output(state)), change.unsqueeze(1), known.mean(2)]
        return torch.cat([part.float() for part in told], 1)

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the answers of all steps; without a rate, half the weight is the last's, half that of a random one."""
        (answers,) = super().training_outputs(inputs, inputs.new_ones(len(inputs)))
        if rate is None:
            early = int(torch.randint(self._steps - 1, (1,), generator=generator))
            answers = [replace(answers[step], weight=0.5) for step in (early, -1)]
        yield answers


class Restorer(Unrolling):
    """A network that restores images step by step: each step adds what one small convolutional unit says is missing.

    The unit sees the present image and the one that came in. Later steps make noisy images better and clean ones worse,
    so each image is trained at the step that suits it best.

    Args:
        input_shape: (channels, height, width) of the images that come in, of 3 pixels or more each way, and go out.
        classes: the number of outputs at each pixel, which is that of the channels.
        width: the number of inner channels of the unit.
        steps: how often the dense network applies the unit.

    Source: Dynamically Unfolding Recurrent Restorer (Zhang et al. 2019, ICLR), which is trained with as many steps for
    each level of noise as were chosen by hand.
    """

    family = "restorer"
    hindsight = True
    scores: ClassVar = {"change": (0, False), "noise": (1, False), "residual": (2, True)}

    def __init__(self, input_shape: tuple[int, int, int], classes: int = 1, width: int = 16, steps: int = 12) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        if len(input_shape) != 3 or min(input_shape[1:]) < 3 or input_shape[0] != classes:
            raise ValueError(
                f"expected images [channels, height, width] of at least 3x3 pixels, and an output for each of their "
                f"channels, got {tuple(input_shape)} and {classes} outputs"
            )
        check_count("width", width, 1, MOST_ROWS)
        self.input_shape = tuple(input_shape)
        self.config = {"input_shape": list(input_shape), "classes": classes, "width": width, "steps": steps}
        self.unit = nn.Sequential(
            nn.Conv2d(2 * classes, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, classes, 3, padding=1),
        )  # fmt: skip
        for parameter in self.unit[-1].parameters():  # at first, a step changes little
            parameter.data.mul_(0.01)
        self._set_loop(steps, 0, count_macs(self.unit, (2 * classes, *input_shape[1:]))[0], 4)

    def _lead(self, inputs: Tensor) -> Features:
        return inputs, inputs, inputs.new_zeros(inputs.shape[0])

    def _step(self, features: Features) -> Features:
        image, given, _ = features
        missing = self.unit(torch.cat([image, given], 1))
        return image + missing, given, _size(missing)

    def _answer(self, features: Features) -> Tensor:
        return features[0]

    def observe(self, state: State) -> Tensor:
        """Return the size of the last step's change, the noise that is left, what was taken off, the noise at first.

        They are logarithms of root mean squares, so that small ones are told apart, too.
        """
        image, given, change = (part.float() for part in state.features)
        told = torch.stack([change, noise_level(image), _size(image - given), noise_level(given)], 1)
        return told.clamp_min(LEAST).log()


def _size(x: Tensor) -> Tensor:
    """Return the root mean square of each row, [n]."""
    return x.square().flatten(1).mean(1).sqrt()


def noise_level(images: Tensor) -> Tensor:
    """Estimate the standard deviation of the noise in images [n, channels, height, width]: [n].

    Source: Fast Noise Variance Estimation (Immerkaer 1996, Computer Vision and Image Understanding 64): the mean size
    of what a mask that takes away edges leaves, which is 6 deviations of Gaussian noise times sqrt(2 / pi).
    """
    down = images[:, :, 2:] - 2 * images[:, :, 1:-1] + images[:, :, :-2]
    left = down[:, :, :, 2:] - 2 * down[:, :, :, 1:-1] + down[:, :, :, :-2]
    return left.abs().flatten(1).mean(1) * (math.sqrt(math.pi / 2) / 6)
