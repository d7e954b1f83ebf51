"""The only intermediate representation: one ``torch.fx`` graph of a whole training step, plus its facts.

State and batch come in as placeholders with roles; the loss and the new state go out. The graph is functional
until the last stage: an output that is the new value of an input is *donated* to it. Node order is issue order.
Everything a pass needs to know sits on nodes (``Input``, ``Origin``, ``val``) or on the ``Program``, by type.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from zgraph import ops
from zgraph.errors import MISTAKE_IN_PASS, VerifyError, first_line, quoted
from zgraph.layout import Layout

Target = Callable[..., Any] | str
"""What a node calls; fx allows a method name, which no program holds."""


class Stage(enum.IntEnum):
    """How far a program has come. Passes say which stage they take and which they give."""

    CAPTURED = 0
    BUCKETED = 1
    SHARDED = 2
    SCHEDULED = 3
    INPLACE = 4


class Phase(enum.Enum):
    """Part of the training step a node belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


class Role(enum.Enum):
    """What a placeholder stands for.

    RECIPE is state of the step as a whole, such as how often it was skipped; GRADIENT is what earlier micro-batches
    have added up, which has one element per element of the parameter. GATHERED is a whole bucket of parameters, in the
    dtype that its key names, which a step has gathered for all of its micro-batches.
    """

    __hash__ = object.__hash__  # Enum's own takes longer than all else that looking up an Input does

    PARAM = "param"
    OPT_STATE = "opt_state"
    BUFFER = "buffer"
    CONSTANT = "constant"
    BATCH = "batch"
    HYPER = "hyper"
    RECIPE = "recipe"
    GRADIENT = "gradient"
    GATHERED = "gathered"


OF_PARAMETERS = frozenset({Role.PARAM, Role.OPT_STATE, Role.GRADIENT})
"""Roles of what belongs to one parameter, or to the bucket that it lies in."""

AWAY = {Role.PARAM: "parameters", Role.OPT_STATE: "optimizer", Role.GRADIENT: "gradients"}
"""What may lie on a lower tier between steps, as a ``zgraph.layout.Away`` calls it."""


@dataclass(frozen=True)
class Input:
    """The meaning of a placeholder.

    Attributes:
        role: what kind of value it is.
        name: parameter, buffer or bucket name; batch leaf path; hyperparameter path (``group0.lr``); what is counted.
        key: the optimizer-state key (``exp_avg``) for OPT_STATE, else empty.
    """

    role: Role
    name: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.role.value}:{self.name}" + (f":{self.key}" if self.key else "")


@dataclass(frozen=True)
class Origin:
    """Where a node came from.

    Attributes:
        phase: part of the step.
        module: path of the user's module (``blocks.3.attn``), empty at top level or in the update.
        source: the user's source position, ``file:line (function)``; None where unknown.
        made_by: the pass that created the node; ``capture`` for captured ones.
    """

    phase: Phase
    module: str = ""
    source: str | None = None
    made_by: str = "capture"


SHARD = "shard"
"""The axis of the ranks inside a node."""

REPLICA = "replica"
"""The axis of the ranks that have the same place in every node."""

SECONDARY = "secondary"
"""The axis of the ranks inside a node, where state is divided over all ranks."""


@dataclass(frozen=True)
class Mesh:
    """The ranks a program runs on, and the axes along which they communicate.

    All of them are one axis. Where a node of ``shard`` ranks holds all state, there are two more: ``SHARD`` inside of
    nodes and ``REPLICA`` between them. Of six ranks and shard=3:

        node 0    rank 0    rank 1    rank 2        a row is a group of SHARD: its ranks divide state among them
        node 1    rank 3    rank 4    rank 5        a column is a group of REPLICA: its ranks have equal state

    Attributes:
        size: how many ranks there are.
        axis: what collectives call all of them.
        shard: how many ranks in a row divide state among them; all of them if None. It divides ``size``.
        secondary: how many ranks in a row, the axis ``SECONDARY``, are those of a node where ``shard`` is None.
    """

    size: int
    axis: str = "data"
    shard: int | None = None
    secondary: int | None = None

    def __post_init__(self) -> None:
        for size in filter(None, (self.shard, self.secondary)):
            assert size > 0, self
            assert self.size % size == 0, self
        assert self.shard is None or self.secondary is None, self

    @property
    def has_levels(self) -> bool:
        """Whether a part of the ranks divides state, so that sharding and replicating are axes of their own."""
        return self.shard is not None and 1 < self.shard < self.size

    @property
    def shard_size(self) -> int:
        """How many ranks state is divided over."""
        return self.size if self.shard is None else self.shard

    @property
    def shard_axis(self) -> str:
        """The axis that state is divided along."""
        return SHARD if self.has_levels else self.axis

    @property
    def axes(self) -> dict[str, int]:
        """How many ranks a group of each axis has."""
        found = {self.axis: self.size}
        if self.has_levels:
            found |= {SHARD: self.shard_size, REPLICA: self.size // self.shard_size}
        if self.secondary is not None and 1 < self.secondary < self.size:
            found[SECONDARY] = self.secondary
        return found

    def groups(self, axis: str) -> list[range]:
        """The groups of an axis: each rank is in one of them."""
        size = self.axes[axis]
        if axis == REPLICA:
            return [range(first, self.size, self.shard_size) for first in range(self.shard_size)]
        return [range(first, first + size) for first in range(0, self.size, size)]


@dataclass(frozen=True)
class StateInit:
    """Initial value of an optimizer-state entry: filled with ``fill``, or a copy of the parameter if None.

    ``dtype`` is that of the tensor; None for a plain Python number.
    """

    fill: float | int | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class FlatGradient:
    """Fact on a node (``meta["holds"]``): its value is the whole flat gradient of a bucket, on this rank."""

    bucket: str


@dataclass(frozen=True)
class Weighed:
    """Calls that could be one kernel, and what was decided about them.

    Attributes:
        name: of the kernel.
        module: of the model, that the last of the calls comes from.
        operators: the calls, in order.
        kernel_s, calls_s: seconds that the kernel, and the calls as they are, are predicted to take, launches included;
            None where every kernel was asked for.
        raises_peak_by: bytes by which the kernel would raise the peak of the step.
        compiling_s: seconds that compiling it takes, divided among steps and alike kernels, where that takes long.
    """

    name: str
    module: str
    operators: tuple[str, ...]
    kernel_s: float | None = None
    calls_s: float | None = None
    raises_peak_by: int = 0
    compiling_s: float = 0.0

    @property
    def is_kernel(self) -> bool:
        """Whether they are one now."""
        if self.raises_peak_by:
            return False
        if self.kernel_s is None or self.calls_s is None:
            return True
        return self.kernel_s + self.compiling_s < self.calls_s


@dataclass
class Program:
    """A training step.

    Attributes:
        graph: ATen, collective, ``zgraph::`` and Python-scalar operators; the output node's single argument
            is a list aligned with ``outputs``.
        stage: how far it has come.
        mesh: the ranks it runs on.
        outputs: what each output is: ``None`` for the loss (always first), else the Input whose new value it is.
        fake_mode: the mode in which values (``node.meta["val"]``) live: FakeTensor, or a sample Python number.
        constants: values of CONSTANT placeholders by name.
        init: how absent state starts: of the optimizer (none for a program that creates its own), and of the step as a
            whole where not with zero.
        given: each parameter's optimizer state at capture, keys, dtypes and step counts; parameters share a bucket only
            if theirs is equal.
        given_shapes: shapes of that state's tensors, by parameter and key, where they are not the parameter's.
        guards: expressions over HYPER and numeric OPT_STATE inputs that held at capture and must hold to run.
        layout: buckets; None before bucketing.
        weighed: what could be kernels, in order.
        notes: what whoever reads a plan should know of how passes decided.
    """

    graph: fx.Graph
    stage: Stage
    mesh: Mesh
    outputs: list[Input | None]
    fake_mode: FakeTensorMode
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    init: dict[Input, StateInit] = field(default_factory=dict)
    given: dict[str, Hashable] = field(default_factory=dict)
    given_shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()
    layout: Layout | None = None
    weighed: tuple[Weighed, ...] = ()
    notes: tuple[str, ...] = ()
    _made_by: str = "capture"
    _inferred: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    _keys: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict, repr=False)
    _forms: dict[Hashable, int] = field(default_factory=dict, repr=False)

    # -- reading ------------------------------------------------------------------------------------------

    def placeholders(self) -> Iterator[tuple[fx.Node, Input]]:
        """All placeholders with their meaning, in order."""
        for node in self.graph.find_nodes(op="placeholder"):
            yield node, node.meta["input"]

    def inputs(self, role: Role) -> dict[tuple[str, str], fx.Node]:
        """Placeholders of one role by (name, key)."""
        return {(i.name, i.key): node for node, i in self.placeholders() if i.role is role}

    def reads_all_state(self) -> bool:
        """Whether every optimizer state that the step writes is also one of its inputs."""
        written = {what for what in self.outputs if what is not None and what.role is Role.OPT_STATE}
        return written <= {what for _, what in self.placeholders()}

    def tier_of(self, node: fx.Node) -> str | None:
        """The lower tier where a value lies: what was spilled, and of some buckets, parameters and what is theirs."""
        if node.target is ops.wait:
            return ops.tier_of(operand(node)) if operand(node).target is ops.spill else None
        if node.target is operator.getitem:
            return getattr(operand(node).target, "tier", None)
        what: Input | None = node.meta.get("input")
        return None if what is None else self.kept_on(what, node.meta["val"])

    def kept_on(self, what: Input, val: Any) -> str | None:
        """The lower tier where such a value is kept between steps."""
        if self.layout is None or what.role not in AWAY or not isinstance(val, torch.Tensor) or val.dim() != 1:
            return None
        return self.layout.tier_of(AWAY[what.role], what.name)

    @property
    def output_node(self) -> fx.Node:
        return self.graph.output_node()

    def results(self) -> list[Any]:
        """What is returned, nodes or numbers, aligned with ``outputs``."""
        return list(self.output_node.args[0])  # type: ignore[arg-type]

    def num_nodes(self) -> int:
        """How many nodes the graph has, inputs and output included."""
        return len(self.graph.nodes)

    # -- writing ------------------------------------------------------------------------------------------

    def clone(self) -> Program:
        """A copy that shares no node with this program; values, constants and facts are shared."""
        return replace(
            self,
            graph=copy_graph(self.graph),
            outputs=list(self.outputs),
            constants=dict(self.constants),
            init=dict(self.init),
            given=dict(self.given),
        )

    def forget_values(self) -> None:
        """Infer every value anew from here on."""
        self._inferred, self._keys, self._forms = {}, {}, {}

    @contextmanager
    def made_by(self, name: str) -> Iterator[None]:
        """Nodes created inside are recorded as made by the pass called ``name``."""
        before, self._made_by = self._made_by, name
        try:
            yield
        finally:
            self._made_by = before

    def call(
        self,
        target: Target,
        *args: Any,
        origin: Origin,
        before: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Create a call of ``target``; its value is inferred, its origin recorded.

        Args:
            target: an ATen, collective, ``zgraph::`` or Python scalar operator.
            args, kwargs: nodes and literals.
            origin: the origin of what it is derived from; ``made_by`` is replaced.
            before: insertion point; the graph's current one if None.

        Raises:
            VerifyError: the operator does not take such arguments; the pass at work is named.
        """
        assert callable(target), target
        if before is None:
            node = self.graph.call_function(target, args, kwargs)
        else:
            with self.graph.inserting_before(before):
                node = self.graph.call_function(target, args, kwargs)
        node.meta["origin"] = replace(origin, made_by=self._made_by)
        node.meta["val"] = self.infer(node)
        return node

    def placeholder(self, what: Input, val: Any, *, before: fx.Node | None = None) -> fx.Node:
        """Create a placeholder before the node ``before``, or else behind those that there are."""
        before = before or self.graph.find_nodes(op="placeholder")[-1].next
        with self.graph.inserting_before(before):
            node = self.graph.placeholder(what.role.value)
        node.meta.update(input=what, val=val)
        return node

    def infer(self, node: fx.Node, *, blame: str | None = None) -> Any:
        """The value of a call from its arguments' values: shapes, dtypes and devices, or a sample number.

        Args:
            blame: the pass that made or altered the call; the one at work if None.

        Raises:
            VerifyError: the operator does not take such arguments.
        """
        if ops.is_scalar_op(node.target) and node.target is not operator.getitem:
            # The number itself is not known; what operators make of it depends on its type alone.
            whole = all(map(_is_whole, node.args))
            return 2 if whole and node.target is not operator.truediv else 0.5
        key = self.call_key(node)
        if key not in self._inferred:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
            target = ops.allocating(node.target)
            if target is not node.target:  # nothing is written over to find out
                kwargs = {name: value for name, value in kwargs.items() if name != ops.out_of(node.target)}
            assert callable(target), target
            try:
                with self.fake_mode, torch.no_grad(), without_log():
                    self._inferred[key] = ops.inferring(target)(*args, **kwargs)
            except Exception as error:
                reason = first_line(error) or type(error).__name__
                what = f"{node.name} ({target_name(node.target)}) cannot take its arguments: {reason}"
                raise VerifyError(
                    f"{blame or self._made_by}: {what}",
                    where=source_of(node),
                    fix=MISTAKE_IN_PASS,
                ) from error
        return self._inferred[key]

    def call_key(self, node: fx.Node) -> Hashable:
        """Equal for calls that give the same value: same operator, literals, and shapes, strides, dtypes of tensors."""
        named = tuple((name, self.form_of(value)) for name, value in sorted(node.kwargs.items())) if node.kwargs else ()
        return (node.target, self.form_of(node.args), named)

    def form_of(self, arg: Any) -> Hashable:
        """Equal for values of one shape, stride, offset, dtype and device, and for the same literals.

        Args:
            arg: a node, the value of one, a literal, or several of them.
        """
        val = arg.meta["val"] if isinstance(arg, fx.Node) else arg
        if isinstance(val, torch.Tensor):
            known = self._keys.get(id(val))  # asking a fake tensor takes longer than all else here
            if known is None:
                sizes = (*val.shape, *val.stride(), val.storage_offset())
                form = (val.dim(), tuple(map(_of_size, sizes)), val.dtype, str(val.device))
                known = self._keys[id(val)] = (val, self._forms.setdefault(form, len(self._forms)))
            return known[1]
        if isinstance(val, (tuple, list)):
            return (type(val).__name__, *map(self.form_of, val))
        return (type(val).__name__, _of_size(val))

    def empty(self, shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> FakeTensor:
        """A fake tensor of this program's mode, to be a placeholder's value."""
        with self.fake_mode:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        assert isinstance(tensor, FakeTensor)
        return tensor

    def set_results(self, results: list[Any], outputs: list[Input | None]) -> None:
        """Replace what the program returns."""
        self.output_node.args = (list(results),)
        self.outputs = list(outputs)

    # -- showing ------------------------------------------------------------------------------------------

    def text(self, *, origins: bool = False) -> str:
        """The program as text, independent of node names; ``origins`` appends phase, module, source, pass."""
        number = {node: f"%{i}" for i, node in enumerate(self.graph.nodes)}
        lines = []
        for node in self.graph.nodes:
            args = ", ".join(
                [show(a, number) for a in node.args]
                + [f"{k}={show(v, number)}" for k, v in sorted(node.kwargs.items())]
            )
            if node.op == "placeholder":
                tier = self.tier_of(node)
                where = f" on {tier}" if tier else ""
                line = f"{number[node]}: {describe(node.meta['val'])} = input {node.meta['input']}{where}"
            elif node.op == "output":
                named = ", ".join("loss" if o is None else str(o) for o in self.outputs)
                line = f"return {args}  # {named}"
            else:
                val = node.meta.get("val")  # a gradient that an operator does not give has none
                line = f"{number[node]}: {describe(val)} = {target_name(node.target)}({args})"
            if origins and "origin" in node.meta:
                o = node.meta["origin"]
                line += f"  # {o.phase.value} {o.module or '-'} {o.source or '-'} [{o.made_by}]"
            lines.append(line)
        return "\n".join(lines)

    def digest(self) -> bytes:
        """SHA-256 of the program text and layout: equal on ranks that will issue the same operations."""
        starts = sorted(self.init.items(), key=lambda item: str(item[0]))
        facts = (self.layout, starts, sorted(self.given.items()), [g.text for g in self.guards])
        return hashlib.sha256((self.text() + in_words(facts)).encode()).digest()

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True)
class Guard:
    """A condition on scalar inputs that was decided while capturing; if it changes, the step is recaptured.

    Attributes:
        inputs: HYPER and OPT_STATE inputs that it reads.
        holds: called with their values, in that order.
        text: the condition on ``x0``, ``x1``, ...; equal texts mean the same.
    """

    inputs: tuple[Input, ...]
    holds: Callable[..., bool]
    text: str


def phase_of(node: fx.Node) -> Phase | None:
    """The part of the step that a call belongs to; None for an input."""
    origin: Origin | None = node.meta.get("origin")
    return None if origin is None else origin.phase


def update_nodes(program: Program) -> dict[str, list[fx.Node]]:
    """The optimizer update's nodes by the bucket (or, before bucketing, parameter) they serve, in order."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.meta["origin"].phase is Phase.UPDATE and node.meta["origin"].module:
            found.setdefault(node.meta["origin"].module, []).append(node)
    return found


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of the same nodes, output included."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = copy_node(node, copy, copies)
    return copy


def copy_node(node: fx.Node, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A copy of a node in another graph, which reads the copies of what the node reads."""
    # Arguments are set afterwards: fx looks for symbols in those that a node is made with, as long as all else takes.
    made = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    made.args = fx.map_arg(node.args, copies.__getitem__)
    if node.kwargs:
        made.kwargs = fx.map_arg(node.kwargs, copies.__getitem__)
    made.meta = node.meta.copy()
    return made


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """Argument ``index`` of a call, which must be a node."""
    arg = node.args[index]
    assert isinstance(arg, fx.Node), (node, index)
    return arg


def target_name(target: Any) -> str:
    """``aten.mm.default`` for operator overloads, ``operator.mul`` for Python functions, a kernel's own text."""
    if hasattr(target, "writes"):
        return str(target)
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return in_words(target).removeprefix("_")


def source_of(node: Any) -> str | None:
    """The user's source line of a node, or of the first call that reads an input."""
    if not isinstance(node, fx.Node):
        return None
    nearest = [node] if "origin" in node.meta else [user for user in node.users if "origin" in user.meta]
    return quoted(nearest[0].meta["origin"].source) if nearest else None


@contextmanager
def without_log() -> Iterator[None]:
    """torch logs a traceback of its own for arguments that an operator refuses; the error says it all."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _of_size(number: Any) -> Hashable:
    """A size that can be looked up: of one that is symbolic, the expression."""
    size: Hashable = number.node.expr if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) else number
    return size


def _is_whole(arg: Any) -> bool:
    val = arg.meta["val"] if isinstance(arg, fx.Node) else arg
    return not val.is_floating_point() if isinstance(val, torch.Tensor) else isinstance(val, int)


_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "b8", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def describe(val: Any) -> str:
    """``f32[8, 4]`` for a tensor, the type's name for a number, a tuple of these for several results."""
    if isinstance(val, torch.Tensor):
        return f"{_SHORT.get(val.dtype, str(val.dtype))}[{', '.join(map(str, val.shape))}]"
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(map(describe, val)) + ")"
    return type(val).__name__


def show(arg: Any, number: dict[fx.Node, str]) -> str:
    """An argument as text, nodes by their number."""
    if isinstance(arg, fx.Node):
        return number[arg]
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(show(a, number) for a in arg) + "]"
    return in_words(arg)


_SAY_ALL = (
    type(None), bool, int, float, complex, str, bytes, slice, range, enum.Enum,
    torch.dtype, torch.layout, torch.memory_format,
)  # fmt: skip
"""Types whose repr is the whole value and the same in every process."""


def qualified_name(value: Any) -> str:
    """Where a function or type, or else the type of an object, is defined."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return ".".join(filter(None, (getattr(named, "__module__", None), named.__qualname__)))


def in_words(value: Any, name: Callable[[Any], str] = qualified_name) -> str:
    """A value as text that ranks can compare.

    A device is its type, since each rank has its own. What has no value to show is called what ``name`` says: its repr
    would hold an address.
    """

    def words(inner: Any) -> str:
        return in_words(inner, name)

    if isinstance(value, _SAY_ALL):
        return repr(value)
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, torch.Tensor):
        content = "" if value.is_meta or isinstance(value, FakeTensor) else repr(value.tolist())
        return f"{describe(value)} {content}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(words, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({', '.join(sorted(map(words, value)))})"
    if isinstance(value, Mapping):
        return f"{type(value).__name__}({', '.join(f'{words(k)}: {words(v)}' for k, v in value.items())})"
    if is_dataclass(value) and not isinstance(value, type):
        shown = [f"{f.name}={words(getattr(value, f.name))}" for f in fields(value) if f.repr]
        return f"{type(value).__name__}({', '.join(shown)})"
    return name(value)


__all__ = [
    "FlatGradient",
    "Guard",
    "Input",
    "Mesh",
    "Origin",
    "Phase",
    "Program",
    "Role",
    "Stage",
    "StateInit",
    "copy_graph",
    "describe",
    "in_words",
    "operand",
    "phase_of",
    "qualified_name",
    "show",
    "source_of",
    "target_name",
    "update_nodes",
]
