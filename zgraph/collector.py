"""When Python looks for garbage in cycles: not while a graph is traced, rewritten or proved; after a large one is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

_LARGE = 2_000  # nodes of a graph that leaves more garbage than looking for it costs


@contextmanager
def collector_paused() -> Iterator[None]:
    """Graphs grow to millions of objects, none of them garbage; looking for it would take longer than the work."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_large(graph: fx.Graph) -> bool:
    """Whether what a graph has left behind is worth looking for."""
    return len(graph.nodes) > _LARGE


def collect_garbage(graph: fx.Graph) -> None:
    """Collect what making ``graph`` has left behind, if it is large, before the next one needs as much memory.

    Objects that were there before, all of torch's among them, are of the last generation, and are not looked at.
    """
    if is_large(graph):
        gc.collect(1)
