"""A recorder makes CUDA graphs of what functions launch, which are replayed without Python in between."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from dynrl.ops.backend import device_counts, installed

TIMED = 5  # how often a replay is timed
LEAD = 500_000  # the cycles of the device for which it sleeps before, so that the host is done with launching by then

Replay = Callable[[], None]


class Told:
    """These are numbers of a device that the host waits for.

    Args:
        device: the device.
        count: how many numbers there are.
        dtype: their type.

    Attributes:
        there: [count], on the device.
    """

    def __init__(self, device: torch.device, count: int, dtype: torch.dtype = torch.int64) -> None:
        self.there = torch.zeros(count, dtype=dtype, device=device)
        # What lies in pinned memory is copied there without a wait, also by a graph.
        self._here = torch.zeros(count, dtype=dtype, pin_memory=self.there.is_cuda)
        self._sent = torch.cuda.Event() if self.there.is_cuda else None

    def send(self) -> None:
        """Send the numbers to the host; a function that is recorded calls this."""
        self._here.copy_(self.there, non_blocking=True)

    def sent(self) -> None:
        """Say that they have been sent by what was launched so far, which `read` will wait for, and for no more."""
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self.there.device))

    def read(self) -> Tensor:
        """Wait for the device, and return what was sent last, in memory that the next numbers overwrite."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._here


class Recorder:
    """A recorder for one CUDA device makes graphs that share one pool of memory.

    What one graph leaves for another must lie in tensors that were made outside of both.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool, self._stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        self._last: torch.cuda.CUDAGraph | None = None

    def counts(self, select: bool = False) -> AbstractContextManager[None]:
        """Return the context in which ops run that are recorded (`device_counts`)."""
        return device_counts(select)

    def record(self, run: Callable[[], None], keep: Sequence[Tensor] = ()) -> Replay:
        """Return a function that does again what `run` does. It is called twice; what it does to `keep` is undone.

        The first call is not recorded, because libraries choose their algorithms in it and make their plans.
        """
        with torch.cuda.device(self._device), self._apart():
            with put_back(keep):
                run()
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
        self._last = graph  # torch refuses a pool whose graphs are all gone, as those may be that were only timed
        return graph.replay

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Work on the stream of recordings, behind what has been launched and before what will be."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            yield
        now.wait_stream(self._stream)

    def milliseconds(self, replay: Replay, keep: Sequence[Tensor] = ()) -> float:
        """Time `replay` on the device, and return the median in milliseconds; what it does to `keep` is undone.

        The device's own clock is read before and behind it, so neither launching nor waiting counts, if `replay` itself
        does not wait. What takes few microseconds could not be told apart otherwise.
        """
        times = []
        with torch.cuda.device(self._device):
            for _ in range(TIMED):
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with put_back(keep):
                    torch.cuda._sleep(LEAD)
                    begun.record()
                    replay()
                    ended.record()
                ended.synchronize()
                times.append(begun.elapsed_time(ended))
        return statistics.median(times)

    def memory(self) -> int:
        """Return how many bytes of the device are reserved, for graphs and all else."""
        return torch.cuda.memory_reserved(self._device)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside this context, the memory of the graphs belongs to one caller, whatever stream others work on."""
        torch.cuda.current_stream(self._device).wait_event(self._done)
        yield
        self._done.record(torch.cuda.current_stream(self._device))


@contextmanager
def put_back(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside this context, `tensors` may be overwritten; behind it, they hold what they held before."""
    held = [tensor.clone() for tensor in tensors]
    yield
    for tensor, before in zip(tensors, held, strict=True):
        tensor.copy_(before)


def records(inputs: object) -> bool:
    """Tell whether graphs can be recorded of what walks `inputs`."""
    there = isinstance(inputs, Tensor) and inputs.is_cuda and installed()
    return there and not torch.cuda.is_current_stream_capturing()  # a caller may be recording this very call


def recorder_for(inputs: Tensor) -> Recorder:
    """Return a recorder for the device of `inputs`."""
    return Recorder(inputs.device)
