"""What a running step holds, beside what was predicted: the first call at which reality leaves the plan.

After each call, the memory of all values that the emitted function has is added up, storage by storage, without that of
its inputs. That is what ``zgraph.liveness`` predicts; what an operator allocates and frees inside is seen by neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import torch

from zgraph import ops
from zgraph.comm import MESSAGE_BYTES
from zgraph.errors import BudgetError, quoted
from zgraph.liveness import Lifetime, held_bytes, lifetimes
from zgraph.plans import show_bytes
from zgraph.program import Program, target_name
from zgraph.shared_memory import whole_of

TOLERANCE = 0.01
"""Of the most that is predicted for any call."""


class MemoryCheck:
    """Compares what a program holds while it runs with what it was predicted to hold.

    Args:
        program: as it is emitted.
        staged: see ``zgraph.liveness.lifetimes``.
        held: what it holds, if that is not what its calls allocate by themselves (``zgraph.placement.Placement``).
    """

    needs_values = True

    def __init__(self, program: Program, *, staged: bool, held: Sequence[Lifetime] | None = None) -> None:
        self._nodes = list(program.graph.nodes)
        lives = [life for life in (lifetimes(program) if held is None else held) if staged or not _is_read(life)]
        self._expected = held_bytes(lives, len(self._nodes))
        self._slack = TOLERANCE * max(self._expected, default=0)
        self._given: set[int] = set()

    def begin(self, inputs: Iterable[Any]) -> None:
        """A step begins, which has been given these values: their memory is not the step's own."""
        given = list(inputs)
        shared = (whole_of(value) for value in given if isinstance(value, torch.Tensor))
        self._given = {storage.data_ptr() for storage in _storages([given, list(shared)])}

    def see(self, number: int, values: Mapping[str, Any]) -> None:
        """The call of this number in the graph has run.

        Raises:
            BudgetError: the values hold more than was predicted.
        """
        sizes = {storage.data_ptr(): storage.nbytes() for storage in _storages(values.values())}
        found = sum(size for memory, size in sizes.items() if memory not in self._given)
        expected = self._expected[number]
        if found > expected + self._slack:
            node = self._nodes[number]
            origin = node.meta["origin"]
            module = f" of module {origin.module}" if origin.module else ""
            raise BudgetError(
                f"after call {number} of a step, {target_name(node.target)}{module}, it holds {found} bytes besides "
                f"its inputs, where {expected} were predicted: {show_bytes(found - expected)} more",
                where=quoted(origin.source),
                fix="report it: the prediction is wrong here; until then leave that much of the memory alone",
            )


def _is_read(life: Lifetime) -> bool:
    """Whether bytes are parts of a reduction that ranks read from each other's memory, and do not send as messages."""
    is_received = life.is_beside and life.node.target is ops.reduce_scatter
    val = life.node.meta["val"]
    return is_received and (val.device.type != "cpu" or val.nbytes > MESSAGE_BYTES)


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in a value: a transfer that was started has them among its fields."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
        else:
            kind: Any = type(value)
            left += _parts_of(kind)(value)


@cache
def _parts_of(kind: type) -> Callable[[Any], Iterable[Any]]:
    """What lies in a value of a type; it is asked of every value after every call."""
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        return lambda value: [getattr(value, name) for name in names]
    if issubclass(kind, Iterable) and not issubclass(kind, (str, bytes)):
        return iter
    return lambda _: ()
