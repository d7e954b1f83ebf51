"""Tensors in the memory of the host beside a device: page-locked, and moved by copies that computing runs beside.

Memory is taken in few large pieces, and tensors lie in them. A copy each way runs on a stream of its own. But for what
the host's processors do, nothing here waits for the device: what has to come before what is told to the streams, by
events.

* A copy, either way, comes behind all that computing was given before: what it reads has been made, and what it writes
  over is needed no more. So memory that PyTorch's allocator has handed out again is safe, which it does in the order of
  the computing stream.
* A load comes behind the store that wrote what it reads, and a store behind the loads of what it writes over.
* Once a copy is waited for, what computing is given from then on comes behind it. Until then whoever has started it
  keeps the tensor on the device.
* What the host's processors are given is done in a thread of its own, one after the other, behind the copies that have
  been started from and to the same tensors. Who starts to load or store one of these waits until it is done.

``Streams`` is all that is asked of a device. What does it on CUDA is ``Cuda``.
"""

from __future__ import annotations

import contextlib
import enum
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from zgraph.errors import HostError, first_line
from zgraph.machines import available_bytes, host_budget
from zgraph.tiers import PAGE, Stored, Tier, bytes_of
from zgraph.workers import Job, Workers


class Way(enum.Enum):
    """Which way a copy goes."""

    IN = "in"
    OUT = "out"


class Streams(Protocol):
    """One device's streams: one that computes, and one for copies each way."""

    def pin(self, memory: torch.Tensor) -> None:
        """Lock pages of the host, so that copies from and to them need no processor.

        Raises:
            RuntimeError: they cannot be locked.
        """

    def unpin(self, memory: torch.Tensor) -> None:
        """Let go of them, when all copies are done."""

    def computed(self) -> Any:
        """An event: all that computing has been given so far is done."""

    def copy(self, way: Way, target: torch.Tensor, source: torch.Tensor, after: Iterable[Any]) -> Any:
        """Give a copy to the stream of a way, behind some events; the event that it is done."""

    def hold_up(self, event: Any) -> None:
        """Let all that computing is given from now on come behind an event."""

    def wait(self, event: Any) -> None:
        """Return when it has come about; in any thread."""


class Cuda:
    """The streams of a CUDA device; computing is what the current stream does.

    Args:
        device: which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying: dict[Way, Any] = {way: torch.cuda.Stream(device) for way in Way}  # type: ignore[no-untyped-call]
        self._runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]

    def pin(self, memory: torch.Tensor) -> None:
        # ``torch.empty(..., pin_memory=True)`` takes the next power of two.
        error = int(self._runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
        if error:
            with contextlib.suppress(RuntimeError):  # or the next kernel tells of it
                torch.zeros((), device=self._device).add_(1)
            raise RuntimeError(f"cudaHostRegister gave error {error}")

    def unpin(self, memory: torch.Tensor) -> None:
        with contextlib.suppress(RuntimeError):  # of a device that has failed, which gives all of it back
            torch.cuda.synchronize(self._device)
        self._runtime.cudaHostUnregister(memory.data_ptr())

    def computed(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, way: Way, target: torch.Tensor, source: torch.Tensor, after: Iterable[Any]) -> Any:
        stream = self._copying[way]
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # threads that wait for it sleep
        return stream.record_event(done)

    def hold_up(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def wait(self, event: Any) -> None:
        with torch.cuda.device(self._device):  # or a thread takes memory of the first device for it
            event.synchronize()


_FROM_SAVED = "restart from what was saved last"

_PORTABLE = 1
"""cudaHostRegisterPortable: locked for all devices."""


class Host(Tier):
    """Memory of the host, and the tensors of one device in it.

    Args:
        device: where the tensors are computed with.
        streams: the device's.
    """

    name = "host"

    def __init__(self, device: torch.device, streams: Streams) -> None:
        super().__init__()
        self.device, self.streams = device, streams
        self._pieces: list[tuple[int, torch.Tensor]] = []  # and the first byte of each
        self._last: dict[Way, Any] = {}  # the events of the last copies
        self._processors: Workers | None = None
        self._failure: Exception | None = None  # of the processors, that nobody was told of
        self._runs: deque[tuple[Job, list[HostTensor]]] = deque()  # those not known to be done

    def __deepcopy__(self, memo: dict[int, Any]) -> Host:
        """Memory of its own, for what is copied there."""
        memo[id(self)] = copied = Host(self.device, self.streams)
        copied.reserve(self.used_bytes)
        return copied

    def tensor(self, start: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> HostTensor:
        return HostTensor(self, start, shape, strides, dtype)

    def check_room(self, num_bytes: int, ranks: int) -> None:
        free, wanted = host_budget(available_bytes()), self.used_bytes + num_bytes - self.num_bytes
        if wanted * ranks > free:
            whose = f" for each of {ranks} ranks" if ranks > 1 else ""
            raise HostError(
                f"cannot take {wanted} bytes of the host's memory{whose}: {free} of it may be taken",
                fix="let less lie there (`offload=`), or use a machine with more memory",
            )

    def check(self) -> None:
        """What cannot be copied, the device tells by itself; what the processors could not do is told here."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise HostError(
                f"the host's processors could not update what lies there: {first_line(failure)}", fix=_FROM_SAVED
            ) from failure

    def finish(self) -> None:
        for event in self._last.values():
            self.streams.hold_up(event)

    def memory(self, start: int, num_bytes: int) -> torch.Tensor:
        """Some bytes."""
        first, piece = next((first, piece) for first, piece in reversed(self._pieces) if first <= start)
        return piece[start - first : start - first + num_bytes]

    def start(self, way: Way, target: torch.Tensor, source: torch.Tensor, after: Iterable[Any]) -> Any:
        """Start a copy behind some events and what has been computed; the event that it is done."""
        self._last[way] = self.streams.copy(way, target, source, [self.streams.computed(), *after])
        return self._last[way]

    def run(self, function: Callable[..., Any], inputs: Sequence[Any], written: Sequence[HostTensor]) -> None:
        """Let the host's processors call a function, when all that it is given is there; returns at once.

        Args:
            function: of tensors of a CPU and numbers.
            inputs: what it is given: tensors that lie here, and numbers.
            written: of these, what it writes over. It is lost if the function fails, until it is stored anew.
        """
        stored = [each for each in inputs if isinstance(each, HostTensor)]
        events = [event for each in stored if (event := each._written) is not None]
        events += [event for each in written if (event := each._read) is not None]
        given = [each.value() if isinstance(each, HostTensor) else each for each in inputs]

        def work() -> None:
            try:
                for event in events:
                    self.streams.wait(event)
                failure = next((each.failure for each in stored if each.failure is not None), None)
                if failure is None:
                    with torch.no_grad():
                        function(*given)
            except Exception as error:  # noqa: BLE001 -- told by whoever checks, on all ranks
                failure = error
                self._failure = self._failure or error
            for each in written:
                each.failure = failure

        if self._processors is None:
            self._processors = Workers(1, "zgraph-host")
            weakref.finalize(self, self._processors.end)
        self._runs.append((self._processors.start(work), stored))

    def settle(self, start: int, stop: int) -> None:
        """Return when the processors are done with what lies in a range of bytes."""
        while self._runs and self._runs[0][0].is_done:
            self._runs.popleft()
        for run, stored in self._runs:
            if any(each.start < stop and start < each.start + each.nbytes for each in stored):
                run.wait()

    def _grow(self, more: int, num_bytes: int) -> int:
        try:
            piece = pinned(self.streams, more)
        except (MemoryError, RuntimeError) as error:
            raise HostError(
                f"cannot lock {num_bytes} bytes of the host's memory, {more} more than there are: {error}",
                fix="let less lie there (`offload=`), or use a machine with more memory",
            ) from error
        # A page stands between pieces, so that no tensor is laid over the end of one.
        first = self._pieces[-1][0] + self._pieces[-1][1].nbytes + PAGE if self._pieces else 0
        self._pieces.append((first, piece))
        weakref.finalize(self, self.streams.unpin, piece)
        return first


def pinned(streams: Streams, num_bytes: int) -> torch.Tensor:
    """So many bytes of the host that begin at a page and are locked, until ``streams.unpin``.

    Raises:
        MemoryError: there are not so many.
        RuntimeError: they cannot be locked.
    """
    block = np.empty(num_bytes + PAGE, dtype=np.uint8)  # for which NumPy asks the kernel for huge pages
    memory = torch.from_numpy(block[-block.ctypes.data % PAGE :][:num_bytes])
    streams.pin(memory)
    return memory


class HostTensor(Stored):
    """A tensor in the host's memory."""

    tier: Host

    def __init__(
        self, host: Host, start: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__(host, start, shape, strides, dtype)
        self._memory = host.memory(start, self.nbytes)
        self._written: Any = None  # the event of the last store
        self._read: Any = None  # and of the last load
        self.failure: Exception | None = None  # by which the processors have not written over it

    def value(self) -> torch.Tensor:
        """Its memory as a tensor of a CPU."""
        return self._memory.view(self.dtype).as_strided(self.shape, self.strides)

    def load(self, out: torch.Tensor | None = None) -> Copy:
        assert self._written is not None, "nothing was written there"
        self.tier.settle(self.start, self.start + self.nbytes)
        if self.failure is not None:
            raise HostError(
                f"the host's processors have failed to update what lies there: {first_line(self.failure)}",
                fix=_FROM_SAVED,
            ) from self.failure
        host = self.tier
        result = out
        if result is None:
            result = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=host.device)
        host.moved.read_bytes += self.nbytes
        self._read = host.start(Way.IN, bytes_of(result), self._memory, [self._written])
        return Copy(self._read, result, result, host.streams)

    def store(self, value: torch.Tensor) -> Copy:
        value = self._as_stored(value)
        self.tier.settle(self.start, self.start + self.nbytes)
        self.failure = None
        self.tier.moved.written_bytes += self.nbytes
        after = [] if self._read is None else [self._read]
        self._written = self.tier.start(Way.OUT, self._memory, bytes_of(value), after)
        return Copy(self._written, self, value, self.tier.streams)


@dataclass
class Copy:
    """A load or a store that has been started.

    Attributes:
        event: it is done.
        result: what is loaded, or the ``HostTensor`` that is written.
        keep: what it reads or writes on the device, which stays until it has been waited for.
    """

    event: Any
    result: Any
    keep: torch.Tensor | None
    streams: Streams = field(repr=False)

    def wait(self) -> Any:
        self.streams.hold_up(self.event)
        self.keep = None
        return self.result
