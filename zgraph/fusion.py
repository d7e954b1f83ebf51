"""Chains of elementwise operators and sums over rows as one kernel each: what a step costs where a compiler fuses them.

A region is what TorchInductor would make one kernel of (Ansel et al., PyTorch 2, ASPLOS 2024): calls of one phase that
feed each other or read the same, with no matrix product, attention or collective in between. It reads what comes from
outside once, writes what is used outside once, and is started once; what lies between never exists in memory. What
another region needs of it is computed there again where that reads no more bytes than the value has.

zgraph itself runs calls one by one, but for updates, which are kernels already. ``FusedCosts.of`` is for predicting
others, as the argument ``costs`` of ``zgraph.predict.predict``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from zgraph import ops
from zgraph.cost import Cost, Costs, seconds
from zgraph.hardware import Hardware
from zgraph.liveness import shares_memory
from zgraph.program import Phase, Program, phase_of
from zgraph.work import LINK, NOTHING, VECTOR, Size, Work, num_bytes_of, works

aten = torch.ops.aten

_ROWS = frozenset(
    {
        aten._softmax.default,
        aten._log_softmax.default,
        aten._softmax_backward_data.default,
        aten._log_softmax_backward_data.default,
        aten.native_layer_norm.default,
        aten._fused_rms_norm.default,
    }
)
"""Operators over rows of the last dimension, which a kernel can go on from."""

_LAST = frozenset(
    {
        aten.native_layer_norm_backward.default,
        aten._fused_rms_norm_backward.default,
        aten.nll_loss_forward.default,
    }
)
"""Operators that add up over columns, or over everything: a kernel ends with them."""

_MOVES = frozenset(
    {
        aten._to_copy.default,
        aten.clone.default,
        aten.cat.default,
        aten.slice_backward.default,
        aten.select_backward.default,
        aten.constant_pad_nd.default,
        aten.nll_loss_backward.default,
    }
)
"""Operators that move or select elements, each of which a kernel can compute where it is read."""


@dataclass(frozen=True)
class Region:
    """Calls that are one kernel.

    Attributes:
        nodes: in order of the graph.
        inputs: values read from outside, views as they are read.
        outputs: calls whose results are used outside and lie in memory.
        again: calls of other regions that are computed here once more.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    again: tuple[fx.Node, ...] = ()


def any_call(node: fx.Node) -> bool:  # noqa: ARG001 -- the shape of a choice
    """Let every call be fused that can be."""
    return True


def regions(program: Program, may_fuse: Callable[[fx.Node], bool] = any_call) -> tuple[Region, ...]:
    """All regions, those of a single call as well, in order of their last call.

    Args:
        program: at any stage.
        may_fuse: what may be part of a region, of those that can be.
    """
    return tuple(_Fusion(program, may_fuse).regions())


class _Fusion:
    """Groups calls.

    The level of a value is the largest number of calls on a way to it that cannot be fused. Calls of one level cannot
    depend on each other through such a call, so those that are connected can be one kernel. After that, a call whose
    every reader is in one region can be computed there.
    """

    def __init__(self, program: Program, may_fuse: Callable[[fx.Node], bool]) -> None:
        self.nodes = list(program.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.fusable = {node for node in self.nodes if _can_fuse(node) and may_fuse(node)}
        self.parent: dict[fx.Node, fx.Node] = {}
        self._cones: dict[fx.Node, dict[fx.Node, bool] | None] = {}

    def regions(self) -> Iterator[Region]:
        self._connect()
        self._sink()
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if node in self.fusable:
                members.setdefault(self._find(node), []).append(node)
        found = [self._region(nodes) for nodes in members.values()]
        read = {ops.root_of(source) for region in found for source in region.inputs}
        for region in sorted(found, key=lambda region: self.position[region.nodes[-1]]):
            yield replace(region, outputs=tuple(n for n in region.nodes if n in read or self._lies_in_memory(n)))

    def _find(self, node: fx.Node) -> fx.Node:
        while (above := self.parent.get(node, node)) is not node:
            self.parent[node] = self.parent.get(above, above)
            node = above
        return node

    def _connect(self) -> None:
        level: dict[fx.Node, int] = {}
        reading: dict[tuple[fx.Node, int, Phase | None, int], fx.Node] = {}
        for node in self.nodes:
            mine = 0
            for source in node.all_input_nodes:
                memory = ops.root_of(source)
                ends = memory.op == "call_function" and (memory not in self.fusable or _is_last(memory))
                mine = max(mine, level[memory] + ends)
            level[node] = mine if ops.root_of(node) is node else level[ops.root_of(node)]
            if node not in self.fusable:
                continue
            for source in node.all_input_nodes:
                memory = ops.root_of(source)
                if memory in self.fusable:
                    alike = level[memory] == mine and phase_of(memory) is phase_of(node) and not _is_last(memory)
                    if alike:
                        self.parent[self._find(node)] = self._find(memory)
                elif memory.op == "call_function":
                    # Those that read the same at the same time, of the same length, read it once.
                    key = (memory, mine, phase_of(node), _length(node))
                    self.parent[self._find(node)] = self._find(reading.setdefault(key, node))

    def _sink(self) -> None:
        alone = {node for node in self.fusable if not _is_last(node)}
        sizes: dict[fx.Node, int] = {}
        for node in self.fusable:
            sizes[self._find(node)] = sizes.get(self._find(node), 0) + 1
        for node in reversed(self.nodes):
            if node not in alone or sizes[self._find(node)] > 1:
                continue
            readers = list(_readers(node))
            homes = {self._find(reader) if reader in self.fusable else None for reader in readers}
            home = homes.pop() if len(homes) == 1 else None
            if home is not None and all(phase_of(reader) is phase_of(node) for reader in readers):
                sizes[home] += sizes[node]
                self.parent[node] = home

    def _region(self, nodes: list[fx.Node]) -> Region:
        inside = set(nodes)
        inputs: dict[fx.Node, None] = {}
        again: dict[fx.Node, None] = {}
        for source in (source for node in nodes for source in node.all_input_nodes):
            memory = ops.root_of(source)
            if memory in inside:
                continue
            cone = self._cone(memory)
            if cone is None:
                inputs[source] = None
            else:
                again |= {node: None for node, is_made in cone.items() if is_made and node not in inside}
                inputs |= {node: None for node, is_made in cone.items() if not is_made}
        inputs = {source: None for source in inputs if ops.root_of(source) not in inside}
        return Region(tuple(nodes), tuple(inputs), (), tuple(again))

    def _lies_in_memory(self, node: fx.Node) -> bool:
        """Whether a value is read where it is not computed."""
        home = self._find(node)
        for reader in _readers(node):
            if reader not in self.fusable or (self._find(reader) is not home and self._cone(node) is None):
                return True
        return False

    def _cone(self, value: fx.Node) -> dict[fx.Node, bool] | None:
        """The calls that make a value again (True) and what they read (False); None if it is better read itself."""
        if value not in self._cones:
            self._cones[value] = self._found_cone(value) if self._is_plain(value) else None
        return self._cones[value]

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a call computes each element of its own."""
        if node not in self.fusable or node.target in _ROWS or node.target in _LAST or ops.creates(node.target):
            return False
        return not _is_sum(node) and torch.Tag.reduction not in node.target.tags  # type: ignore[union-attr]

    def _found_cone(self, value: fx.Node) -> dict[fx.Node, bool] | None:
        cone: dict[fx.Node, bool] = {}
        stack: list[fx.Node] = [value]
        num_bytes = 0
        while stack:
            source = stack.pop()
            memory = ops.root_of(source)
            if source in cone or cone.get(memory):
                continue
            # The first call is made again in any case, and those before it if they are in the same region.
            made = memory is value or (self._is_plain(memory) and self._find(memory) is self._find(value))
            cone[memory if made else source] = made
            if made:
                stack.extend(memory.all_input_nodes)
            else:
                num_bytes += num_bytes_of(source.meta["val"])
            if len(cone) > _LARGEST_CONE:
                return None
        return cone if num_bytes <= num_bytes_of(value.meta["val"]) else None


_LARGEST_CONE = 12
"""Calls and reads that are made again for one value, at most."""


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, through views or not."""
    for user in node.users:
        if ops.view_of(user) is not None and ops.root_of(user) is ops.root_of(node):
            yield from _readers(user)
        else:
            yield user


def _can_fuse(node: fx.Node) -> bool:
    """Whether a call may be part of a kernel that a compiler writes."""
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or shares_memory(node):
        return False
    if phase_of(node) is Phase.UPDATE:
        return False
    if node.target in _LAST:
        return True
    if not isinstance(val, torch.Tensor):
        return node.target in _ROWS
    moves = node.target in _MOVES or node.target in _ROWS or ops.creates(node.target)
    return moves or ops.is_elementwise(node.target) or torch.Tag.reduction in node.target.tags or _is_sum(node)


def _is_sum(node: fx.Node) -> bool:
    return node.target in (aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default, aten.amax.default)


def _is_last(node: fx.Node) -> bool:
    """Whether a kernel ends with this call: a sum over more than the last dimension."""
    if node.target in _LAST:
        return True
    assert isinstance(node.target, torch._ops.OpOverload)
    if node.target in _ROWS or not (_is_sum(node) or torch.Tag.reduction in node.target.tags):
        return False
    dims = node.args[1] if len(node.args) > 1 else None
    source = node.all_input_nodes[0].meta["val"]
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return True
    return {dim % source.dim() for dim in dims} != {source.dim() - 1}


def _length(node: fx.Node) -> int:
    """Elements of the largest tensor that a call reads or writes."""
    tensors = [value.meta["val"] for value in (node, *node.all_input_nodes)]
    return max((int(tensor.numel()) for tensor in tensors if isinstance(tensor, torch.Tensor)), default=0)


@dataclass(frozen=True)
class Fusion:
    """A program as its regions are kernels.

    Attributes:
        works: what each call of a region does: the last one all of it, and the others nothing.
        internal: calls whose results never lie in memory.
        reads: of the last call of each region, what the kernel reads.
    """

    works: Mapping[fx.Node, tuple[Work, ...]]
    internal: frozenset[fx.Node]
    reads: Mapping[fx.Node, tuple[fx.Node, ...]]


def fuse(program: Program, may_fuse: Callable[[fx.Node], bool] = any_call) -> Fusion:
    """Regard a program's regions as kernels; the program stays as it is."""
    done: dict[fx.Node, tuple[Work, ...]] = {}
    internal: set[fx.Node] = set()
    reads: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for region in regions(program, may_fuse):
        done |= dict.fromkeys(region.nodes, (Work("fused", NOTHING),))
        done[region.nodes[-1]] = (kernel_of(region),)
        internal.update(set(region.nodes) - set(region.outputs))
        reads[region.nodes[-1]] = region.inputs
    return Fusion(done, frozenset(internal), reads)


class FusedCosts:
    """Costs of calls where regions are kernels.

    Args:
        program: whose values say shapes and dtypes.
        hardware: the machine.
        world: ranks that collectives are among; those of the program's mesh if None.
        fusion: of this program; of everything that can be fused if None.
    """

    def __init__(
        self, program: Program, hardware: Hardware, world: Size | None = None, fusion: Fusion | None = None
    ) -> None:
        self._costs, self._hardware = Costs(program, hardware, world), hardware
        self._works = (fusion or fuse(program)).works

    def of(self, node: fx.Node) -> Cost:
        """What running ``node`` costs."""
        if node not in self._works:
            return self._costs.of(node)
        done = self._works[node]
        return Cost(sum(seconds(work, self._hardware) for work in done), done)


def kernel_of(region: Region) -> Work:
    """What the kernel of a region does."""
    parts = [
        work for node in (*region.nodes, *region.again) for work in works(node, 1) if work.unit not in (NOTHING, LINK)
    ]
    return Work(
        "fused",
        VECTOR,
        flops=sum(work.flops for work in parts),
        transcendentals=sum(work.transcendentals for work in parts),
        read_bytes=sum(num_bytes_of(node.meta["val"]) for node in region.inputs),
        written_bytes=sum(num_bytes_of(node.meta["val"]) for node in region.outputs),
        dtype=parts[0].dtype if parts else torch.float32,
        is_known=all(work.is_known for work in parts),
    )
