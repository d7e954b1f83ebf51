"""Lay parameters, gradients and optimizer state out in flat buckets, and update each bucket as one vector.

Which parameters may share a bucket is read from the captured update: it must be the same elementwise expression of
the same hyperparameters. Nothing is known about particular optimizers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.errors import OptimizerError, quoted
from zgraph.layout import Bucket, Layout, ParamSpec, make_buckets
from zgraph.passes.tidy import remove_dead
from zgraph.pipeline import Pass
from zgraph.program import (
    OF_PARAMETERS,
    FlatGradient,
    Guard,
    Input,
    Origin,
    Phase,
    Program,
    Role,
    Stage,
    operand,
    target_name,
)
from zgraph.terms import promoted

aten = torch.ops.aten


@dataclass(frozen=True)
class FormBuckets(Pass):
    """Give each bucket one flat buffer per kind of state; parameters become views of it.

        w: f32[8, 4], b: f32[8]              flat: f32[48]
        gw, gb = backward(w, b)        ->    gw, gb = backward(view(flat[0:32]), view(flat[32:40]))
        w' = update(w, gw)                   flat' = update(flat, cat(gw, gb, zeros))
        b' = update(b, gb)

    Args:
        world: the number of ranks that every bucket must divide into.
        bucket_bytes: target size of a bucket.
        layout: use these buckets instead of forming new ones, if the update allows it.
    """

    world: int
    bucket_bytes: int
    layout: Layout | None = None

    takes, gives = Stage.CAPTURED, Stage.BUCKETED

    def rewrite(self, program: Program) -> None:
        updates = _Updates(program)
        specs = _specs(program, updates)
        if self.layout is not None and _fits(self.layout, specs):
            layout = self.layout
        else:
            layout = Layout(make_buckets(specs, self.world, self.bucket_bytes), self.world)
        _Flattener(program, updates, layout).run()
        program.layout = replace(layout, shard_params=False, shard_state=False)


def _fits(layout: Layout, specs: list[ParamSpec]) -> bool:
    """Whether existing buckets hold exactly these parameters, none mixing different updates."""
    by_name = {spec.name: spec for spec in specs}
    if {s.name for b in layout.buckets for s in b.segments} != set(by_name):
        return False
    for bucket in layout.buckets:
        kinds = {(by_name[s.name].group, by_name[s.name].trainable, by_name[s.name].shape) for s in bucket.segments}
        groups = {kind[:2] for kind in kinds}
        if len(groups) != 1 or any(by_name[s.name].shape != s.shape for s in bucket.segments):
            return False
        if next(iter(groups))[1] != bucket.trainable:
            return False
    return True


class _Updates:
    """The optimizer update of every parameter, as a hash-consed elementwise expression.

    Two parameters have equal ``expression`` exactly when their updates are the same operators on the same
    hyperparameters, each reading its own parameter, gradient and state.
    """

    def __init__(self, program: Program) -> None:
        self.gradient: dict[str, fx.Node] = {}
        self.expression: dict[str, Hashable] = {}
        self.nodes: dict[str, list[fx.Node]] = {}
        self.shared: list[fx.Node] = []  # arithmetic on hyperparameters alone
        self.sums = list(program.graph.find_nodes(op="call_function", target=ops.add_up))
        self.of_all = _of_all(program)
        self.squared = {
            square.meta["origin"].module: operand(square) for total in self.sums for square in total.all_input_nodes
        }  # what of each parameter the squares are added up of
        self.results: dict[str, dict[Input, Any]] = {}
        self._program = program
        self._terms: dict[Hashable, int] = {}
        self._term: dict[fx.Node, int] = {}
        self._owner: dict[fx.Node, str | None] = {}
        self._vector: set[fx.Node] = set()
        self._is_vector: dict[str, bool] = {}  # by state key, as parameters that are not 0-dim show
        for what, result in zip(program.outputs, program.results(), strict=True):
            if what is not None and what.role in OF_PARAMETERS:
                self.results.setdefault(what.name, {})[what] = result
        inputs = {what: node for node, what in program.placeholders()}
        position = {node: i for i, node in enumerate(program.graph.nodes)}
        for name, results in self.results.items():
            self.nodes[name] = []
            shape = inputs[Input(Role.PARAM, name)].meta["val"].shape
            keys: list[Hashable] = []
            for what, result in sorted(results.items(), key=lambda item: str(item[0])):
                if shape and what.role is Role.OPT_STATE:
                    val = result.meta["val"] if isinstance(result, fx.Node) else result
                    self._is_vector[what.key] = isinstance(val, torch.Tensor) and val.dim() > 0
                start = program.init.get(what)
                keys.append((what.role, what.key, self._visit(result, name, shape), start))
            if name in self.squared:
                keys.append((None, "", self._visit(self.squared[name], name, shape), None))
            self.nodes[name].sort(key=position.__getitem__)
            if name not in self.gradient:
                raise OptimizerError(
                    f"the update of {name} does not read its gradient", fix="this optimizer needs no backward pass"
                )
            self.expression[name] = tuple(keys)

    def _visit(self, root: Any, name: str, shape: torch.Size) -> Hashable:
        if not isinstance(root, fx.Node):
            return ("literal", root)
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._term:
                stack.pop()
                continue
            if self._leaf(node, name):
                stack.pop()
                continue
            waiting = [n for n in node.all_input_nodes if n not in self._term]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            self._add(node, name, shape)
        if self._owner[root] not in (None, name):
            raise self._coupled(root, name)
        return self._term[root]

    def _leaf(self, node: fx.Node, name: str) -> bool:
        """Give a leaf its term; leaves of a parameter's own are named by what they are, not whose."""
        if node.op == "placeholder":
            what: Input = node.meta["input"]
            if what.role is Role.PARAM:
                key: Hashable = ("param",)
                self._vector.add(node)
            elif what.role is Role.OPT_STATE:
                key = ("state", what.key)
                if isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].dim() > 0:
                    self._vector.add(node)
            elif what.role is Role.GRADIENT:
                key = ("earlier gradients",)
                self._vector.add(node)
            elif what.role is Role.CONSTANT:
                value = self._program.constants[what.name]
                key = ("constant", str(value.dtype), tuple(value.shape), tuple(value.flatten().tolist()))
            else:
                key = ("input", what)
            owned = what.role in OF_PARAMETERS
            self._set(node, key, what.name if owned else None)
            return True
        if node in self.of_all:
            self._set(node, ("shared", node), None)
            return True
        if node.meta["origin"].phase is not Phase.UPDATE:
            self._vector.add(node)
            self._term[node] = self._terms.setdefault(("gradient",), len(self._terms))
            self._owner[node] = None  # a gradient may be shared: two biases that are added have the same one
            return True
        return False

    def _add(self, node: fx.Node, name: str, shape: torch.Size) -> None:
        vals = [n.meta["val"] for n in (node, *node.all_input_nodes)]
        shapes = {val.shape for val in vals if isinstance(val, torch.Tensor)}
        if not ops.is_elementwise(node.target) or shapes - {shape, torch.Size(())}:
            raise OptimizerError(
                f"the update of {name} is not elementwise: {target_name(node.target)} mixes elements, "
                "so it cannot run on slices of a flat bucket",
                where=quoted(node.meta["origin"].source),
                fix="use an optimizer whose update is elementwise (SGD, Adam, AdamW, Adagrad, RMSprop, Lion, ...)",
            )
        if not shape:
            self._check_promotion(node, name)
        owners = {self._owner[n] for n in node.all_input_nodes} - {None}
        gradients = [n for n in node.all_input_nodes if self._is_gradient(n)]
        if owners - {name} or any(self.gradient.setdefault(name, g) is not g for g in gradients):
            raise self._coupled(node, name)

        def is_shape(arg: Any) -> bool:
            return bool(shape) and ops.creates(node.target) and isinstance(arg, (list, tuple)) and tuple(arg) == shape

        def term(arg: Any) -> Hashable:
            if isinstance(arg, fx.Node):
                return self._term[arg]
            if is_shape(arg):
                return "shape"
            if isinstance(arg, (list, tuple)):
                return tuple(term(a) for a in arg)
            return (type(arg).__name__, arg)

        key = (node.target, tuple(map(term, node.args)), tuple((k, term(v)) for k, v in sorted(node.kwargs.items())))
        is_own = bool(owners or gradients) or any(map(is_shape, node.args))
        self._set(node, key, name if is_own else None)
        if any(n in self._vector for n in node.all_input_nodes):
            self._vector.add(node)
        (self.nodes[name] if is_own else self.shared).append(node)

    def _check_promotion(self, node: fx.Node, name: str) -> None:
        """Refuse what a 0-dim parameter computes in another dtype than a vector would, as which it is stored."""
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
        as_number, as_vector = (
            promoted((n.meta["val"].dtype, is_vector and n in self._vector) for n in inputs)
            for is_vector in (False, True)
        )
        if as_number is not as_vector:
            raise OptimizerError(
                f"the update of {name}, a single number, computes {target_name(node.target)} in {as_number}, where a "
                f"vector would in {as_vector}, and parameters are stored in vectors",
                where=quoted(node.meta["origin"].source),
                fix="give the parameter the shape [1], or leave it to another optimizer",
            )

    def _is_gradient(self, node: fx.Node) -> bool:
        return node.op != "placeholder" and node.meta["origin"].phase is not Phase.UPDATE

    def _set(self, node: fx.Node, key: Hashable, owner: str | None) -> None:
        self._term[node] = self._terms.setdefault(key, len(self._terms))
        self._owner[node] = owner

    def is_vector(self, what: Input) -> bool:
        """Whether a state entry has one element per element of its parameter, rather than one in all.

        Its shape tells, except for the state of a 0-dim parameter: there the other parameters' tells, and if there
        are none, it is what the gradient flows into.
        """
        if what.role is Role.GRADIENT:
            return True
        if what.key in self._is_vector:
            return self._is_vector[what.key]
        result = self.results[what.name][what]
        return isinstance(result, fx.Node) and result in self._vector

    def _coupled(self, node: fx.Node, name: str) -> OptimizerError:
        origin = node.meta.get("origin")
        return OptimizerError(
            f"the update of {name} reads another parameter's value, gradient or state",
            where=quoted(origin.source) if origin else None,
            fix="use an optimizer that updates each parameter from its own gradient and state",
        )


def _of_all(program: Program) -> dict[fx.Node, bool]:
    """What all parameters' updates read alike: sums over all gradients, state of the step, and what follows from them.

    In order, with whether it is known only when backward is done. None of it is any parameter's own.
    """
    found: dict[fx.Node, bool] = {}
    fixed: set[fx.Node] = set()  # made of hyperparameters alone
    for node in program.graph.nodes:
        if node.op == "call_function" and node.meta["origin"].phase is Phase.UPDATE:
            sources = node.all_input_nodes
            roles = {source.meta["input"].role for source in sources if source.op == "placeholder"}
            others = [s for s in sources if s.op != "placeholder" and s not in found and s not in fixed]
            is_fixed = not others and roles <= {Role.HYPER, Role.CONSTANT}
            follows = is_fixed and not found.keys().isdisjoint(sources)
            if node.target is ops.add_up or Role.RECIPE in roles or follows:
                early = all(_phase(source) is Phase.FORWARD for source in others)
                found[node] = not early or any(found.get(source, False) for source in sources)
            elif is_fixed:
                fixed.add(node)
    return found


def _specs(program: Program, updates: _Updates) -> list[ParamSpec]:
    """All parameters in the order in which forward first reads them; unread ones last."""
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    found = []
    for (name, _), node in program.inputs(Role.PARAM).items():
        reads = [position[u] for u in node.users if u.op == "call_function" and _phase(u) is not Phase.UPDATE]
        val = node.meta["val"]
        trainable = name in updates.expression
        group = (updates.expression.get(name), program.given.get(name), _read_as(node))
        spec = ParamSpec(name, tuple(val.shape), val.dtype, val.device, trainable, group)
        found.append((min(reads, default=len(position)), spec))
    return [spec for _, spec in sorted(found, key=lambda item: item[0])]


def _read_as(param: fx.Node) -> torch.dtype | None:
    """The dtype to which all of forward and backward cast a parameter; None if some of it reads the parameter itself.

    Parameters of one bucket travel together, so they are read alike.
    """
    readers = [u for u in param.users if u.op == "call_function" and _phase(u) is not Phase.UPDATE]
    dtypes = {u.meta["val"].dtype if u.target is aten._to_copy.default else None for u in readers}
    return next(iter(dtypes)) if len(dtypes) == 1 else None


def _phase(node: fx.Node) -> Phase:
    origin: Origin = node.meta["origin"]
    return origin.phase


class _Flattener:
    def __init__(self, program: Program, updates: _Updates, layout: Layout) -> None:
        self.program, self.updates, self.layout = program, updates, layout
        self.position = {node: i for i, node in enumerate(program.graph.nodes)}
        self.params = program.inputs(Role.PARAM)
        self.states: dict[str, dict[Input, fx.Node]] = {}
        for node, what in program.placeholders():
            if what.role in (Role.OPT_STATE, Role.GRADIENT):
                self.states.setdefault(what.name, {})[what] = node
        shared = set(updates.shared)
        self.first = next(n for n in program.graph.nodes if n.op == "call_function" and n not in shared)
        self.last_of_all = next((node for node in reversed(updates.of_all) if updates.of_all[node]), None)
        self.squares: dict[fx.Node, list[fx.Node]] = {node: [] for node in updates.sums}
        self.replaced = [node for node, what in program.placeholders() if what.role in OF_PARAMETERS]

    def run(self) -> None:
        program = self.program
        outputs: list[Input | None] = []
        results: list[Any] = []
        for what, result in zip(program.outputs, program.results(), strict=True):
            if what is None or what.role not in OF_PARAMETERS:
                outputs.append(what)
                results.append(result)
        returned = {result for result in results if isinstance(result, fx.Node)}
        views: dict[Any, fx.Node] = {}
        init = {what: start for what, start in program.init.items() if what.role not in OF_PARAMETERS}
        anchor = next(iter(program.graph.nodes))
        for node in self.updates.shared:
            node.meta["origin"] = replace(node.meta["origin"], module="")
            self.first.prepend(node)
        self._know_early()
        for bucket in self.layout.buckets:
            flat = program.placeholder(
                Input(Role.PARAM, bucket.name),
                program.empty([bucket.numel], bucket.dtype, bucket.device),
                before=anchor,
            )
            views |= self._view_segments(bucket, flat, returned)
            if bucket.trainable:
                for what, result in self._update(bucket, flat, self._gradient(bucket), anchor).items():
                    outputs.append(what)
                    results.append(result)
                    start = program.init.get(replace(what, name=bucket.segments[0].name))
                    if start is not None:
                        init[what] = start
        for node, squares in self.squares.items():
            node.args = (squares,)
        program.set_results([views.get(result, result) for result in results], outputs)
        program.init = init
        program.guards = self._guards()
        remove_dead(program)
        for node in self.replaced:
            program.graph.erase_node(node)
        for node, what in list(program.placeholders()):
            if not node.users and what.role in (Role.CONSTANT, Role.HYPER):
                program.graph.erase_node(node)
                program.constants.pop(what.name, None)

    def _know_early(self) -> None:
        """Have what updates read of the step as a whole when backward begins, where it can be known by then."""
        backward = next(n for n in self.program.graph.nodes if n.op == "call_function" and _phase(n) is Phase.BACKWARD)
        of_all = self.updates.of_all
        needed = {source for nodes in self.updates.nodes.values() for node in nodes for source in node.all_input_nodes}
        for node in reversed(of_all):
            if node in needed:
                needed.update(node.all_input_nodes)
        for node, is_late in of_all.items():
            if node in needed and not is_late:
                backward.prepend(node)

    def _guards(self) -> tuple[Guard, ...]:
        """The conditions on the buckets' state, each once."""
        guards: dict[tuple[Hashable, str], Guard] = {}
        for guard in self.program.guards:
            inputs = tuple(
                replace(what, name=self.layout.find(what.name)[0].name) if what.role is Role.OPT_STATE else what
                for what in guard.inputs
            )
            guards.setdefault((inputs, guard.text), replace(guard, inputs=inputs))
        return tuple(guards.values())

    def _view_segments(self, bucket: Bucket, flat: fx.Node, returned: set[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Let forward and backward read parameters as views of their bucket; the views, of ``returned`` ones too."""
        views: dict[fx.Node, fx.Node] = {}
        for segment in bucket.segments:
            old = self.params[segment.name, ""]
            readers = [u for u in old.users if u.op == "call_function" and _phase(u) is not Phase.UPDATE]
            if not readers and old not in returned:
                continue
            first = min(readers, key=self.position.__getitem__, default=self.program.output_node)
            origin = Origin(Phase.FORWARD, segment.name.rpartition(".")[0], shallow(first).source)
            piece = self.program.call(
                aten.slice.Tensor, flat, 0, segment.offset, segment.offset + segment.numel, origin=origin, before=first
            )
            views[old] = view = self.program.call(
                aten.view.default, piece, list(segment.shape), origin=origin, before=first
            )
            for reader in readers:
                reader.replace_input_with(old, view)
        return views

    def _gradient(self, bucket: Bucket) -> fx.Node:
        """The bucket's flat gradient, made right after the last of its parts."""
        program = self.program
        grads = [self.updates.gradient[s.name] for s in bucket.segments]
        last = max(grads, key=lambda n: self.position.get(n, -1))
        before = last.next if last.op != "placeholder" else self.first
        origin = replace(shallow(last), phase=Phase.BACKWARD, module=bucket.name)
        parts: list[fx.Node] = []
        zeros: dict[int, fx.Node] = {}

        def pad(to: int) -> None:
            gap = to - end
            if gap:
                if gap not in zeros:
                    zeros[gap] = program.call(
                        aten.full.default,
                        [gap],
                        0,
                        dtype=bucket.dtype,
                        device=bucket.device,
                        origin=origin,
                        before=before,
                    )
                parts.append(zeros[gap])

        end = 0
        for segment, grad in zip(bucket.segments, grads, strict=True):
            pad(segment.offset)
            parts.append(program.call(aten.reshape.default, grad, [-1], origin=origin, before=before))
            end = segment.offset + segment.numel
        pad(bucket.numel)
        flat = parts[0]
        if len(parts) == 1 and not flat.meta["val"].is_contiguous():
            flat = program.call(
                aten.clone.default, flat, memory_format=torch.contiguous_format, origin=origin, before=before
            )
        if len(parts) > 1:
            flat = program.call(aten.cat.default, parts, origin=origin, before=before)
        flat.meta["holds"] = FlatGradient(bucket.name)
        return flat

    def _late(self, nodes: Sequence[fx.Node], squared: fx.Node | None) -> dict[fx.Node, None]:
        """Those of an update's nodes that come when all gradients are there: what reads something of all of them.

        Where squares are added up, everything but what they are of: it would take memory until then.
        """
        if squared is not None:
            needed = {squared}
            for node in reversed(nodes):
                if node in needed:
                    needed.update(node.all_input_nodes)
            return {node: None for node in nodes if node not in needed}
        late: dict[fx.Node, None] = {}
        for node in nodes:
            if any(self.updates.of_all.get(source) or source in late for source in node.all_input_nodes):
                late[node] = None
        return late

    def _update(self, bucket: Bucket, flat: fx.Node, gradient: fx.Node, anchor: fx.Node) -> dict[Input, Any]:
        """Copy the update of the bucket's first parameter, on flat buffers, right after the flat gradient."""
        program = self.program
        model = bucket.segments[0]
        copies: dict[fx.Node, fx.Node] = {
            self.params[model.name, ""]: flat,
            self.updates.gradient[model.name]: gradient,
        }
        for what, node in self.states.get(model.name, {}).items():
            val = node.meta["val"]
            if self.updates.is_vector(what):
                val = program.empty([bucket.numel], val.dtype, val.device)
            copies[node] = program.placeholder(replace(what, name=bucket.name), val, before=anchor)

        def copied(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return copies.get(arg, arg)
            if isinstance(arg, (list, tuple)):
                if model.shape and tuple(arg) == model.shape:
                    return [bucket.numel]
                return type(arg)(copied(a) for a in arg)
            return arg

        def copy(nodes: Iterable[fx.Node], before: fx.Node) -> None:
            for node in nodes:
                origin = replace(node.meta["origin"], module=bucket.name)
                target, args = node.target, tuple(map(copied, node.args))
                kwargs = {key: copied(value) for key, value in node.kwargs.items()}
                if target is aten.copy.default and args[0].meta["val"].dim() < args[1].meta["val"].dim():
                    # Into a number that a 0-dim parameter's update has created, which has no room for a vector.
                    target, args, kwargs = aten._to_copy.default, args[1:2], {"dtype": args[0].meta["val"].dtype}
                copies[node] = program.call(target, *args, origin=origin, before=before, **kwargs)

        nodes, before, squared = self.updates.nodes[model.name], gradient.next, self.updates.squared.get(model.name)
        late = self._late(nodes, squared)
        copy((node for node in nodes if node not in late), before)
        # What nothing but padding would add is zero times a factor of its own; its gradient is zero as it is.
        counted = copied(squared) if any(segment.numel for segment in bucket.segments) else gradient
        for squares in self.squares.values():
            origin = Origin(Phase.UPDATE, bucket.name, shallow(gradient).source)
            squares.append(program.call(ops.square_sum, counted, origin=origin, before=before))
        if self.last_of_all is not None and late:
            before = self.last_of_all.next
        copy(late, before)
        results: dict[Input, Any] = {}
        made = [copies[node] for node in self.updates.nodes[model.name]]
        for what, result in self.updates.results[model.name].items():
            new = copied(result)
            if new in made:
                made.remove(new)
            elif _is_tensor(new) and new.meta.get("input") != replace(what, name=bucket.name):
                # A gradient, another state or what is a result already: this state needs memory of its own.
                origin = replace(shallow(new), phase=Phase.UPDATE, module=bucket.name)
                new = program.call(aten.clone.default, new, origin=origin, before=before)
            results[replace(what, name=bucket.name)] = new
        return results


def shallow(node: fx.Node) -> Origin:
    """The node's origin; a placeholder counts as forward."""
    origin = node.meta.get("origin")
    return origin if origin is not None else Origin(Phase.FORWARD)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor)
