"""Graphs are what a routed model runs on a CUDA device, recorded for sizes of inputs that come again.

A walk launches many short kernels, which a device finishes sooner than Python can launch them. A recording is replayed
without Python. A walk is recorded whole or in pieces, and its points run by one or another of the ways that the family
states (`Backbone.captures`). Which is fastest depends on the network, the point, the batch and the device, so all are
timed there.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynrl.backbones import Backbone, State, Walk
from dynrl.backbones.pieces import Pieces
from dynrl.ops.recorder import Recorder, Told, recorder_for, records

if TYPE_CHECKING:
    from dynrl.deploy.routed import RoutedModel

Choose = Callable[[State], Tensor]

WAYS = ("kernels", "select", "pieces")  # how a point can run

KEPT = 4  # how many recordings are kept
MET = 64  # how many sizes that have come once are remembered


class Facts:
    """A recording fixes these facts of a model; if they change, a replay would give another model's outputs.

    They are the price, the limit, the policy's weights, and where the backbone's weights lie.
    """

    def __init__(self, model: RoutedModel) -> None:
        # To look into these dictionaries takes a tenth of the time of `parameters()`, and every call does it.
        parts = [part._parameters for part in model.backbone.modules()]
        slots = [(part, name) for part in parts for name, weight in part.items() if weight is not None]
        self._parts, self._names = zip(*slots, strict=True)
        self._weights: list[Tensor] = [part[name] for part, name in slots]  # type: ignore[misc]
        self._addresses = list(map(Tensor.data_ptr, self._weights))
        # The graphs read the policy's tables where they lie now, so they are held.
        self.policy, self.price, self.limit, self.choose = model.made

    def hold(self, model: RoutedModel) -> bool:
        """Tell whether they are still those of `model`."""
        return (
            (model.price, model.limit) == (self.price, self.limit)
            and self.policy.hold(model.policy)
            and all(map(is_, map(dict.get, self._parts, self._names), self._weights))
            and list(map(Tensor.data_ptr, self._weights)) == self._addresses
        )

    def check(self, model: RoutedModel) -> None:
        """Refuse, with a ValueError, a model that has changed."""
        for name in ("price", "limit"):
            then, now = getattr(self, name), getattr(model, name)
            if then != now:
                raise ValueError(f"captured at the {name} {then}, the model is now at {now}; capture it again")
        if not self.hold(model):
            raise ValueError(
                "the model was moved, or other weights were loaded or written, since it was captured; capture it again"
            )


def ways_of(model: RoutedModel) -> tuple[str, ...]:
    """Return the ways in which points of `model` can be recorded, names in `WAYS`; none if it has to run as it is."""
    sight = model.policy.sight
    steps = model.price_range is not None and sight is not None and sight.span == 1
    return model.backbone.captures if steps else ()


def whole_ways(model: RoutedModel) -> tuple[str, ...]:
    """Return those of `ways_of(model)` in which points of a whole recording can run."""
    return tuple(way for way in ways_of(model) if way != "pieces")


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """Inside this context, tensors are plain ones without a graph: callers may write to them and train on them."""
    # A caller's autocast would change the model's type.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class Recorded:
    """This is the base class of recordings of a walk, of `inputs` whose values each replay walks.

    Attributes:
        walk: the walk that the last replay has done.
    """

    walk: Walk

    def __init__(self, inputs: Tensor) -> None:
        self._inputs, self._told = inputs, Told(inputs.device, 1, torch.float32)
        self._sum, self._everything = self._told.there[0], tuple(range(inputs.dim()))

    def __call__(self) -> bool:
        """Walk the inputs, and return `finite`."""
        self.launch()
        return self.finite()

    def launch(self) -> None:
        """Walk the inputs; if possible without waiting for the device."""
        raise NotImplementedError

    def finite(self) -> bool:
        """Tell whether the inputs were finite, which the device says soon; if not, what the walk holds is worthless."""
        return math.isfinite(self._told.read()[0])

    def report(self) -> list[dict[str, Any]]:
        """Return what is to be known of each point."""
        raise NotImplementedError

    def _look(self) -> None:
        """Send what `finite` tells, a sum that is NaN or infinite if any element is (`Form.check`)."""
        # It comes before the walk and not in its graph, so that the host need not wait for the walk.
        if self._inputs.is_floating_point():
            torch.sum(self._inputs, self._everything, dtype=torch.float32, out=self._sum)
            self._told.send()
            self._told.sent()


class Whole(Recorded):
    """A whole recording is one graph: no op asks the host how many rows made a choice.

    Each point runs by the fastest of some ways, as they are timed there on the first inputs, on the rows that choose
    each branch then.

    Args:
        backbone: the network.
        choose: the model's function from a state to choices.
        inputs: the tensor whose values each replay walks.
        recorder: what records.
        ways: one way or more, names in `WAYS`. By kernels, ours read from the device's memory how many rows run. By
            selection, all rows run, and what was not chosen has no effect.

    Attributes:
        replay: a function that does `launch` where nobody will ask for `finite`.
    """

    def __init__(
        self, backbone: Backbone, choose: Choose, inputs: Tensor, recorder: Recorder, ways: tuple[str, ...]
    ) -> None:
        super().__init__(inputs)
        self._backbone, self._choose, self._recorder, self._ways = backbone, choose, recorder, ways
        self._at = dict[int, tuple[str, dict[str, float]]]()  # for each point, the way and what each of them took
        with self._by(ways[0]):
            # Kernels choose their tiles while all rows are at work: on few rows, all tiles would take the same time.
            backbone.run_route(inputs, backbone.dense_actions(len(inputs), inputs.device))
        self._run(self._measured)
        self.replay = recorder.record(self._record)

    def launch(self) -> None:
        """Walk the inputs without waiting for the device."""
        self._look()
        self.replay()

    def report(self) -> list[dict[str, Any]]:
        """Return the way of each point, and what each way took there if there was a choice."""
        return [
            {"point": self._backbone.points[point].name, "by": way, "milliseconds": times}
            for point, (way, times) in sorted(self._at.items())
        ]

    def _by(self, way: str) -> AbstractContextManager[None]:
        return self._recorder.counts(way == "select")

    def _record(self) -> None:
        self._run(lambda state, action: self._at[state.point][0])

    def _run(self, way_at: Callable[[State, Tensor], str]) -> None:
        with self._recorder.counts():
            state = self._backbone.begin(self._inputs)
            self.walk, action = state.walk, self._choose(state)
        while not state.ended:
            state, action = self._step(state, action, way_at(state, action))

    def _step(self, state: State, action: Tensor, way: str) -> tuple[State, Tensor]:
        """Take the choices of a state, and make those at the next point, which take longer if a way leaves no sums."""
        with self._by(way):
            (reached,) = self._backbone.advance(state, action)  # all rows stay together
            return reached, action if reached.ended else self._choose(reached)

    def _measured(self, state: State, action: Tensor) -> str:
        """Return the fastest way from a state, timed when its point comes first."""
        if state.point not in self._at:
            tried = self._ways if len(self._ways) > 1 else ()
            times = {way: self._milliseconds(state, action, way) for way in tried}
            self._at[state.point] = min(times, key=times.__getitem__, default=self._ways[0]), times
        return self._at[state.point][0]

    def _milliseconds(self, state: State, action: Tensor, way: str) -> float:
        def run() -> None:
            self._step(state.again(), action, way)

        return self._recorder.milliseconds(self._recorder.record(run, state.written), state.written)


class InPieces(Recorded):
    """A recording in pieces has a graph for each point and for some numbers of rows, for blocks that are any module.

    It is what `dynrl.backbones.pieces` makes of the walk, with the choices at the end of each piece. The arguments are
    those of `Whole`; for each number of rows, a piece computes as few or as many of them as is fastest.
    """

    def __init__(self, backbone: Backbone, choose: Choose, inputs: Tensor, recorder: Recorder) -> None:
        super().__init__(inputs)

        def decide(walked: Pieces, state: State) -> None:
            if not state.ended:
                walked.decide(state, choose(state))

        self._count, self._speaks = len(backbone.points), backbone.speaks
        self.pieces = Pieces(backbone, inputs, recorder, decide)
        self.walk = self.pieces.walk

    def launch(self) -> None:
        """Walk the inputs, and wait for the device at each point."""
        self._look()
        self.pieces.start()
        for point in range(self._count):
            if not self._speaks:
                self.pieces.go_on_together(point)
                continue
            count = self.pieces.running(point)
            if count == 0:
                break  # all rows have left with their answers
            self.pieces.go_on(point, count)

    def report(self) -> list[dict[str, Any]]:
        """Return `dynrl.backbones.pieces.Pieces.report`."""
        return self.pieces.report()


class Recording:
    """A recording walks inputs of one size as a model would, whole or in pieces, as was faster on the first inputs.

    Args:
        model: the model.
        inputs: the first inputs, which everything is timed on.
        recorder: what records.

    Attributes:
        way: "whole" or "pieces".
        milliseconds: what each of them took on the device.
    """

    def __init__(self, model: RoutedModel, inputs: Tensor, recorder: Recorder) -> None:
        before = recorder.memory()
        self._facts, self._recorder = Facts(model), recorder
        self.milliseconds, best = dict[str, float](), None
        with plain(inputs.device):
            self._inputs = inputs.clone()
            given = model.backbone, self._facts.choose, self._inputs, recorder
            for way, make in self._kinds(model).items():
                ran = make(*given)
                ran()  # pieces are recorded when they are first needed
                self.milliseconds[way] = recorder.milliseconds(ran.launch)
                if best is None or self.milliseconds[way] < self.milliseconds[self.way]:
                    self.way, best = way, ran
        assert best is not None, "a model with no way to be recorded runs as it is"
        self._best = best
        self._bytes = recorder.memory() - before

    @staticmethod
    def _kinds(model: RoutedModel) -> dict[str, Callable[..., Whole | InPieces]]:
        ways = whole_ways(model)
        whole = {"whole": partial(Whole, ways=ways)} if ways else {}
        return whole | ({"pieces": InPieces} if "pieces" in ways_of(model) else {})

    def fits(self, model: RoutedModel) -> bool:
        """Tell whether the model is still as it was."""
        return self._facts.hold(model)

    def walk(self, inputs: Tensor) -> Walk | None:
        """Return the walk of `inputs`, in tensors of its own; None if they hold NaN or infinity."""
        with torch.inference_mode(False), torch.no_grad(), self._recorder.turn():
            self._inputs.copy_(inputs)
            self._best.launch()
            walk = self._best.walk.taken()  # before the wait, so that the device goes on without one
            return walk if self._best.finite() else None

    def report(self) -> dict[str, Any]:
        """Return what is recorded: the size of inputs, the way, what each way took, the memory, and the points."""
        return {
            "inputs": tuple(self._inputs.shape), "way": self.way, "milliseconds": self.milliseconds,
            "bytes": self._bytes, "points": self._best.report(),
        }  # fmt: skip


class Graphs:
    """Graphs keep recordings of a model for the sizes of inputs that have come twice; the oldest are dropped.

    A network that cannot be recorded, because a block of it waits for the device, runs as it is.

    Attributes:
        enabled: whether anything is recorded and replayed.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._met, self._kept = OrderedDict[Any, str | None](), OrderedDict[Any, Recording]()
        self._lock = threading.RLock()

    def walk(self, model: RoutedModel, inputs: Any) -> Walk | None:
        """Return the walk of `inputs` by a recording; None if the model has to run as it is."""
        if not (self.enabled and records(inputs)):
            return None
        key = inputs.shape, inputs.dtype, inputs.device, model.price, model.limit
        with self._lock:
            recording = self._kept.get(key)
            if recording is None or not recording.fits(model):
                if not ways_of(model):
                    return None
                if recording is None and (key not in self._met or self._met[key] is not None):
                    _remember(self._met, key, self._met.get(key), MET)
                    return None
                model.backbone.check_inputs(inputs)
                try:
                    recording = Recording(model, inputs, recorder_for(inputs))
                except Exception as error:  # a user's block may do what cannot be recorded; memory may be short
                    why = f"{type(error).__name__}: {error}".splitlines()[0]
                    warnings.warn(f"inputs of {tuple(inputs.shape)} run without CUDA graphs: {why}", stacklevel=4)
                    _remember(self._met, key, why, MET)
                    return None
            _remember(self._kept, key, recording, KEPT)
            return recording.walk(inputs)

    def clear(self) -> None:
        """Drop all recordings."""
        with self._lock:
            self._met.clear()
            self._kept.clear()

    def report(self) -> list[dict[str, Any]]:
        """Return `Recording.report` of each recording, the oldest first, behind what could not be recorded and why."""
        with self._lock:
            failed = [{"inputs": tuple(key[0]), "why": why} for key, why in self._met.items() if why]
            return [*failed, *(recording.report() for recording in self._kept.values())]


def _remember(entries: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    entries[key] = value
    entries.move_to_end(key)
    while len(entries) > most:
        entries.popitem(last=False)
