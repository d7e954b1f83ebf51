"""What must hold of a program's structure at each stage, whatever it computes.

Arguments are defined before use; every node has a value and an origin, and the value is what its operator makes of its
arguments; collectives fit the mesh, they and transfers to lower tiers are waited for exactly once, before anything
reads them; memory that is written over, or is still travelling, is neither read nor written by anything else, and what
lies on a lower tier by nothing but transfers; results fit the inputs they replace.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise, takewhile
from typing import Any, NoReturn

import torch
from torch import fx

from zgraph import ops
from zgraph.changes import Look
from zgraph.codegen.owned import OwnedUpdate, Part
from zgraph.codegen.region import Region
from zgraph.errors import MISTAKE_IN_PASS, VerifyError
from zgraph.hardware import LOWER_TIERS
from zgraph.layout import Bucket, Layout
from zgraph.liveness import owners, written
from zgraph.packed import packed_numel
from zgraph.program import OF_PARAMETERS, Input, Mesh, Program, Role, Stage, describe, operand, source_of, target_name
from zgraph.sharing import Reads, shares


def check_structure(program: Program, *, after: str, look: Look | None = None) -> None:
    """Check everything but the meaning.

    Args:
        program: at any stage.
        after: the pass to blame.
        look: at its nodes as they are now; calls that were not touched since an earlier one are known to be in order
            by themselves. Without one, everything is looked at.

    Raises:
        VerifyError: with the rule, the node, the user's source line and the pass.
    """
    look = look or Look(program)
    if look.is_first:
        program.forget_values()
    _check_nodes(program, look, after)
    for node in look.touched:
        if node.op == "call_function":
            _check_value(program, node, after)
    if program.layout is None and program.stage >= Stage.BUCKETED:
        raise VerifyError(f"{after}: the program is {program.stage.name} but has no layout")
    if program.layout is not None and not look.same_inputs:
        _check_layout(program, program.layout, after)
    if not look.same_results:
        _check_results(program, after)
    if program.stage >= Stage.INPLACE or any(ops.may_write(node.target) for node in look.touched):
        _Memory(program, after).check()
    _check_shared(program, after)


def _check_shared(program: Program, after: str) -> None:
    """Nobody writes his part of parameters while others read them where they lie."""
    starts = shares(program)
    if not starts:
        return
    if program.stage < Stage.INPLACE:
        raise broken(after, starts[0], "shares memory, which comes with the last lowering only")
    reads = Reads(program)
    for start in starts:
        why = reads.why_not(start)
        if why is not None:
            raise broken(after, start, why)


def broken(after: str, node: fx.Node, rule: str) -> VerifyError:
    """The error for a node that breaks a rule."""
    name = node.op
    if node.op == "call_function":
        name = f"kernel {_called(node)}" if hasattr(node.target, "writes") else target_name(node.target)
    return VerifyError(
        f"{after} left a program that breaks a rule: {node.name} ({name}) {rule}",
        where=source_of(node),
        fix=MISTAKE_IN_PASS,
    )


def _check_nodes(program: Program, look: Look, after: str) -> None:
    if look.too_early is not None:
        before = set(takewhile(lambda node: node is not look.too_early, program.graph.nodes))
        late = next(source for source in look.too_early.all_input_nodes if source not in before)
        raise broken(after, look.too_early, f"reads {late.name} before it is computed")
    inputs = program.graph.find_nodes(op="placeholder")
    for node in inputs:
        if "input" not in node.meta or "val" not in node.meta:
            raise broken(after, node, "is an input without a meaning")
    if len({node.meta["input"] for node in inputs}) < len(inputs):
        raise VerifyError(f"{after}: two inputs have the same meaning")
    for node in dict.fromkeys((*look.touched, *_bound_to_others(program))):
        if node.op == "placeholder":
            continue
        if node.op != "call_function":
            raise broken(after, node, f"is a {node.op}; only placeholders and calls are allowed")
        if "origin" not in node.meta or "val" not in node.meta:
            raise broken(after, node, "has no recorded value or origin")
        _check_collective(program, node, after)
        source = operand(node) if node.target in ops.BY_PLACE else None
        if source is not None and (source.op == "placeholder" or ops.view_of(source) is not None):
            raise broken(after, node, "reads memory by its place, so it must be given memory of its own")


def _bound_to_others(program: Program) -> Iterator[fx.Node]:
    """Calls that may break a rule though nobody touched them: because of the mesh, their readers or what they read."""
    for target in (*ops.ASYNCHRONOUS, ops.wait, ops.shard, *ops.BY_PLACE):
        yield from program.graph.find_nodes(op="call_function", target=target, sort=False)
    for spilled in program.graph.find_nodes(op="call_function", target=ops.spill, sort=False):
        for wait in spilled.users:
            yield from (user for user in wait.users if user.op == "call_function")
    if program.layout is not None and program.layout.away:
        for node in filter(program.tier_of, program.graph.find_nodes(op="placeholder")):
            yield from (user for user in node.users if user.op == "call_function")


def _check_collective(program: Program, node: fx.Node, after: str) -> None:
    """Collectives are the same on all ranks: whatever names the ranks or decides a shape is a literal that fits."""
    starts = node.target in ops.STARTS
    if node.target in ops.ASYNCHRONOUS:
        waits = [user for user in node.users if user.target is ops.wait]
        if len(waits) != 1:
            raise broken(after, node, f"is waited for {len(waits)} times instead of once")
        for user in node.users:
            if user is not waits[0]:
                raise broken(after, user, f"reads {node.name} before it has arrived")
    elif node.target is ops.wait and operand(node).target not in ops.ASYNCHRONOUS:
        raise broken(after, node, "waits for a value that no collective and no transfer produces")
    _check_tiers(program, node, after)
    if not starts and node.target is not ops.shard:
        return
    mesh = program.mesh
    if node.kwargs.keys() - {"out"}:
        raise broken(after, node, "has arguments by name; collectives have them by position")
    *_, axis = node.args
    size = mesh.axes.get(axis) if isinstance(axis, str) else None
    if size is None or not isinstance(axis, str):
        known = f"axis is {mesh.axis!r}" if len(mesh.axes) == 1 else f"axes are {', '.join(map(repr, mesh.axes))}"
        raise broken(after, node, f"is on axis {axis!r} of a mesh whose {known}")
    if node.target is ops.all_to_all:
        part = len(operand(node).meta["val"]) // size
        if any(list(sizes) != [part] * size for sizes in node.args[1:3]):  # type: ignore[arg-type]
            raise broken(after, node, f"sends parts that are not equal, or not for {size} ranks")
    elif node.target is not ops.all_reduce and node.args[-2] != size:
        raise broken(after, node, f"is for {node.args[-2]} ranks of {_ranks(mesh, axis)}")
    if node.target in (ops.all_reduce, ops.reduce_scatter) and node.args[1] not in ("avg", "sum"):
        raise broken(after, node, f"reduces by {node.args[1]!r}; only 'avg' and 'sum' are known")
    divided = operand(node).meta["val"]
    if starts and node.target is not ops.all_reduce and not divided.is_contiguous():  # which sends a copy
        raise broken(after, node, f"sends {describe(divided)} with strides {list(divided.stride())}, not contiguous")
    divides = node.target in (ops.shard, ops.reduce_scatter, ops.all_to_all)
    if divides and (divided.dim() != 1 or len(divided) % size):
        raise broken(after, node, f"divides {describe(divided)} over {size} ranks")


def _check_tiers(program: Program, node: fx.Node, after: str) -> None:
    """What lies on a lower tier is read by loads and written by stores of that tier alone; they have nothing else.

    But for kernels that run there: all their tensors lie there.
    """
    if node.target in ops.TRANSFERS and node.args[1:] not in _TIERS_GIVEN:
        raise broken(after, node, f"moves to or from {node.args[1:]}, and tiers are {', '.join(LOWER_TIERS)}")
    runs_on = getattr(node.target, "tier", None)
    if runs_on is not None and None in node.target.writes:  # type: ignore[union-attr]
        raise broken(after, node, f"has a result that is written over nothing on {LOWER_TIERS[runs_on]}")
    for source in node.all_input_nodes:
        is_away = node.target is ops.load or (node.target is ops.store and node.kwargs["out"] is source)
        is_kernels = runs_on is not None and isinstance(source.meta["val"], torch.Tensor)
        found = program.tier_of(source)
        if found != (ops.tier_of(node) if is_away else runs_on if is_kernels else None):
            where = f"lies on {LOWER_TIERS[found]}" if found else "is in memory"
            raise broken(after, node, f"is given {source.meta.get('input', source.name)}, which {where}")


_TIERS_GIVEN = [(tier,) for tier in LOWER_TIERS]


def _ranks(mesh: Mesh, axis: str) -> str:
    return f"{'a mesh' if axis == mesh.axis else f'the axis {axis!r}'} of {mesh.axes[axis]}"


def _check_value(program: Program, node: fx.Node, after: str) -> None:
    """The recorded value is what the operator makes of its arguments' values."""
    if hasattr(node.target, "body"):
        _check_kernel(program, node, node.target.body, after)
        return
    if isinstance(node.target, OwnedUpdate):
        _check_owned(program, node, node.target, after)
        return
    val, recorded = program.infer(node, blame=after), node.meta["val"]
    out = node.kwargs.get(ops.out_of(node.target) or "")
    if isinstance(out, fx.Node) and _form(out.meta["val"]) != _form(val):
        raise broken(after, node, f"stores {_words(val)} over {out.name}, which has another form")
    if val is not recorded and _form(val) != _form(recorded):
        told = [_words(recorded), _words(val)]
        if told[0] == told[1] and isinstance(val, torch.Tensor):
            told = [f"{words} with strides {each.stride()}" for words, each in zip(told, (recorded, val), strict=True)]
        raise broken(after, node, f"is recorded as {told[0]} but gives {told[1]}")


def _check_kernel(program: Program, node: fx.Node, body: fx.Graph, after: str) -> None:
    """A kernel takes and gives what its body does, and element by element if it runs slice by slice."""
    for inner in body.find_nodes(op="placeholder"):
        if "val" not in inner.meta:
            raise broken(after, node, "has a body whose inputs have no recorded values")
    if isinstance(node.target, Region):
        _check_owned_body(program, node, body, after)
    for inner in body.nodes:
        if inner.op == "call_function" and not isinstance(node.target, Region):
            if not ops.is_elementwise(inner.target):
                raise broken(after, node, f"has {target_name(inner.target)} in its body, which is not elementwise")
            _check_value(program, inner, after)
    results: Any = body.output_node().args[0]
    takes = tuple(_form(inner.meta["val"]) for inner in body.find_nodes(op="placeholder"))
    given = tuple(_form(source.meta["val"] if isinstance(source, fx.Node) else source) for source in node.args)
    if takes != given:
        raise broken(after, node, "is given other arguments than its body takes")
    if tuple(_form(inner.meta["val"]) for inner in results) != _form(node.meta["val"]):
        raise broken(after, node, "is recorded with other results than its body has")
    writes: tuple[int | None, ...] = node.target.writes  # type: ignore[union-attr]
    over = [index for index in writes if index is not None]
    if len(set(over)) < len(over):
        raise broken(after, node, "writes two results over one input")
    for inner, index in zip(results, writes, strict=True):
        if index is not None and _form(inner.meta["val"]) != given[index]:
            raise broken(after, node, f"writes {_words(inner.meta['val'])} over an input of another form")


def _check_owned(program: Program, node: fx.Node, update: OwnedUpdate, after: str) -> None:
    """Each part's owner has all that the part reads and writes, and it writes where no other part does."""
    if program.stage >= Stage.SHARDED and update.world != program.mesh.shard_size:
        raise broken(after, node, f"is for {update.world} ranks of {_ranks(program.mesh, program.mesh.shard_axis)}")
    num_inputs, num_results = len(node.args), len(update.dtypes)
    counts = {(len(part.takes), len(part.gives)) for part in update.parts}
    if counts != {(num_inputs, num_results)} or len(update.writes) != num_results or node.kwargs:
        raise broken(after, node, f"is given {num_inputs} inputs for {num_results} results, but its parts have others")
    for body in update.bodies():
        _check_owned_body(program, node, body, after)
    inputs: list[Any] = [source.meta["val"] if isinstance(source, fx.Node) else source for source in node.args]
    divisor = update.world if update.is_divided(tuple(inputs)) else 1
    sizes: list[int | None] = []
    for x, place in zip(inputs, update.parts[0].takes, strict=True):
        sizes.append(None if place is None else place.numel)
        if place is not None and (not isinstance(x, torch.Tensor) or tuple(x.shape) != (place.numel // divisor,)):
            raise broken(after, node, f"takes parts of {place.numel} elements from {_words(x)}")
    over = [index for index in update.writes if index is not None]
    if len(set(over)) < len(over) or not set(over) <= set(range(num_inputs)):
        raise broken(after, node, "writes two results over one input, or one over none")
    forms = [_form(x) for x in inputs]
    numels = [place.numel for place in update.parts[0].gives]
    for part in update.parts:
        _check_part(node, update, part, inputs, forms, sizes, numels, after)
    for places in zip(*(part.gives for part in update.parts), strict=True):
        for one, two in pairwise(sorted(places, key=lambda place: (place.offset, place.end))):
            if two.offset < one.end:
                raise broken(after, node, f"writes two parts over element {two.offset} of one result")
    if [_form(val) for val in program.infer(node, blame=after)] != [_form(val) for val in node.meta["val"]]:
        raise broken(after, node, "is recorded with other results than it gives")
    for val, index in zip(node.meta["val"], update.writes, strict=True):
        if index is not None and _form(val) != forms[index]:
            raise broken(after, node, f"writes {_words(val)} over an input of another form")


def _check_part(
    node: fx.Node,
    update: OwnedUpdate,
    part: Part,
    inputs: Sequence[Any],
    forms: Sequence[Any],
    sizes: Sequence[int | None],
    numels: Sequence[int],
    after: str,
) -> None:
    """It lies where its owner has it, in tensors as large as those of the others, and fits its body.

    Args:
        inputs, forms: values that the call is given, and their forms.
        sizes, numels: elements of the flat tensors that are taken from, None for other inputs, and given to.
    """
    taken = [None if place is None else place.numel for place in part.takes]
    if taken != sizes or [place.numel for place in part.gives] != numels:
        raise broken(after, node, f"has {part.name} lie in tensors of another size than the rest")
    for place in (*filter(None, part.takes), *part.gives):
        size = place.numel // update.world
        if not part.owner * size <= place.offset <= place.end <= (part.owner + 1) * size:
            raise broken(after, node, f"has rank {part.owner} compute {part.name}, which lies elsewhere, too")
    bound = [_form(x.meta["val"]) for x in part.body.find_nodes(op="placeholder")]
    takes = [
        form if place is None else (place.shape, _strides(place.shape), x.dtype, x.device)
        for form, place, x in zip(forms, part.takes, inputs, strict=True)
    ]
    if takes != bound:
        raise broken(after, node, f"is given other arguments than its body for {part.name} takes")
    results: Any = part.body.output_node().args[0]
    gives = [(place.shape, dtype) for place, dtype in zip(part.gives, update.dtypes, strict=True)]
    if gives != [(tuple(inner.meta["val"].shape), inner.meta["val"].dtype) for inner in results]:
        raise broken(after, node, f"gives other results for {part.name} than its body has")
    for place, index in zip(part.gives, update.writes, strict=True):
        if index is not None and part.takes[index] != place:
            raise broken(after, node, f"writes what it has for {part.name} over something else")


_NOT_IN_BODIES = frozenset({*ops.ASYNCHRONOUS, ops.wait, ops.shard, ops.max_over_ranks, *ops.BY_PLACE})


def _check_owned_body(program: Program, node: fx.Node, body: fx.Graph, after: str) -> None:
    """It depends on nothing but its inputs' values, on one rank alone, and gives new tensors."""
    for inner in body.nodes:
        if inner.op == "output":
            continue
        if inner.op not in ("placeholder", "call_function") or "val" not in inner.meta:
            raise broken(after, node, f"has {inner.op} in a body, where only calls with recorded values are allowed")
        if inner.op == "placeholder":
            continue
        alone = not ops.is_random(inner.target) and inner.target not in _NOT_IN_BODIES
        if not alone or ops.may_write(inner.target):
            raise broken(after, node, f"has {target_name(inner.target)} in a body, which may only compute new values")
        _check_value(program, inner, after)
    results: Any = body.output_node().args[0]
    for inner in results:
        if not isinstance(inner, fx.Node) or not isinstance(inner.meta["val"], torch.Tensor):
            raise broken(after, node, "has a body with a result that is no tensor")
        if ops.root_of(inner).op != "call_function":
            raise broken(after, node, "has a body that gives an input as a result, which may be written over")


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, as ``_form`` has them."""
    return torch.empty(shape, device="meta").stride() if 0 not in shape else ()


def _form(val: Any) -> Any:
    if isinstance(val, torch.Tensor):
        return (tuple(val.shape), val.stride() if val.numel() else (), val.dtype, val.device)
    if isinstance(val, (tuple, list)):
        return tuple(map(_form, val))
    return type(val)


def _words(val: Any) -> str:
    return f"{describe(val)} on {val.device}" if isinstance(val, torch.Tensor) else describe(val)


def _check_layout(program: Program, layout: Layout, after: str) -> None:
    if program.stage >= Stage.SHARDED and layout.world != program.mesh.shard_size:
        ranks = _ranks(program.mesh, program.mesh.shard_axis)
        raise VerifyError(f"{after}: the layout is for {layout.world} ranks of {ranks}", fix=MISTAKE_IN_PASS)
    for bucket in layout.buckets:
        names = [segment.name for segment in bucket.segments]
        for flat in (bucket, *(state for _, state in bucket.states)):
            if [segment.name for segment in flat.segments] != names:
                raise VerifyError(f"{after}: state in {bucket.name} is of other parameters", fix=MISTAKE_IN_PASS)
            _check_segments(flat, layout.world, after)
    for node, what in program.placeholders():
        if what.role is Role.GATHERED:
            whole = layout.by_name[what.name].numel if what.name in layout.by_name and layout.shard_params else None
            val = node.meta["val"]
            if tuple(val.shape) != (whole,) or what.key != str(val.dtype).removeprefix("torch."):
                raise _misfit(
                    after, node, f"{what} is {describe(val)}, which is no divided bucket, whole, in that dtype"
                )
        if what.role not in OF_PARAMETERS:
            continue
        if what.name not in layout.by_name:
            raise VerifyError(f"{after}: the input {what} is not of a bucket of the layout")
        is_param, val = what.role is Role.PARAM, node.meta["val"]
        bucket = layout.bucket(what.name, what.key)
        numel = layout.param_numel(bucket) if is_param else layout.state_numel(bucket)
        if isinstance(val, torch.Tensor) and val.dtype is torch.uint8 and layout.packs(what.name, what.key):
            numel = packed_numel(numel)
        if (is_param or (isinstance(val, torch.Tensor) and val.dim())) and tuple(val.shape) != (numel,):
            raise _misfit(after, node, f"{what} is {describe(val)}, but the layout gives each rank {numel} elements")


def _check_segments(bucket: Bucket, world: int, after: str) -> None:
    end = 0
    for segment in bucket.segments:
        if segment.offset < end:
            raise VerifyError(
                f"{after}: {segment.name} overlaps what lies before it in {bucket.name}", fix=MISTAKE_IN_PASS
            )
        end = segment.offset + segment.numel
    if end > bucket.numel or bucket.numel % world:
        raise VerifyError(
            f"{after}: {bucket.name} has {bucket.numel} elements for {end}, in {world} equal parts",
            fix=MISTAKE_IN_PASS,
        )


def _check_results(program: Program, after: str) -> None:
    results = program.results()
    if len(results) != len(program.outputs):
        raise VerifyError(f"{after}: {len(results)} results for {len(program.outputs)} declared outputs")
    if not program.outputs or program.outputs[0] is not None:
        raise VerifyError(f"{after}: the first result is not the loss")
    inputs = {what: node for node, what in program.placeholders()}
    donated: set[object] = set()
    for what, result in zip(program.outputs, results, strict=True):
        if what in donated:
            raise _misfit(after, result, f"two results are the new value of {what or 'the loss'}")
        donated.add(what)
        if what is None:
            continue
        if what.role not in (*OF_PARAMETERS, Role.BUFFER, Role.CONSTANT, Role.RECIPE):
            raise _misfit(after, result, f"a result is the new value of {what}, which is not state")
        if what not in inputs:
            continue  # state that this step creates
        before, new = inputs[what].meta["val"], result.meta["val"] if isinstance(result, fx.Node) else result
        if program.form_of(before) != program.form_of(new) and describe(before) != describe(new):
            raise _misfit(after, result, f"the new value of {what} is {describe(new)}, but it is {describe(before)}")


def _misfit(after: str, result: Any, rule: str) -> VerifyError:
    """The error for a result that does not fit what it replaces."""
    name = f" ({result.name})" if isinstance(result, fx.Node) else ""
    return VerifyError(f"{after}: {rule}{name}", where=source_of(result), fix=MISTAKE_IN_PASS)


class _Memory:
    """Follows every write: what is read must still be there, and what travels must not be touched."""

    def __init__(self, program: Program, after: str) -> None:
        self.program, self.after = program, after
        self.owner = owners(program)
        self.writer: dict[fx.Node, fx.Node] = {}  # memory -> the call that wrote over it last
        self.seen: dict[fx.Node, fx.Node | None] = {}  # value -> the writer of its memory when it was made
        self.sending: dict[fx.Node, dict[fx.Node, None]] = {}  # memory -> collectives that still read it
        self.receiving: dict[fx.Node, fx.Node] = {}  # memory -> a collective that still writes it

    def check(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.check_results()
                return
            if node.op == "call_function":
                self.step(node)
            made_by = node.args[0] if node.target is operator.getitem else None
            if made_by is not None and self.owner[node] not in (node, self.owner[made_by]):
                self.seen[node] = made_by  # what a kernel wrote over, as it left it
            else:
                self.seen[node] = self.writer.get(self.owner[node])

    def step(self, node: fx.Node) -> None:
        if node.target is ops.wait:
            self.arrive(operand(node))
            return
        for source in [operand(node)] if node.target in ops.ASYNCHRONOUS else node.all_input_nodes:
            self.check_read(source, node)
        self.check_aliases(node)
        for memory in self.written(node):
            self.check_write(memory, node)
            self.writer[memory] = node
            if node.target in ops.ASYNCHRONOUS:
                self.receiving[memory] = node
        if node.target in ops.ASYNCHRONOUS:
            self.sending.setdefault(self.owner[operand(node)], {})[node] = None

    def written(self, node: fx.Node) -> list[fx.Node]:
        """The memory that a call writes over."""
        is_last = self.program.stage >= Stage.INPLACE
        told = ops.out_of(node.target) is not None and is_last and ops.may_overwrite(node)
        lowered = told or node.target in ops.INTO or hasattr(node.target, "writes")
        if ops.may_write(node.target) and not lowered:
            self.refuse(node, "writes to its arguments; programs are functional, in place is a lowering")
        return [self.owner[source] for source in written(node)]

    def check_read(self, source: fx.Node, node: fx.Node) -> None:
        memory = self.owner[source]
        if self.writer.get(memory) is not self.seen[source]:
            self.refuse(node, f"reads what {_called(self.writer[memory])} has written over")
        if memory in self.receiving:
            self.refuse(node, f"reads what {self.receiving[memory].name} is still writing")

    def check_aliases(self, node: fx.Node) -> None:
        """What is computed part by part may read of what it writes over only the part that it is at.

        A kernel may be given it once only. An operator may be given just what it is told to store its result in.
        """
        for memory in self.written(node):
            if hasattr(node.target, "writes"):
                given = [source for source in node.args if isinstance(source, fx.Node) and self.owner[source] is memory]
            else:
                given = [source for source in node.all_input_nodes if self.owner[source] is memory]
            if node.target not in ops.STARTS and len(given) > 1:
                self.refuse(node, f"is given {given[1].name}, which lies in what it writes over")

    def check_write(self, memory: fx.Node, node: fx.Node) -> None:
        for start in self.sending.get(memory, ()):
            self.refuse(node, f"writes over what {start.name} is still sending")
        if memory in self.receiving:
            self.refuse(node, f"writes over what {self.receiving[memory].name} is still writing")

    def arrive(self, start: fx.Node) -> None:
        self.sending[self.owner[operand(start)]].pop(start)
        for memory in self.written(start):
            self.receiving.pop(memory)

    def check_results(self) -> None:
        stored: dict[fx.Node, Input | None] = {}
        replaced: set[fx.Node] = set()
        for what, result in zip(self.program.outputs, self.program.results(), strict=True):
            if not isinstance(result, fx.Node) or not isinstance(result.meta["val"], torch.Tensor):
                continue
            memory = self.owner[result]
            if memory.op == "placeholder" and memory.meta["input"] == what:
                replaced.add(memory)
            if memory.target is ops.spill:
                self.refuse(result, f"is returned as {what or 'the loss'} but was spilled for this step only")
            if self.writer.get(memory) is not self.seen[result]:
                self.refuse(self.writer[memory], f"writes over what is returned as {what or 'the loss'}")
            if self.program.stage < Stage.INPLACE:
                continue
            if memory.op == "placeholder" and memory.meta["input"] != what:
                self.refuse(result, f"is returned as {what or 'the loss'} but lies in {memory.meta['input']}")
            if memory in stored and what is not None and what.role in (Role.OPT_STATE, Role.GRADIENT):
                self.refuse(result, f"is returned as {what} and as {stored[memory] or 'the loss'}, in one memory")
            stored[memory] = what
        for memory, node in self.writer.items():
            if memory.op == "placeholder" and memory not in replaced:
                self.refuse(node, f"writes over {memory.meta['input']}, but does not return its new value")

    def refuse(self, node: fx.Node, rule: str) -> NoReturn:
        raise broken(self.after, node, rule)


def _called(node: fx.Node) -> str:
    """A kernel's name, or that of a node."""
    return node.target.__name__ if hasattr(node.target, "writes") else node.name  # type: ignore[union-attr]
