"""What a program computes, on every rank at once, as terms.

The captured step says what one process computes. On N ranks it means: every rank runs forward and backward on its own
batch, and the update reads the mean of the gradients; the loss is the mean of the losses. Up to the stage at which
passes have made these means explicit they are implied: a value that crosses from backward to the update is its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from zgraph import ops
from zgraph.changes import Look
from zgraph.layout import Bucket, Layout
from zgraph.movement import RULES, Call, Value, axis_in_terms, without_defaults
from zgraph.packed import unpacked_numel
from zgraph.program import OF_PARAMETERS, Input, Mesh, Phase, Program, Role, Stage, operand, phase_of
from zgraph.terms import REPEATED, Piece, Term, Terms, form, literal

if TYPE_CHECKING:
    from zgraph.codegen.owned import OwnedUpdate, Place

aten = torch.ops.aten

Numbers = Mapping[tuple[str, str], str]
"""Parameter and key of optimizer state that is one number for a whole bucket -> the parameter that stands for all."""


_BY_MESH = frozenset({*ops.STARTS, ops.shard, ops.square_sum, ops.add_up, aten.amax.default})
"""Operators whose rules read the mesh: how many ranks there are, or along which axis they divide state."""


@dataclass(eq=False)
class Meaning:
    """What a program computes.

    Attributes:
        values: of every node; also of those that passes have erased since.
        results: of every output, in order.
        draws: what was drawn from the random generator, in order, and by which node.
        implied: whether averages between the ranks are implied.
        context: what else inputs were read by: the buckets, numbers kept once, the ranks.
    """

    values: dict[fx.Node, Value] = field(default_factory=dict)
    results: list[Value] = field(default_factory=list)
    draws: dict[fx.Node, Term] = field(default_factory=dict)
    implied: bool = True
    context: tuple[Layout | None, Numbers, Mesh] = (None, {}, Mesh(1))

    def of_copy(self, twins: Mapping[fx.Node, fx.Node]) -> Meaning:
        """What a copy of the program means.

        Args:
            twins: the copy of each node.
        """
        return Meaning(
            {twins[node]: value for node, value in self.values.items()},
            self.results,
            {twins[node]: draw for node, draw in self.draws.items()},
            self.implied,
            self.context,
        )


def numbers_of(program: Program) -> dict[tuple[str, str], str]:
    """Optimizer state that a program in buckets keeps once for all parameters of a bucket."""
    if program.layout is None:
        return {}
    buckets = program.layout.by_name
    return {
        (segment.name, key): buckets[name].segments[0].name
        for (name, key), node in program.inputs(Role.OPT_STATE).items()
        if not form(node.meta["val"])[0] and name in buckets
        for segment in buckets[name].segments
    }


def interpret(
    program: Program,
    terms: Terms,
    numbers: Numbers,
    *,
    before: Meaning | None = None,
    look: Look | None = None,
    is_reference: bool = False,
) -> Meaning:
    """Evaluate ``program`` over terms, in one walk over its nodes.

    Args:
        program: at any stage.
        terms: shared by programs that are to be compared.
        numbers: of the program that this one is compared with.
        before: what the program meant, over the same terms, before what ``look`` has touched was made or altered.
        look: at its nodes as they are now; without one, no node has changed.
        is_reference: other programs are compared with this one, which says what is a gradient.
    """
    return _Interpreter(program, terms, numbers, is_reference=is_reference).run(before, look)


class _Interpreter:
    def __init__(self, program: Program, terms: Terms, numbers: Numbers, *, is_reference: bool = False) -> None:
        self.program, self.terms, self.numbers, self.is_reference = program, terms, numbers, is_reference
        self.mesh = program.mesh
        self.axis = axis_in_terms(self.mesh, self.mesh.shard_axis)  # along which state is divided
        self.context = (program.layout, numbers, self.mesh)
        self.meaning = Meaning(context=self.context)
        self.values = self.meaning.values
        # Until averaging is explicit, and where there is nobody to average with, it is implied.
        self.implied = self.meaning.implied = program.stage < Stage.SHARDED or self.mesh.size == 1
        self.buckets = {} if program.layout is None else program.layout.by_name

    def run(self, before: Meaning | None, look: Look | None) -> Meaning:
        if before is not None:
            self.values.update(before.values)
        again = set(self.program.graph.nodes) if before is None else self.again(before, look.touched if look else ())
        new: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            if node.op == "output":
                continue
            if node in again or (new and not new.isdisjoint(look.reads(node) if look else node.all_input_nodes)):
                value = self.call(node) if node.op == "call_function" else self.input(node)
                if value is not self.values.get(node):
                    self.values[node] = value
                    new.add(node)
        for what, result in zip(self.program.outputs, self.program.results(), strict=True):
            value = self.values[result] if isinstance(result, fx.Node) else literal(result)
            if self.implied and isinstance(value, Term) and _is_averaged(what, result):
                is_gradient = self.is_reference and what is not None
                value = self.terms.mean_gradient(value) if is_gradient else self.terms.mean(value)
            self.meaning.results.append(value)
        return self.meaning

    def again(self, before: Meaning, touched: Collection[fx.Node]) -> set[fx.Node]:
        """Nodes that may have another value than before though what they read has the same: draws are counted."""
        same = self.context == before.context
        inputs = (node for node, what in self.program.placeholders() if not same or what.role is Role.CONSTANT)
        again = {*touched, *before.draws, *inputs}
        if self.mesh != before.context[-1]:
            again.update(node for node in self.program.graph.nodes if node.target in _BY_MESH)
        if self.implied is not before.implied:
            again.update(
                node
                for node in self.program.graph.nodes
                if phase_of(node) is Phase.UPDATE and any(map(_comes_before_update, node.all_input_nodes))
            )
        return again

    # -- inputs ---------------------------------------------------------------------------------------------

    def input(self, node: fx.Node) -> Term:
        what: Input = node.meta["input"]
        shape, dtype = form(node.meta.get("val"))
        bucket = self.buckets.get(what.name)
        if what.role in (Role.PARAM, Role.GRADIENT) and bucket is not None:
            return self.flat_input(what, bucket, tuple(node.meta["val"].shape), node.meta["val"].dtype)
        if what.role is Role.GATHERED and bucket is not None:
            return self.gathered_input(what, bucket, node)
        if what.role is Role.OPT_STATE:
            if bucket is not None and self.program.layout is not None and shape:
                return self.state_input(what, self.program.layout, node)
            name = what.name if bucket is None else bucket.segments[0].name
            what = Input(what.role, self.numbers.get((name, what.key), name), what.key)
        if what.role is Role.CONSTANT:
            return self.constant(node, what)
        return self.terms.input(what, shape, dtype, varies=what.role in (Role.BATCH, Role.BUFFER))

    def gathered_input(self, what: Input, bucket: Bucket, node: fx.Node) -> Term:
        """All parameters of a bucket, cast one by one."""
        param, dtype = Input(Role.PARAM, what.name), node.meta["val"].dtype
        return self.terms.cast(self.flat_of(param, bucket, bucket.dtype), dtype)

    def state_input(self, what: Input, layout: Layout, node: fx.Node) -> Term:
        """Flat optimizer state, which may lie packed."""
        val, bucket = node.meta["val"], layout.bucket(what.name, what.key)
        if val.dtype is not torch.uint8 or not layout.packs(what.name, what.key):
            return self.flat_input(what, bucket, tuple(val.shape), val.dtype)
        flat = self.flat_input(what, bucket, (unpacked_numel(len(val)),), torch.float32)
        return self.terms.make(ops.pack_state, (flat,), tuple(val.shape), val.dtype)

    def flat_input(self, what: Input, bucket: Bucket, shape: tuple[int, ...], dtype: torch.dtype) -> Term:
        """This rank's part of the parameters of a bucket, or of one kind of their state."""
        layout, flat = self.program.layout, self.flat_of(what, bucket, dtype)
        assert layout is not None
        is_shard = layout.shard_params if what.role is Role.PARAM else layout.shard_state
        return self.terms.shard(flat, shape, self.axis) if is_shard and self.mesh.shard_size > 1 else flat

    def flat_of(self, what: Input, bucket: Bucket, dtype: torch.dtype) -> Term:
        """The parameters of a bucket, or one kind of their state, with padding between them.

        Between gradients, and where state is packed, there are zeros, and the verifier sees to it that they stay zeros.
        """
        zero = self.terms.fill(literal(0.0), (), dtype)
        layout = self.program.layout
        packed = what.role is Role.OPT_STATE and layout is not None and layout.packs(bucket.name, what.key)
        padding = zero if what.role is Role.GRADIENT or packed else self.terms.padding
        pieces: list[Piece] = []
        end = 0
        for segment in bucket.segments:
            base = self.terms.input(Input(what.role, segment.name, what.key), segment.shape, dtype, varies=False)
            pieces += [(padding, REPEATED, segment.offset - end), (base, 0, segment.numel)]
            end = segment.offset + segment.numel
        return self.terms.flat([*pieces, (padding, REPEATED, bucket.numel - end)], dtype)

    def constant(self, node: fx.Node, what: Input) -> Term:
        """A tensor that the step holds: known by its values if only the update reads it, else by itself."""
        tensor = self.program.constants[what.name]
        shape, dtype = form(node.meta.get("val"))
        if all(phase_of(user) is Phase.UPDATE for user in node.users):
            return self.terms.input(("constant", shape, literal(tensor.tolist())), shape, dtype, varies=False)
        return self.terms.input(("constant", id(tensor)), shape, dtype, varies=True)

    # -- calls ----------------------------------------------------------------------------------------------

    def call(self, node: fx.Node) -> Value:
        target: Any = node.target
        look = self.look
        if self.implied and phase_of(node) is Phase.UPDATE and target is not ops.max_over_ranks:
            of_gradient = self.is_reference and node.meta["origin"].module
            look = self.look_at_gradient if of_gradient else self.look_averaged
        named = {key: look(value) for key, value in node.kwargs.items()}
        if (out := ops.out_of(target)) is not None:  # where a result is stored is no part of what it is
            named.pop(out)
            target = ops.allocating(target)
        args, kwargs = without_defaults(target, tuple(map(look, node.args)), named)
        if hasattr(target, "body"):
            return self.body(target.body, args)
        if hasattr(target, "parts"):
            return self.owned(target, node, args)
        rule = RULES.get(target)
        if rule is not None:
            value = rule(Call(self.terms, node.meta.get("val"), args, kwargs, self.mesh))
            if value is not None:
                return value
        return self.plain(node, target, args, kwargs)

    def plain(self, node: fx.Node, target: Any, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Term:
        """A call that only its name and its arguments are known of."""
        shape, dtype = form(node.meta.get("val"))
        key = args + tuple(sorted(kwargs.items()))
        is_random = ops.draws(node)
        if is_random or target in ops.BY_PLACE:  # then it matters how arguments lie in memory: masks are drawn so
            key += tuple(_strides(source) for source in node.all_input_nodes)
        if is_random:
            draw = self.terms.make(target, (*key, ("draw", len(self.meaning.draws))), shape, dtype, varies=True)
            self.meaning.draws[node] = draw
            return draw
        if shape is not None and ops.is_elementwise(target):
            return self.terms.elementwise(target, key, shape, dtype)
        return self.terms.make(target, key, shape, dtype)

    def owned(self, update: OwnedUpdate, node: fx.Node, args: tuple[Value, ...]) -> tuple[Value, ...]:
        """Each parameter's update is its body, on what lies in its place; between them lies padding.

        What a rank has computed is its part of the results, for no parameter lies on more than one.
        """
        first, vals = update.parts[0], node.meta["val"]
        divided = update.is_divided(tuple(n.meta["val"] if isinstance(n, fx.Node) else n for n in node.args))
        wholes: list[Any] = [
            self.terms.whole(x, (p.numel,), self.axis) if divided and p is not None else x
            for x, p in zip(args, first.takes, strict=True)
        ]
        if any(x is None for x in wholes):
            return tuple(self.terms.make(update, (args, index), *form(val)) for index, val in enumerate(vals))
        made: list[list[tuple[Place, Term]]] = [[] for _ in vals]
        for part in update.parts:
            given = tuple(
                x if p is None else self.terms.reshape(self.terms.slice(x, p.offset, p.end), p.shape)
                for x, p in zip(wholes, part.takes, strict=True)
            )
            for mine, value, place in zip(made, self.body(part.body, given), part.gives, strict=True):
                mine.append((place, value))
        results = []
        for mine, whole, val in zip(made, first.gives, vals, strict=True):
            pieces: list[Piece] = []
            end = 0
            for place, value in sorted(mine, key=lambda item: (item[0].offset, item[0].end)):
                pieces.append((self.terms.padding, REPEATED, place.offset - end))
                pieces += self.terms.pieces(self.terms.reshape(value, (place.end - place.offset,)))
                end = place.end
            flat = self.terms.flat([*pieces, (self.terms.padding, REPEATED, whole.numel - end)], val.dtype)
            results.append(self.terms.shard(flat, tuple(val.shape), self.axis) if divided else flat)
        return tuple(results)

    def body(self, body: fx.Graph, args: tuple[Value, ...]) -> tuple[Value, ...]:
        """A fused kernel is its body."""
        inside = _Interpreter(self.program, self.terms, self.numbers)
        inside.implied, inside.meaning.draws = False, self.meaning.draws
        inputs = iter(args)
        for inner in body.nodes:
            if inner.op == "placeholder":
                inside.values[inner] = next(inputs)
            elif inner.op == "call_function":
                inside.values[inner] = inside.call(inner)
        results: Any = body.output_node().args[0]
        return tuple(map(inside.look, results))

    def look(self, arg: Any) -> Value:
        """An argument's value."""
        if isinstance(arg, fx.Node):
            return self.values[arg]
        if isinstance(arg, (list, tuple)):
            return tuple(map(self.look, arg))
        return literal(arg)

    def look_averaged(self, arg: Any) -> Value:
        """An argument's value as the update sees it: what backward has computed is averaged."""
        return self.averaged(arg, self.terms.mean)

    def look_at_gradient(self, arg: Any) -> Value:
        """The same, as the update of a parameter sees it."""
        return self.averaged(arg, self.terms.mean_gradient)

    def averaged(self, arg: Any, mean: Callable[[Term], Term]) -> Value:
        if isinstance(arg, fx.Node):
            value = self.values[arg]
            return mean(value) if _comes_before_update(arg) and isinstance(value, Term) else value
        if isinstance(arg, (list, tuple)):
            return tuple(self.averaged(inner, mean) for inner in arg)
        return literal(arg)


def _is_averaged(what: Input | None, result: fx.Node) -> bool:
    """Whether an output that comes straight from forward or backward stands for its mean."""
    state = what is None or what.role in OF_PARAMETERS
    return state and _comes_before_update(result)


def _comes_before_update(node: fx.Node) -> bool:
    """Whether a value is computed by forward or backward, on this rank's part of the batch.

    State that is loaded for them is none of their own, unlike what they have spilled.
    """
    loads = node.target is ops.wait and operand(node).target is ops.load
    is_state = loads and operand(operand(node)).op == "placeholder"
    return node.op == "call_function" and not is_state and phase_of(node) is not Phase.UPDATE


def _strides(node: fx.Node) -> tuple[int, ...]:
    val = node.meta["val"]
    return tuple(val.stride()) if isinstance(val, torch.Tensor) else ()
