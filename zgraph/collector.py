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


_only_new = False
"""Whether all that there was is frozen."""

_FEW = 10_000
"""Objects that may be frozen without torch being among them: Python 3.12 begins with some hundred."""


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Inside, garbage is looked for among what is made inside alone, which takes milliseconds: not in all of torch.

    So it can be collected after each part of compiling, before the next one needs as much memory. Where somebody else
    has frozen much, that stays frozen, and nothing is collected more often: nobody knows how much is not frozen.
    """
    global _only_new
    if _only_new or gc.get_freeze_count() > _FEW:
        yield
        return
    gc.freeze()
    _only_new = True
    try:
        yield
    finally:
        _only_new = False
        gc.unfreeze()


def is_large(graph: fx.Graph) -> bool:
    """Whether what a graph has left behind is worth looking for."""
    return len(graph.nodes) > _LARGE


def collect_garbage(graph: fx.Graph) -> None:
    """Collect what making ``graph`` has left behind, before the next one needs as much memory.

    Where objects that were there before would be looked at too, all of torch's among them, the last generation is not,
    and only what a large graph leaves is worth it.
    """
    if _only_new:
        gc.collect()
    elif is_large(graph):
        gc.collect(1)
