"""Lay parameters, gradients and optimizer state out in flat buckets, and update each bucket as one vector.

Which parameters may share a bucket is read from the captured update: it must be the same elementwise expression of
the same hyperparameters. Where it mixes the elements of a parameter, the bucket's parameters are dealt out to the
ranks, and each computes the update of those that it owns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.averages import WEIGHT_EMA
from zgraph.layout import ALIGN, Bucket, Layout, ParamSpec, make_buckets
from zgraph.passes.bounds import Bounds, times_of
from zgraph.passes.own import owned_update
from zgraph.passes.tidy import remove_dead
from zgraph.passes.updates import Updates
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
    phase_of,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class FormBuckets(Pass):
    """Give each bucket one flat buffer per kind of state; parameters become views of it.

        w: f32[8, 4], b: f32[8]              flat: f32[48]
        gw, gb = backward(w, b)        ->    gw, gb = backward(view(flat[0:32]), view(flat[32:40]))
        w' = update(w, gw)                   flat' = update(flat, cat(gw, gb, zeros))
        b' = update(b, gb)

    An update that mixes the elements of a parameter stays apart from those of others, within one call for the bucket.

    Args:
        world: the number of ranks that every bucket must divide into.
        bucket_bytes: target size of a bucket.
        layout: use these buckets instead of forming new ones, if the update allows it.
        packed: optimizer state is to lie in 8 bits an element, where it is float32 and not an average of weights.
        granule: of which a rank's part of a bucket has a multiple of elements; a multiple itself of ``ALIGN``.
        bounds: says by cost where buckets end, instead of ``bucket_bytes``; but of whole parameters.
    """

    world: int
    bucket_bytes: int
    layout: Layout | None = None
    packed: bool = False
    granule: int = ALIGN
    bounds: Bounds | None = field(default=None, repr=False)

    takes, gives = Stage.CAPTURED, Stage.BUCKETED

    def rewrite(self, program: Program) -> None:
        updates = Updates(program)
        specs = param_specs(program, updates)
        if self.layout is not None and _fits(self.layout, specs):
            layout = self.layout
        else:
            divide = self._divide(program, updates) if self.bounds is not None else None
            buckets = make_buckets(specs, self.world, self.bucket_bytes, self.granule, divide)
            layout = Layout(buckets, self.world, packed=tuple(_packed(buckets, updates)) if self.packed else ())
        _Flattener(program, updates, layout).run()
        program.layout = layout.undivided()

    def _divide(self, program: Program, updates: Updates) -> Callable[[Sequence[ParamSpec]], list[list[int]]]:
        """What says which parameters share buckets."""
        bounds = self.bounds
        assert bounds is not None
        times = times_of(program, updates.gradient, bounds.hardware)
        return lambda members: bounds.divide(members, times)


def _packed(buckets: Iterable[Bucket], updates: Updates) -> Iterator[tuple[str, str]]:
    """Bucket and key of state that may be packed: float32 tensors, where the update treats every element alike."""
    for bucket in buckets:
        for what, result in updates.results.get(bucket.segments[0].name, {}).items():
            is_state = what.role is Role.OPT_STATE and what.key != WEIGHT_EMA and not bucket.owners
            if is_state and updates.is_vector(what) and result.meta["val"].dtype is torch.float32:
                yield bucket.name, what.key


def _fits(layout: Layout, specs: list[ParamSpec]) -> bool:
    """Whether existing buckets hold exactly these parameters, none mixing different updates."""
    by_name = {spec.name: spec for spec in specs}
    if {s.name for b in layout.buckets for s in b.segments} != set(by_name):
        return False
    for bucket in layout.buckets:
        here = [by_name[segment.name] for segment in bucket.segments]
        if len({(spec.group, spec.trainable, spec.work is not None) for spec in here}) != 1:
            return False
        if here[0].trainable != bucket.trainable:
            return False
        shapes = [(segment.name, segment.shape) for segment in bucket.segments]
        if shapes != [(spec.name, spec.shape) for spec in here]:
            return False
        if here[0].work is None and bucket.owners:
            continue  # as of a micro-batch that updates nothing
        if (here[0].work is None) != (not bucket.owners):
            return False
        stored = {(key, s.name, s.shape) for key, state in bucket.states for s in state.segments}
        if stored != {(key, s.name, dict(s.states).get(key, s.shape)) for s in here for key, _ in bucket.states}:
            return False
        if {key for spec in here for key, _ in spec.states} != {key for key, _ in bucket.states}:
            return False
    return True


def param_specs(program: Program, updates: Updates) -> list[ParamSpec]:
    """All parameters in the order in which forward first reads them; unread ones last."""
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    found = []
    for (name, _), node in program.inputs(Role.PARAM).items():
        reads = [position[u] for u in node.users if u.op == "call_function" and phase_of(u) is not Phase.UPDATE]
        val = node.meta["val"]
        group = (updates.group.get(name), updates.given(name), _read_as(node))
        spec = ParamSpec(
            name=name,
            shape=tuple(val.shape),
            dtype=val.dtype,
            device=val.device,
            trainable=name in updates.group,
            group=group,
            work=updates.work.get(name),
            states=tuple((updates.shapes_of_state(name) or program.given_shapes.get(name, {})).items()),
        )
        found.append((min(reads, default=len(position)), spec))
    return [spec for _, spec in sorted(found, key=lambda item: item[0])]


def _read_as(param: fx.Node) -> torch.dtype | None:
    """The dtype to which all of forward and backward cast a parameter; None if some of it reads the parameter itself.

    Parameters of one bucket travel together, so they are read alike.
    """
    readers = [u for u in param.users if u.op == "call_function" and phase_of(u) is not Phase.UPDATE]
    dtypes = {u.meta["val"].dtype if u.target is aten._to_copy.default else None for u in readers}
    return next(iter(dtypes)) if len(dtypes) == 1 else None


class _Flattener:
    def __init__(self, program: Program, updates: Updates, layout: Layout) -> None:
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
        backward = next(
            n for n in self.program.graph.nodes if n.op == "call_function" and phase_of(n) is Phase.BACKWARD
        )
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
            readers = [u for u in old.users if u.op == "call_function" and phase_of(u) is not Phase.UPDATE]
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
                numel = self.layout.bucket(bucket.name, what.key).numel
                val = program.empty([numel], val.dtype, bucket.device)
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
        is_owned = model.name in self.updates.work
        flat_nodes = [node for node in nodes if not is_owned or node in self.updates.apart[model.name]]
        copy((node for node in flat_nodes if node not in late), before)
        # What nothing but padding would add is zero times a factor of its own; its gradient is zero as it is.
        counted = copied(squared) if any(segment.numel for segment in bucket.segments) else gradient
        for squares in self.squares.values():
            origin = Origin(Phase.UPDATE, bucket.name, shallow(gradient).source)
            squares.append(program.call(ops.square_sum, counted, origin=origin, before=before))
        if self.last_of_all is not None and late:
            before = self.last_of_all.next
        copy((node for node in flat_nodes if node in late), before)
        results: dict[Input, Any] = {}
        made = [copies[node] for node in flat_nodes]
        owned = owned_update(program, self.updates, self.layout, bucket, copies, before) if is_owned else {}
        for what, result in self.updates.results[model.name].items():
            if replace(what, name=bucket.name) in owned:
                continue
            new = copied(result)
            if new in made:
                made.remove(new)
            elif _is_tensor(new) and new.meta.get("input") != replace(what, name=bucket.name):
                # A gradient, another state or what is a result already: this state needs memory of its own.
                origin = replace(shallow(new), phase=Phase.UPDATE, module=bucket.name)
                new = program.call(aten.clone.default, new, origin=origin, before=before)
            results[replace(what, name=bucket.name)] = new
        return {**owned, **results}


def shallow(node: fx.Node) -> Origin:
    """The node's origin; a placeholder counts as forward."""
    origin = node.meta.get("origin")
    return origin if origin is not None else Origin(Phase.FORWARD)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor)
