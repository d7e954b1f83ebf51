"""A region as loops over rows and columns: the one form that is printed in C++ and in Triton.

    y = layer_norm(add(a, b))         for each row r:  for each column c:  v0 = a[r, c] + b[r, c]; s0 += v0
    g = sum(y, 0)              ->                      for each column c:  ...; y[r, c] = v7; g[c] += v7

The elements of all tensors in row-major order are rows of equal length. A value is one number for the whole region, one
for each row, or one for each element; sums and maxima over a row make the second of the third, and sums over all rows
make the first. Operators on single values are ATen's, as ``zgraph.codegen.elementwise`` writes them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise

import torch
from torch import fx


class Level(enum.IntEnum):
    """How many numbers a value is."""

    NUMBER = 0
    ROW = 1
    ELEMENT = 2


class CannotWriteError(Exception):
    """A region has what these loops have no words for."""


# What loops have besides ATen's operators. They are called on tensors by nothing but tests.


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of each row."""
    return x.sum(-1, keepdim=True)


def row_max(x: torch.Tensor) -> torch.Tensor:
    """The largest element of each row, of those that are numbers."""
    return x.amax(-1, keepdim=True)


def pick(x: torch.Tensor, column: torch.Tensor, is_wanted: torch.Tensor) -> torch.Tensor:
    """The element of each row that lies in a column, a number of its own for each row; 0 where none is wanted.

    Where one is wanted, there must be that column.
    """
    return torch.where(is_wanted, x.gather(-1, torch.where(is_wanted, column, 0)), 0)


def spread(value: torch.Tensor, column: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of zeros, but for a value in a column, a number of its own for each row."""
    return torch.where(torch.arange(width) == column, value, 0)


def is_not(number: torch.Tensor, other: int) -> torch.Tensor:
    """Whether integers, one for each row, are not a certain one."""
    return number != other


def normal_below(x: torch.Tensor) -> torch.Tensor:
    """How much of a standard normal distribution lies below each number, off by a few 1e-8 at most."""
    found: torch.Tensor = torch.special.ndtr(x)
    return found


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over all rows of what each row has one of."""
    return x.double().sum().to(x.dtype)


REDUCTIONS = (row_sum, row_max)
"""What makes one number of each row, of its elements."""

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Store:
    """A value that leaves the loops.

    Attributes:
        value: what is stored, or added up over all rows.
        place: the result's index.
        dtype: of the result.
        over_rows: the result is the sum over all rows, one number for each column.
    """

    value: fx.Node
    place: int
    dtype: torch.dtype
    over_rows: bool = False


@dataclass
class Loops:
    """A region in loops.

    Attributes:
        sizes: of the loops, the last one over columns.
        has_rows: whether columns are those of rows, so that the last loop may not be merged with others.
        body: placeholders are loads, calls are operators and the functions above; each with its ``Level``, and with a
            vector or a number of its dtype as its value.
        strides: of each load that is not a number, elements between neighbours along each of the loops.
        inputs: of each load, the index of the region's input that it reads.
        in_memory: loads of what lies where results do; numbers of the host are not among them.
        stores: what leaves.
    """

    sizes: Sizes
    has_rows: bool = False
    body: fx.Graph = field(default_factory=fx.Graph)
    strides: dict[fx.Node, Sizes] = field(default_factory=dict)
    inputs: dict[fx.Node, int] = field(default_factory=dict)
    in_memory: set[fx.Node] = field(default_factory=set)
    stores: list[Store] = field(default_factory=list)

    @property
    def num_columns(self) -> int:
        """Elements of a row."""
        return self.sizes[-1]

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.sizes[:-1])

    def merge(self) -> None:
        """Use as few loops as can be: two are one where all that is read lies so."""
        groups: list[list[int]] = [[0]]
        for index in range(1, len(self.sizes)):
            is_border = self.has_rows and index == len(self.sizes) - 1
            lies_apart = any(s[index - 1] != s[index] * self.sizes[index] for s in self.strides.values())
            if is_border or lies_apart:
                groups.append([])
            groups[-1].append(index)
        self.sizes = tuple(math.prod(self.sizes[i] for i in group) for group in groups)
        self.strides = {node: tuple(each[group[-1]] for group in groups) for node, each in self.strides.items()}

    @cached_property
    def num_sweeps(self) -> int:
        """How often a region goes over its rows."""
        return 1 + max((self.earliest[node] for node in self.body.nodes if level_of(node)), default=0)

    @cached_property
    def earliest(self) -> dict[fx.Node, int]:
        """Of each value, how many sums over all rows must have been made, one after the other, before it is known."""
        found: dict[fx.Node, int] = {}
        for node in self.body.nodes:
            before = max((found[source] for source in node.all_input_nodes), default=0)
            found[node] = before + (node.target is total)
        return found

    @cached_property
    def depth(self) -> dict[fx.Node, int]:
        """Of each value, how many loops over the columns of its row must have ended before it is known."""
        found: dict[fx.Node, int] = {}
        for node in self.body.nodes:
            before = max((found[source] for source in node.all_input_nodes if level_of(source)), default=0)
            found[node] = before + (node.target in REDUCTIONS)
        return found


def level_of(node: fx.Node) -> Level:
    """How many numbers a value of the loops is."""
    return node.meta.get("level", Level.NUMBER)  # type: ignore[no-any-return]


@cache
def form(dtype: torch.dtype, num_dims: int = 1) -> torch.Tensor:
    """What stands for a value of loops: a vector, so that operators promote as between tensors; or a number."""
    return torch.empty((1,) * num_dims, dtype=dtype, device="meta")


def refined(shapes: Iterable[Sequence[int]], numel: int) -> Sizes:
    """Dimensions such that those of each of some shapes of so many elements are made of neighbours.

    Raises:
        CannotWriteError: there are none.
    """
    steps = {1, numel}
    for shape in shapes:
        step = 1
        for size in reversed(shape):
            step *= size
            steps.add(step)
    ordered = sorted(steps)
    if any(high % low for low, high in pairwise(ordered)):
        raise CannotWriteError("its tensors are cut at unlike places")
    return tuple(high // low for low, high in pairwise(ordered))[::-1]


def along(sizes: Sizes, shape: Sequence[int], strides: Sequence[int]) -> Sizes:
    """Strides of a tensor of ``shape`` along finer dimensions, which it is made of."""
    dims = iter([(size, stride) for size, stride in zip(reversed(shape), reversed(strides), strict=True) if size != 1])
    size, stride = next(dims, (1, 0))
    done = 1
    found: list[int] = []
    for each in reversed(sizes):
        if done == size:
            size, stride = next(dims, (1, 0))
            done = 1
        found.append(stride * done)
        done *= each
    return tuple(reversed(found))


class Sweep:
    """One sweep over the rows: its loops over columns, and what is computed in which.

    A loop ends where a number of the whole row is needed. A sweep ends where a number of all rows is; what a later one
    needs of an earlier one, but for such numbers, it computes again, so what need not be known earlier is left to the
    last.

    Args:
        loops: what is printed.
        number: of the sweep.
    """

    def __init__(self, loops: Loops, number: int) -> None:
        self.loops, self.number = loops, number
        self.is_last = number == loops.num_sweeps - 1
        totals = [node for node in loops.body.nodes if node.target is total]
        early = set(computed_of(filter(level_of, loops.body.nodes)))  # what is needed by rows, and so before the last
        self.totals = [n for n in totals if (loops.earliest[n] == number + 1 if n in early else self.is_last)]
        self.stores = [store for store in loops.stores if self.is_last and level_of(store.value)]
        wanted = [*(store.value for store in self.stores), *map(argument, self.totals)]
        self.needed = set(computed_of(wanted))

    @property
    def num_loops(self) -> int:
        """How many loops over columns there are."""
        depths = [self.loops.depth[node] for node in self.needed if level_of(node) is Level.ELEMENT]
        return max(depths, default=-1) + 1

    def rows(self, depth: int) -> list[fx.Node]:
        """The numbers of a row that are known once so many loops over its columns have ended, in order."""
        return [n for n in self._of(Level.ROW) if self.loops.depth[n] == depth and n.target not in REDUCTIONS]

    def reductions(self, depth: int) -> list[fx.Node]:
        """What a loop adds up or compares."""
        return [n for n in self._of(Level.ROW) if n.target in REDUCTIONS and self.loops.depth[n] == depth + 1]

    def element_stores(self, depth: int) -> list[Store]:
        """What a loop stores, or adds to sums over all rows."""
        return [s for s in self.stores if level_of(s.value) is Level.ELEMENT and self.loops.depth[s.value] == depth]

    def elements(self, sinks: Iterable[fx.Node], there: Iterable[fx.Node] = ()) -> list[fx.Node]:
        """What some elements are computed of, themselves included, in order, but for what is there already."""
        known = set(there)
        found = set(computed_of(sinks, lambda node: level_of(node) is Level.ELEMENT and node not in known))
        return [node for node in self.loops.body.nodes if node in found]

    def _of(self, level: Level) -> list[fx.Node]:
        return [node for node in self.loops.body.nodes if node in self.needed and level_of(node) is level]


def may_overwrite(loops: Loops, place: int, index: int) -> bool:
    """Whether a result may lie where an input does: each element is read for the last time before it is stored."""
    (stored,) = (store for store in loops.stores if store.place == place)
    loads = {load for load, read in loops.inputs.items() if read == index}
    if stored.over_rows or level_of(stored.value) is not Level.ELEMENT:
        return False
    row_major = tuple(math.prod(loops.sizes[i + 1 :]) for i in range(len(loops.sizes)))
    if any(level_of(load) is not Level.ELEMENT or loops.strides[load] != row_major for load in loads):
        return False
    last = Sweep(loops, loops.num_sweeps - 1)
    # Of a row, one element is picked out by itself: before the loop of its depth, but maybe after another has stored.
    at = loops.depth[stored.value]
    later = [argument(node) for node in last.needed if node.target is pick and loops.depth[node] > at]
    for depth in range(at + 1, last.num_loops):
        later += [*map(argument, last.reductions(depth)), *(store.value for store in last.element_stores(depth))]
    return loads.isdisjoint(last.elements(later))


def argument(node: fx.Node) -> fx.Node:
    """What a sum or a maximum is of."""
    arg = node.args[0]
    assert isinstance(arg, fx.Node)
    return arg


def computed_of(wanted: Iterable[fx.Node], through: Callable[[fx.Node], bool] | None = None) -> Iterator[fx.Node]:
    """Some values and what they are computed of, as far as one may go, but not what sums over all rows are of."""
    seen: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in seen and (through is None or through(node)):
            seen.add(node)
            yield node
            if node.target is not total:
                stack.extend(node.all_input_nodes)
