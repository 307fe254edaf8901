"""A guard for kernels, nothing may make the host wait for the device; and recorders for machines without CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynrl.ops import backend
from dynrl.ops.backend import device_counts, ops_mode
from dynrl.ops.recorder import put_back

WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::_unique2")
MASKS = (torch.bool, torch.uint8)


class NoHostSync(TorchDispatchMode):
    """Raises where the host would wait for a value of the device.

    In inference mode torch hands on calls as they were made (`to`, `is_nonzero`), else what they are made of.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        waits = name in WAITS
        if name in ("aten::to", "aten::_to_copy"):
            places = [
                torch.device(of) for of in (*args[1:], kwargs.get("device")) if isinstance(of, (torch.device, str))
            ]
            waits = args[0].is_cuda and any(place.type == "cpu" for place in places)
        elif name == "aten::index":
            waits = any(index is not None and index.dtype in MASKS for index in args[1])
        if waits:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


class Tape(NoHostSync):
    """This holds the ops that were called inside it, with their very tensors, and calls them again.

    Like a CUDA graph, it knows nothing of Python: what it reads and writes are the tensors that were there when it was
    recorded, and what the host would wait for cannot be recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        done = super().__torch_dispatch__(func, types, args, kwargs)
        self._ops.append((func, args, kwargs or {}, done))
        return done

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for func, args, kwargs, done in self._ops:
                for kept, made in zip(tree_leaves(done), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(kept, Tensor) and kept.data_ptr() != made.data_ptr():
                        kept.copy_(made)


class NoLists(TorchFunctionMode):
    """Raises where the host would read all values of a tensor, which is no op."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (Tensor.tolist, Tensor.numpy), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class TapeRecorder:
    """This recorder has the interface of `dynrl.ops.recorder.Recorder`, and records tapes.

    Args:
        times: milliseconds that stand for those of replays, in the order in which they are asked for; then all are 1.
        drawn: draws the others instead.
    """

    def __init__(self, *times: float, drawn: torch.Generator | None = None) -> None:
        self.recorded, self.replayed, self._times, self._drawn = 0, 0, list(times), drawn

    @contextmanager
    def counts(self, select: bool = False):
        token = backend._selects.set(select)
        try:
            with ops_mode("ref"):  # the definitions ask the host for nothing
                yield
        finally:
            backend._selects.reset(token)

    def record(self, run: Callable[[], None], keep: Sequence[Tensor] = ()) -> Callable[[], None]:
        with put_back(keep):
            run()
        with put_back(keep), NoLists(), Tape() as tape:  # what a graph records does not run
            run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay

    def milliseconds(self, replay: Callable[[], None], keep: Sequence[Tensor] = ()) -> float:
        with put_back(keep):
            replay()
        if self._times:
            return self._times.pop(0)
        return 1.0 if self._drawn is None else float(torch.rand((), generator=self._drawn))

    def memory(self) -> int:
        return 0

    def turn(self):
        return nullcontext()


class CallingRecorder(TapeRecorder):
    """This one calls functions again instead of replaying them, so interpreted kernels may run: a tape has only ops."""

    def counts(self, select: bool = False):
        return device_counts(select)

    def record(self, run: Callable[[], None], keep: Sequence[Tensor] = ()) -> Callable[[], None]:
        with put_back(keep):
            run()
        self.recorded += 1
        return run
