"""Graphs are what a routed model runs on a CUDA device, recorded for sizes of inputs that come again.

A walk launches many short kernels, which a device finishes sooner than Python can launch them. A recording is replayed
without Python. There are three ways to record a walk (`WAYS`), and which one is fastest depends on the network, the
batch and the device, so it is measured.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynrl.backbones import Backbone, State, Walk
from dynrl.backbones.pieces import Pieces
from dynrl.ops.recorder import Recorder, Told, recorder_for, records

if TYPE_CHECKING:
    from dynrl.deploy.routed import RoutedModel

Choose = Callable[[State], Tensor]

KEPT = 4  # how many recordings are kept
MET = 64  # how many sizes that have come once are remembered


class Facts:
    """A recording fixes these facts of a model; if they change, a replay would give another model's outputs.

    They are the price, the limit, the edition of the policy's weights, and where the backbone's weights lie.
    """

    def __init__(self, model: RoutedModel) -> None:
        # To look into these dictionaries takes a tenth of the time of `parameters()`, and every call does it.
        parts = [part._parameters for part in model.backbone.modules()]
        self._slots = [(part, name) for part in parts for name, weight in part.items() if weight is not None]
        # The graphs read the policy's tables where they lie now, so they are held.
        self.edition, self.price, self.limit, self.choose = model.made
        self._addresses = self._at()

    def _at(self) -> list[int]:
        return [0 if (weight := part.get(name)) is None else weight.data_ptr() for part, name in self._slots]

    def hold(self, model: RoutedModel) -> bool:
        """Tell whether they are still those of `model`."""
        now = model.made
        return now[:3] == (self.edition, self.price, self.limit) and self._addresses == self._at()

    def check(self, model: RoutedModel) -> None:
        """Refuse, with a ValueError, a model that has changed."""
        for name in ("price", "limit"):
            then, now = getattr(self, name), getattr(model, name)
            if then != now:
                raise ValueError(f"captured at the {name} {then}, the model is now at {now}; capture it again")
        if not self.hold(model):
            raise ValueError(
                "the model was moved, or other weights were loaded, since it was captured; capture it again"
            )


def ways_of(model: RoutedModel) -> tuple[str, ...]:
    """Return the names in `WAYS` of the ways in which `model` can be recorded; none if it has to run as it is."""
    sight = model.policy.sight
    steps = model.price_range is not None and sight is not None and sight.span == 1
    return model.backbone.captures if steps else ()


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """Inside this context, tensors are plain ones without a graph: callers may write to them and train on them."""
    # A caller's autocast would change the model's type.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class Whole:
    """A whole recording is one graph: no op asks the host how many rows made a choice.

    Args:
        backbone: the network.
        choose: the model's function from a state to choices.
        inputs: the tensor whose values each replay walks.
        recorder: what records.
        select: whether blocks run on all rows and some are selected; if not, kernels of ours read the counts.

    Attributes:
        walk: the walk that the last replay has done.
    """

    walk: Walk

    def __init__(self, backbone: Backbone, choose: Choose, inputs: Tensor, recorder: Recorder, select: bool) -> None:
        self._told = told = Told(inputs.device, 1)

        def run() -> None:
            told.there.copy_(_finite(inputs))
            told.send()
            with recorder.counts(select):
                self.walk = backbone.run(inputs, choose)

        with recorder.counts(select):
            # Kernels choose their tiles while all rows are at work: on few rows, all tiles would take the same time.
            backbone.run_route(inputs, backbone.dense_actions(len(inputs), inputs.device))
        self._replay = recorder.record(run)

    def __call__(self) -> bool:
        """Walk the inputs, and return whether they are finite; if not, what the walk holds is worthless."""
        self._replay()
        return bool(self._told.read()[0])

    def launch(self) -> None:
        """Walk the inputs without waiting for the device."""
        self._replay()

    def report(self) -> list[dict[str, Any]]:
        """Return what ran at each point; nothing is chosen there."""
        return []


class InPieces:
    """A recording in pieces has a graph for each point and for some numbers of rows, for blocks that are any module.

    It is what `dynrl.backbones.pieces` makes of the walk, with the choices at the end of each piece. The arguments are
    those of `Whole`.

    Attributes:
        walk: the walk that the last replay has done.
    """

    def __init__(self, backbone: Backbone, choose: Choose, inputs: Tensor, recorder: Recorder) -> None:
        self._told = Told(inputs.device, 1)

        def decide(walked: Pieces, state: State) -> None:
            if state.ended:
                return
            if state.point == 0:  # the host waits for this and for the first choices at once
                self._told.there.copy_(_finite(inputs))
                self._told.send()
            walked.decide(state, choose(state))

        self._count, self._speaks = len(backbone.points), backbone.speaks
        self.pieces = Pieces(backbone, inputs, recorder, decide)
        self.walk = self.pieces.walk

    def __call__(self) -> bool:
        """Do `Whole.__call__`."""
        self.pieces.start()
        for point in range(self._count):
            count = self.pieces.running(point)
            if point == 0 and not self._told.read()[0]:
                return False
            if count == 0 and self._speaks:
                break  # all rows have left with their answers
            self.pieces.go_on(point, count)
        return True

    def launch(self) -> None:
        """Walk the inputs, which has to wait for the device all the same."""
        self()

    def report(self) -> list[dict[str, Any]]:
        """Return `dynrl.backbones.pieces.Pieces.report`."""
        return self.pieces.report()


def _finite(inputs: Tensor) -> Tensor:
    # A sum is NaN or infinite if any element is (`Form.check`).
    return torch.isfinite(inputs.sum(dtype=torch.float32)) if inputs.is_floating_point() else inputs.new_ones(())


WAYS: Mapping[str, Callable[..., Whole | InPieces]] = {
    "kernels": partial(Whole, select=False), "select": partial(Whole, select=True), "pieces": InPieces
}  # fmt: skip


class Recording:
    """A recording walks inputs of one size as a model would, by the fastest of its ways on the first inputs.

    Args:
        model: the model.
        inputs: the first inputs, which the ways are timed on.
        recorder: what records.

    Attributes:
        way: the way, a name in `WAYS`.
        milliseconds: what each way took.
    """

    def __init__(self, model: RoutedModel, inputs: Tensor, recorder: Recorder) -> None:
        before = recorder.memory()
        self._facts, self._recorder = Facts(model), recorder
        self.milliseconds, best = dict[str, float](), None
        with plain(inputs.device):
            self._inputs = inputs.clone()
            for way in ways_of(model):
                ran = WAYS[way](model.backbone, self._facts.choose, self._inputs, recorder)
                ran()  # pieces are recorded when they are first needed
                self.milliseconds[way] = recorder.milliseconds(ran.launch)
                if best is None or self.milliseconds[way] < self.milliseconds[self.way]:
                    self.way, best = way, ran
        assert best is not None, "a model with no way to be recorded runs as it is"
        self._best = best
        self._bytes = recorder.memory() - before

    def fits(self, model: RoutedModel) -> bool:
        """Tell whether the model is still as it was."""
        return self._facts.hold(model)

    def walk(self, inputs: Tensor) -> Walk | None:
        """Return the walk of `inputs`, in tensors of its own; None if they hold NaN or infinity."""
        with plain(inputs.device), self._recorder.turn():
            self._inputs.copy_(inputs)
            if not self._best():
                return None
            walk = copy(self._best.walk)
            for name in ("outputs", "route", "macs", "steps", "last"):
                setattr(walk, name, getattr(walk, name).clone())
        return walk

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
        if not (self.enabled and records(inputs) and ways_of(model)):
            return None
        key = inputs.shape, inputs.dtype, inputs.device, *model.made[1:3]
        with self._lock:
            recording = self._kept.get(key)
            if recording is None or not recording.fits(model):
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
