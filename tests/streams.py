"""Streams of a device that is not there: what they are given is done in any order that events allow."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from zgraph.host import Way

COMPUTING = "computing"


@dataclass(eq=False)
class Event:
    """Something is done, once it is."""

    is_done: bool = False


@dataclass(eq=False)
class Call:
    """What a stream is given: to be done behind what it was given before, and behind some events."""

    work: Callable[[], None]
    after: Sequence[Event]
    event: Event = field(default_factory=Event)


class Streams:
    """One that computes, and one for copies each way.

    Memory that is to be loaded into has no value that is right until the copy is done. Any thread may give them work.

    Args:
        seed: of the order; None to do all as late as it may be.
        at_once: computing is done when it is told, as on a CPU, and only copies are late.

    Attributes:
        pinned: memory that is, by its place.
    """

    def __init__(self, seed: int | None = None, *, at_once: bool = True) -> None:
        self._random, self._at_once = None if seed is None else random.Random(seed), at_once
        self._queues: dict[object, deque[Call]] = {COMPUTING: deque(), **{way: deque() for way in Way}}
        self.pinned: set[int] = set()
        self._lock = threading.RLock()

    def pin(self, memory: torch.Tensor) -> None:
        self.pinned.add(memory.data_ptr())

    def unpin(self, memory: torch.Tensor) -> None:
        self.pinned.remove(memory.data_ptr())

    def computed(self) -> Event:
        return self.compute(lambda: None)

    def compute(self, work: Callable[[], None]) -> Event:
        """Give something to the stream that computes."""
        return self._give(COMPUTING, Call(work, ()))

    def copy(self, way: Way, target: torch.Tensor, source: torch.Tensor, after: Iterable[Event]) -> Event:
        with self._lock:
            if self._at_once and way is Way.IN:
                target.fill_(0xFF)
            return self._give(way, Call(lambda: target.copy_(source), tuple(after)))  # type: ignore[arg-type, return-value]

    def hold_up(self, event: Event) -> None:
        self._give(COMPUTING, Call(lambda: None, (event,)))

    def wait(self, event: Event) -> None:
        with self._lock:
            self._until(event)

    def finish(self) -> None:
        """Do all that there is to be done, in some order."""
        with self._lock:
            self._finish()

    def _finish(self) -> None:
        while any(self._queues.values()):
            ready = [queue for queue in self._queues.values() if queue and all(e.is_done for e in queue[0].after)]
            assert ready, "nothing can go on"
            self._do((self._random or random).choice(ready))

    def _give(self, stream: object, call: Call) -> Event:
        with self._lock:
            self._queues[stream].append(call)
            self._go_on()
        return call.event

    def _go_on(self) -> None:
        if self._at_once:
            while self._queues[COMPUTING]:
                self._until(self._queues[COMPUTING][0].event)
            while self._random is not None and self._random.random() < 0.5:
                ready = [q for q in self._queues.values() if q and all(e.is_done for e in q[0].after)]
                if not ready:
                    break
                self._do(self._random.choice(ready))

    def _until(self, event: Event) -> None:
        """Do what has to be done for an event, and no more."""
        while not event.is_done:
            queue = next(q for q in self._queues.values() if any(call.event is event for call in q))
            for other in queue[0].after:
                self._until(other)
            self._do(queue)

    def _do(self, queue: deque[Call]) -> None:
        call = queue.popleft()
        assert all(event.is_done for event in call.after)
        call.work()
        call.event.is_done = True
