"""Graphs are what a routed model runs on a CUDA device, recorded for sizes of inputs that come again.

A walk launches many short kernels, which a device finishes sooner than Python can launch them. A recording is replayed
without Python. There are three ways to record a walk (`WAYS`), and which one is fastest depends on the network, the
batch and the device, so it is measured.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynrl.backbones import State, Walk
from dynrl.backbones.walk import END
from dynrl.deploy.recorder import Recorder, Replay, Told, recorder_for, records
from dynrl.ops.move import each
from dynrl.ops.partition import partition

if TYPE_CHECKING:
    from dynrl.deploy.routed import RoutedModel

STEPS = 16  # a point is recorded for so many numbers of rows, evenly spaced up to the batch
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
        self.price, self.limit, self._edition = model.price, model.limit, model.policy.edition
        self._addresses = self._at()

    def _at(self) -> list[int]:
        return [0 if (weight := part.get(name)) is None else weight.data_ptr() for part, name in self._slots]

    def hold(self, model: RoutedModel) -> bool:
        """Tell whether they are still those of `model`."""
        same = self.price == model.price and self.limit == model.limit and self._edition == model.policy.edition
        return same and self._addresses == self._at()

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
        model: the model.
        inputs: the tensor whose values each replay walks.
        recorder: what records.
        select: whether blocks run on all rows and some are selected; if not, kernels of ours read the counts.

    Attributes:
        walk: the walk that the last replay has done.
    """

    walk: Walk

    def __init__(self, model: RoutedModel, inputs: Tensor, recorder: Recorder, select: bool) -> None:
        backbone, told = model.backbone, Told(inputs.device, 1)
        # The graph reads the policy's tables where they lie now, so they are held.
        self._told, self._choose = told, model.chooser

        def run() -> None:
            told.there.copy_(_finite(inputs))
            told.send()
            with recorder.counts(select):
                self.walk = backbone.run(inputs, self._choose)

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


@dataclass
class _Place:
    """What stands at one point, in tensors that stay where they are.

    Attributes:
        rows: [B] int64, the slots of the rows; the walk's `all_rows` where they are together.
        features: [B, ...] each, the features of the rows.
        index: [B] int64, the places of the rows that take choice 1, the last of them again behind the last.
        told: how many rows take choice 1; at the first point, also whether the inputs are finite.
        ways: for each capacity: what replays its piece, the capacity that it computes, and the milliseconds.
    """

    rows: Tensor
    features: Any
    index: Tensor
    told: Told
    ways: dict[int, tuple[Replay, int, float]]


class Pieces:
    """A recording in pieces has a graph for each point and for some numbers of rows, for blocks that are any module.

    A piece gathers the rows that take choice 1, computes the branch, puts them back, and goes on to the choices at the
    next point. Between pieces the host waits for one number, how many rows will run. It replays the piece for the least
    recorded number that holds them, filled up with repeats of the last row. Pieces are recorded when they are first
    needed. The idea is that of vLLM's piecewise graphs.

    The arguments are those of `Whole`.

    Attributes:
        walk: the walk that the last replay has done.
    """

    def __init__(self, model: RoutedModel, inputs: Tensor, recorder: Recorder, select: bool = False) -> None:
        backbone, size = model.backbone, len(inputs)
        self._backbone, self._recorder, self._choose = backbone, recorder, model.chooser
        self._inputs, self._places = inputs, dict[int, _Place]()
        self._outputs: Tensor | None = None
        self._capacities = [0, *sorted({math.ceil(size * step / STEPS) for step in range(1, STEPS + 1)})]
        self.walk = Walk(inputs, backbone.points, backbone.mac_table)
        self._begin()
        for point in range(len(backbone.points)):  # makes what stands at the points
            # Where no row runs a block, it shows whether the features stay where they are.
            self._go_on(point, size if backbone.speaks else 0)
        self._start = recorder.record(self._begin)

    def __call__(self) -> bool:
        """Do `Whole.__call__`."""
        self._start()
        for point in range(len(self._backbone.points)):
            count, *finite = self._places[point].told.read()
            if finite == [0]:
                return False
            if count == 0 and self._backbone.speaks:
                break  # all rows have left with their answers
            self._piece(point, count)()
        return True

    def launch(self) -> None:
        """Walk the inputs, which has to wait for the device all the same."""
        self()

    def _begin(self) -> None:
        walk = self.walk
        walk.reset()
        walk.begin(walk.all_rows)
        self._arrive(self._backbone._start(walk, walk.all_rows, self._inputs), None)

    def _go_on(self, point: int, capacity: int) -> None:
        place = self._places[point]
        state = State(self.walk, point, place.rows, place.features)
        self._arrive(self._backbone._run_rows(state, place.index[:capacity]), place.told.there[:1])

    def _arrive(self, state: State, arrived: Tensor | None) -> None:
        """Leave what the next piece needs: the choices of the rows of `state`, of which the first `arrived` count."""
        self._keep_outputs()
        if state.point == END:
            return
        place = self._place(state)
        count, walk = state.count, self.walk
        if place.rows is not walk.all_rows:
            place.rows[:count].copy_(state.rows)
        each(partial(_leave, count), place.features, state.features)
        walk.visits_together[state.point] = 0
        with self._recorder.counts():
            going = self._backbone.take(state, self._choose(state)) == 1
            if arrived is not None and not state.together:
                going &= walk.all_rows[:count] < arrived
            part = partition((~going).long(), 2)
            run = part.offsets[1:2].long()
        place.index[:count] = part.order.index_select(0, torch.minimum(walk.all_rows[:count], (run - 1).clamp_min(0)))
        place.told.there[:1] = run
        if state.point == 0:
            place.told.there[1:] = _finite(self._inputs)
        place.told.send()

    def _keep_outputs(self) -> None:
        walk = self.walk
        if walk.outputs is None or walk.outputs is self._outputs:
            return
        if self._outputs is None:
            self._outputs = torch.empty_like(walk.outputs)
        self._outputs.copy_(walk.outputs)
        walk.outputs = self._outputs

    def _place(self, state: State) -> _Place:
        """Return the place of `state`; if it is the first one there, make it: then all rows are there."""
        if state.point not in self._places:
            features = each(partial(_room, self._places.get(state.point - 1)), state.features)
            rows = state.rows if state.together else torch.empty_like(state.rows)
            told = Told(rows.device, 2 if state.point == 0 else 1)
            self._places[state.point] = _Place(rows, features, torch.empty_like(rows), told, {})
        return self._places[state.point]

    def _piece(self, point: int, count: int) -> Replay:
        """Return the fastest piece of `point` that holds `count` rows."""
        size, ways = len(self.walk), self._places[point].ways
        capacity = next(capacity for capacity in self._capacities if capacity >= count)
        for needed in (size, capacity):
            if needed not in ways:
                keep, run = self._changing(point), partial(self._go_on, point, needed)
                replay = self._recorder.record(run, keep)
                ways[needed] = replay, needed, self._recorder.milliseconds(replay, keep)
                # To compute all rows may take less time than to gather some, where they are many or a batch is small.
                if needed and ways[size][2] <= ways[needed][2]:
                    ways[needed] = ways[size]
        return ways[capacity][0]

    def _changing(self, point: int) -> list[Tensor]:
        """Return what the pieces of `point` change and may not be done twice."""
        walk, features = self.walk, self._places[point].features
        return [walk.steps, walk.last, walk.macs, walk.route, *_parts(features)]

    def report(self) -> list[dict[str, Any]]:
        """Return, for each point, how many rows are computed for each number of rows that was recorded."""
        return [
            {
                "point": self._backbone.points[point].name,
                "computes": {capacity: rows for capacity, (_, rows, _) in sorted(place.ways.items())},
            }
            for point, place in sorted(self._places.items())
        ]


def _finite(inputs: Tensor) -> Tensor:
    # A sum is NaN or infinite if any element is (`Form.check`).
    return torch.isfinite(inputs.sum(dtype=torch.float32)) if inputs.is_floating_point() else inputs.new_ones(())


def _leave(count: int, room: Tensor, value: Tensor) -> Tensor:
    if room.data_ptr() != value.data_ptr():
        room[:count].copy_(value)
    return room


def _room(before: _Place | None, value: Tensor) -> Tensor:
    """Return `value` itself if it is what lay at the point before, changed in place; else room for it."""
    stays = before is not None and any(value is part for part in _parts(before.features))
    return value if stays else torch.empty_like(value)


def _parts(features: Any) -> tuple[Tensor, ...]:
    return features if isinstance(features, tuple) else (features,)


WAYS: Mapping[str, Callable[..., Whole | Pieces]] = {
    "kernels": partial(Whole, select=False), "select": partial(Whole, select=True), "pieces": Pieces
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
                ran = WAYS[way](model, self._inputs, recorder)
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
        key = inputs.shape, inputs.dtype, inputs.device, model.price, model.limit
        with self._lock:
            recording = self._kept.get(key)
            if recording is None or not recording.fits(model):
                if recording is None and (key not in self._met or self._met[key] is not None):
                    _remember(self._met, key, self._met.get(key), MET)
                    return None
                model.backbone.check_inputs(inputs)
                try:
                    recording = Recording(model, inputs, recorder_for(inputs))
                except RuntimeError as error:  # torch's, of what a user's block does or of too little memory
                    why = str(error).splitlines()[0]
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
