"""The mistakes: each is one edit of a real pass, as a tired engineer makes it, or a small pass of its own."""

from __future__ import annotations

import enum
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import fx

from zgraph import ops
from zgraph.averages import WEIGHT_EMA
from zgraph.config import Config
from zgraph.machines import preset
from zgraph.passes import bucket, default_passes, recompute, recompute_activations
from zgraph.pipeline import Pass
from zgraph.program import Mesh, Origin, Phase, Program, Role, Stage, describe, operand
from zgraph.scaling import LOSS_SCALE

aten = torch.ops.aten
ROOT = Path(__file__).parents[2]
MACHINE = preset("H100")


class Refusal(enum.Enum):
    """What the verifier finds, as it says it."""

    MEANING = "changed what the step computes"
    DRAWS = "changed what the step computes: random draw"
    DIVISION = "in the wrong place: each rank must return its part of one vector"
    MISSING = "is not returned"
    FACTS = "but not their step count|starts as None, but started as|which held at capture, is no longer checked"
    SHAPE = (
        r"cannot take its arguments: (Attempting to broadcast|Dimension out of range)"
        r"|the new value of \S+ is f64\[\d+\], but it is f64\[\d+\]|but the layout gives each rank|takes parts of"
    )
    RECORD = r"is recorded as .* but gives"
    ORDER = r"reads \w+ before it is computed"
    MEMORY = r"has written over|does not return its new value|is still sending|but lies in|writes to its arguments"
    PADDING = "padding between parameters must stay zero"
    OWNER = (
        "which lies elsewhere, too|is given other arguments than its body|gives an input as a result|"
        "over something else|writes two results over one input"
    )
    WAITS = r"is waited for \d times instead of once|before it has arrived"
    RANKS = r"is on axis 'model' of|is for 3 ranks of"


@dataclass(frozen=True)
class Edit:
    """One edit of the source of a module of passes, or of one that passes are made with.

    Attributes:
        name: what goes wrong.
        module: file below ``passes/``.
        old, new: the code; ``old`` must stand there exactly once.
        expects: how it must be refused. Another refusal hides whether this one works.
        on_request: the pass runs only for options that are not exact, so that numbers show nothing.
        in_nodes: the edited lines run only where there are nodes.
    """

    name: str
    module: str
    old: str
    new: str
    expects: Refusal = Refusal.MEANING
    on_request: bool = False
    in_nodes: bool = False

    @contextmanager
    def passes(self, config: Config, mesh: Mesh) -> Iterator[Sequence[Pass]]:
        """The default passes, with those of the edited module in place of the real ones."""
        edited = self._load()
        mine = f"zgraph.passes.{self.module}"
        try:
            with ExitStack() as stack:
                for user in (bucket, recompute, recompute_activations):
                    helpers = {
                        name: getattr(edited, name)
                        for name, value in vars(user).items()
                        if getattr(value, "__module__", "") == mine
                    }
                    stack.enter_context(mock.patch.dict(vars(user), {} if mine == user.__name__ else helpers))
                yield [
                    getattr(edited, p.name)(**{f.name: getattr(p, f.name) for f in fields(p)})
                    if type(p).__module__ == mine
                    else p
                    for p in default_passes(config, mesh, hardware=MACHINE)
                ]
        finally:
            del sys.modules[edited.__name__]

    def _load(self) -> ModuleType:
        path = ROOT / "passes" / f"{self.module}.py"
        source = path.read_text()
        assert source.count(self.old) == 1, f"{self.name}: {self.old!r} stands {source.count(self.old)} times in {path}"
        name = f"zgraph_mutant_{self.module}"
        spec = importlib.util.spec_from_loader(name, loader=None)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        exec(compile(source.replace(self.old, self.new), str(path), "exec"), module.__dict__)  # noqa: S102
        return module


@dataclass(frozen=True)
class Extra:
    """A pass of its own, run after the last of the default passes that gives the stage it takes.

    Attributes:
        recomputes: it changes only what is made again.
    """

    name: str
    extra: Pass
    expects: Refusal = Refusal.MEANING
    recomputes: bool = False

    @contextmanager
    def passes(self, config: Config, mesh: Mesh) -> Iterator[Sequence[Pass]]:
        yield default_passes(config, mesh, own=[self.extra], hardware=MACHINE)


Mutant = Edit | Extra

THE_BEST_ORDER = "                    best = order\n        _put(program, best.calls)\n"
"""Of ``schedule``, what stands last; whatever is wished before, ``zgraph.passes.order`` gives an order that may run."""

EDITS = [
    # Buckets
    Edit(
        "every parameter is read at the start of its bucket",
        "bucket",
        "aten.slice.Tensor, flat, 0, segment.offset, segment.offset + segment.numel, origin",
        "aten.slice.Tensor, flat, 0, 0, segment.numel, origin",
    ),
    Edit(
        "a parameter is read one element late",
        "bucket",
        "aten.slice.Tensor, flat, 0, segment.offset, segment.offset + segment.numel, origin",
        "aten.slice.Tensor, flat, 0, segment.offset + 1, segment.offset + 1 + segment.numel, origin",
    ),
    Edit(
        "gradients lie in reverse order",
        "bucket",
        "grads = [self.updates.gradient[s.name] for s in bucket.segments]",
        "grads = [self.updates.gradient[s.name] for s in bucket.segments][::-1]",
    ),
    Edit(
        "padding lies behind the gradient that it belongs before",
        "bucket",
        "            pad(segment.offset)\n"
        "            parts.append(program.call(aten.reshape.default, grad, [-1], origin=origin, before=before))\n",
        "            parts.append(program.call(aten.reshape.default, grad, [-1], origin=origin, before=before))\n"
        "            pad(segment.offset)\n",
    ),
    Edit(
        "padding is one element short",
        "bucket",
        "            pad(segment.offset)\n"
        "            parts.append(program.call(aten.reshape.default, grad, [-1], origin=origin, before=before))\n"
        "            end = segment.offset + segment.numel\n",
        "            start = max(end, segment.offset - 1)\n"
        "            pad(start)\n"
        "            parts.append(program.call(aten.reshape.default, grad, [-1], origin=origin, before=before))\n"
        "            end = start + segment.numel\n",
    ),
    Edit(
        "the update reads the parameter as its gradient",
        "bucket",
        "self.updates.gradient[model.name]: gradient,",
        "self.updates.gradient[model.name]: flat,",
    ),
    Edit(
        "parameters of different rules share a bucket",
        "bucket",
        "group = (updates.group.get(name), updates.given(name), _read_as(node))",
        "group = (name in updates.group, updates.given(name), None)",
    ),
    Edit(
        "parameters with different step counts share a bucket",
        "bucket",
        "group = (updates.group.get(name), updates.given(name), _read_as(node))",
        "group = (updates.group.get(name), None, None)",
        Refusal.FACTS,
    ),
    Edit(
        "initial values are lost",
        "bucket",
        "                        init[what] = start\n",
        "                        pass\n",
        Refusal.FACTS,
    ),
    Edit(
        "conditions on step counts are lost",
        "bucket",
        "program.guards = self._guards()",
        "program.guards = ()",
        Refusal.FACTS,
    ),
    Edit(
        "new buffers are not returned",
        "bucket",
        "if what is None or what.role not in OF_PARAMETERS:\n                outputs",
        "if what is None:\n                outputs",
        Refusal.MISSING,
    ),
    Edit(
        "only one read of a tied weight adds to its gradient",
        "bucket",
        "grads = [self.updates.gradient[s.name] for s in bucket.segments]",
        "grads = [self.updates.gradient[s.name] for s in bucket.segments]\n"
        "        grads = [g.args[0] if g.target is aten.add.Tensor else g for g in grads]",
    ),
    Edit(
        "a state is returned as it was before",
        "bucket",
        "            new = copied(result)\n",
        "            new = copied(self.states.get(model.name, {}).get(what, result))\n",
    ),
    Edit(
        "a state's new value lies in another state's memory",
        "bucket",
        'elif _is_tensor(new) and new.meta.get("input") != replace(what, name=bucket.name):',
        "elif False:",
    ),
    # Whole parameters
    Edit(
        "one rank computes all updates",
        "own",
        "for name, owner in zip(self.names, self.bucket.owners, strict=True):",
        "for name, owner in zip(self.names, [0] * len(self.names), strict=True):",
        Refusal.OWNER,
    ),
    Edit(
        "the gradient is that of the parameter behind",
        "own",
        '        what: Input | None = node.meta.get("input")\n',
        '        what: Input | None = node.meta.get("input")\n'
        "        index = self.names.index(name)\n"
        "        alike = [s.name for s in self.bucket.segments if s.shape == self.bucket.segments[index].shape]\n"
        "        name = name if what is not None else alike[-1 - alike.index(name)]\n",
        Refusal.OWNER,
    ),
    Edit(
        "two kinds of state of a whole parameter are exchanged",
        "own",
        "        made = [copied(result) for result in results]\n",
        "        made = [copied(result) for result in results]\n"
        "        one, two = ([w.key for w in self.whats].index(key) if key in [w.key for w in self.whats] else 0"
        " for key in ('m0', 'm1'))\n"
        "        made[one], made[two] = made[two], made[one]\n",
    ),
    Edit(
        "an update is that of another shape",
        "own",
        "            key = (tuple(map(self.updates.term, results)), *(place and place.shape for place in takes))\n",
        "            key = ()\n",
        Refusal.OWNER,
    ),
    Edit(
        "a new value is the old one's memory",
        "own",
        '            if ops.root_of(result).op == "placeholder" or result in made[:index]:\n',
        "            if False:\n",
        Refusal.OWNER,
    ),
    Edit(
        "an update that mixes elements runs on slices",
        "updates",
        "        if not mixing:\n            return\n",
        "        return\n",
        Refusal.SHAPE,
    ),
    Edit(
        "all results are written over the first",
        "inplace",
        "writes = (home.get(donors[results[i]]) if",
        "writes = (next(iter(home.values())) if",
        Refusal.OWNER,
    ),
    Edit(
        "state of its own shape is divided like parameters",
        "shard",
        'numel = program.layout.bucket(bucket.name, state.meta["input"].key).numel',
        "numel = bucket.numel",
        Refusal.SHAPE,
    ),
    Edit(
        "a bucket stays for another one of its size",
        "unshard",
        "firsts.setdefault(_expression(start), wait)",
        'firsts.setdefault(start.meta["val"].shape, wait)',
    ),
    # The schedule
    Edit(
        "a gather is issued behind what reads it",
        "schedule",
        THE_BEST_ORDER,
        THE_BEST_ORDER
        + "        for node in [n for n in _calls(program) if n.target is ops.all_gather and _is_early(n)]:\n"
        "            program.output_node.prepend(node)\n",
        Refusal.ORDER,
    ),
    Edit(
        "what has travelled is read before it is waited for",
        "schedule",
        THE_BEST_ORDER,
        THE_BEST_ORDER + "        for node in [n for n in _calls(program) if n.target is ops.wait]:\n"
        "            program.output_node.prepend(node)\n",
        Refusal.ORDER,
    ),
    Edit(
        "a reduction is issued before its gradient is made",
        "schedule",
        THE_BEST_ORDER,
        THE_BEST_ORDER + "        for node in [n for n in _calls(program) if n.target is ops.reduce_scatter]:\n"
        "            next(_calls(program)).prepend(node)\n",
        Refusal.ORDER,
    ),
    Edit(
        "nobody waits for what was gathered",
        "schedule",
        THE_BEST_ORDER,
        THE_BEST_ORDER + "        waits = [n for n in _calls(program) if n.target is ops.wait]\n"
        "        for node in [n for n in waits if operand(n).target is ops.all_gather]:\n"
        "            node.replace_all_uses_with(operand(node))\n"
        "            program.graph.erase_node(node)\n",
        Refusal.WAITS,
    ),
    Edit(
        "a gradient is read while it travels",
        "schedule",
        THE_BEST_ORDER,
        THE_BEST_ORDER + "        waits = [n for n in _calls(program) if n.target is ops.wait]\n"
        "        for node in [n for n in waits if operand(n).target is ops.reduce_scatter]:\n"
        "            for user in list(node.users):\n"
        "                user.replace_input_with(node, operand(node))\n"
        "                program.output_node.prepend(node)\n",
        Refusal.WAITS,
    ),
    Edit(
        "one wait is for the gather of another bucket",
        "schedule",
        THE_BEST_ORDER,
        THE_BEST_ORDER + "        waits = [n for n in _calls(program) if n.target is ops.wait]\n"
        "        waits = [n for n in waits if operand(n).target is ops.all_gather]\n"
        "        for one, two in zip(waits, waits[1:]):\n"
        "            starts = operand(one), operand(two)\n"
        "            alike = program.form_of(one) == program.form_of(two) and operand(starts[1]).op == 'placeholder'\n"
        "            if alike and operand(starts[0]) is not operand(starts[1]):\n"
        "                starts[0].append(starts[1])\n"
        "                one.args, two.args = two.args, one.args\n"
        "                break\n",
    ),
    Edit(
        "a mask is drawn early, where there is room",
        "schedule",
        THE_BEST_ORDER,
        THE_BEST_ORDER + "        draws = [node for node in _calls(program) if ops.draws(node)]\n"
        "        for one, two in zip(draws, draws[1:]):\n"
        "            if all(source.op == 'placeholder' for source in two.all_input_nodes):\n"
        "                one.prepend(two)\n",
        Refusal.DRAWS,
    ),
    # On request
    Edit(
        "zeros travel in place of parameters",
        "quantize_communication",
        "aten.where.self, elements, param, zero, origin",
        "aten.where.self, elements, zero, param, origin",
        on_request=True,
    ),
    Edit(
        "padding sets the scale of what travels",
        "quantize_communication",
        "data = program.call(ops.quantize, sent, origin",
        "data = program.call(ops.quantize, param, origin",
        on_request=True,
    ),
    Edit(
        "the update reads what this rank has quantised",
        "quantize_communication",
        "ops.mean_of_quantized, arrived, mesh.size",
        "ops.mean_of_quantized, data, mesh.size",
        Refusal.DIVISION,
        on_request=True,
    ),
    Edit(
        "parameters travel in less than was asked for",
        "precision",
        "param, dtype=torch.bfloat16, origin",
        "param, dtype=torch.float16, origin",
        on_request=True,
    ),
    Edit(
        "elements of parameters are taken for padding",
        "quantize",
        "aten.where.self, elements[output.name], new, zero, origin",
        "aten.where.self, elements[output.name], zero, new, origin",
        Refusal.PADDING,
        on_request=True,
    ),
    Edit(
        "padding sets the scale of packed blocks",
        "quantize",
        "results[i] = program.call(ops.pack_state, kept, origin",
        "results[i] = program.call(ops.pack_state, new, origin",
        Refusal.PADDING,
        on_request=True,
    ),
    Edit(
        "padding counts as elements of parameters",
        "quantize",
        "*flat.ranges(), flat.numel,",
        "flat.ranges()[0], [*flat.ranges()[1][:-1], flat.numel], flat.numel,",
        Refusal.PADDING,
        on_request=True,
    ),
    Edit(
        "packed state is that from before the update",
        "quantize",
        "results[i] = program.call(ops.pack_state, kept, origin=origin, before=before)",
        "results[i] = next(node for node, what in program.placeholders() if what == output)",
        on_request=True,
    ),
    Edit(
        "only one state of a bucket is unpacked",
        "quantize",
        "                for reader in readers:\n",
        "                for reader in readers[:1]:\n",
        Refusal.SHAPE,
        on_request=True,
    ),
    Edit(
        "the update reads its own rank's gradient, rounded",
        "precision",
        "reader.replace_input_with(mean, wide)",
        "reader.replace_input_with(mean, wide)\n"
        "                    if mean.meta['val'].shape == low.meta['val'].shape:\n"
        "                        wide.replace_input_with(mean, low)",
        on_request=True,
    ),
    # Norms
    Edit("a norm leaves out a bucket", "bucket", "node.args = (squares,)", "node.args = (squares[1:] or squares,)"),
    Edit("a norm counts a bucket twice", "bucket", "node.args = (squares,)", "node.args = (squares + squares[:1],)"),
    Edit(
        "a norm is that of parameters and their padding",
        "bucket",
        "program.call(ops.square_sum, counted, origin",
        "program.call(ops.square_sum, flat, origin",
    ),
    Edit(
        "a norm is that of local gradients",
        "shard",
        "                reader.replace_input_with(value, mean)\n",
        "                if reader.target is not ops.square_sum:\n"
        "                    reader.replace_input_with(value, mean)\n",
    ),
    Edit(
        "each rank clips by the norm of its own slices",
        "shard",
        "            self._add_shares(program, share)\n",
        "            pass\n",
        Refusal.DIVISION,
    ),
    Edit("shares of a norm are averaged", "shard", 'ops.all_reduce, share, "sum"', 'ops.all_reduce, share, "avg"'),
    # Micro-batches
    Edit(
        "padding between gradients is not zero",
        "bucket",
        "                        [gap],\n                        0,\n",
        "                        [gap],\n                        1,\n",
        Refusal.PADDING,
    ),
    Edit(
        "each rank divides by the weight of its own micro-batch",
        "shard",
        "for value, mine in readers.items():",
        "for value, mine in [(v, m) for v, m in readers.items() if v.meta.get('holds')]:",
    ),
    Edit(
        "gradients that add up are not divided",
        "shard",
        "what.role in (Role.OPT_STATE, Role.GRADIENT):\n                states",
        "what.role is Role.OPT_STATE:\n                states",
        Refusal.SHAPE,
    ),
    Edit(
        "what has added up is written over and lost",
        "inplace",
        "donors[result], donors[node] = node, donor",
        "donors[node] = donor",
        Refusal.MEMORY,
    ),
    # Tidying
    Edit(
        "a random operator that nothing reads is dropped",
        "tidy",
        " and not ops.draws(node)",
        "",
        Refusal.DRAWS,
    ),
    Edit(
        "a transpose of a square matrix is dropped",
        "tidy",
        "    if node.target is aten.t.default and source.target is aten.t.default:\n",
        "    square = node.target is aten.t.default and len({*node.meta['val'].shape}) == 1\n"
        "    if square and source.op == 'call_function':\n"
        "        return source\n"
        "    if node.target is aten.t.default and source.target is aten.t.default:\n",
    ),
    Edit(
        "a reshape is dropped",
        "tidy",
        "        and x.shape == y.shape\n        and x.stride() == y.stride()\n",
        "",
        Refusal.RECORD,
    ),
    Edit("a copy keeps the old values", "tidy", "        new = node.args[1]\n", "        new = node.args[0]\n"),
    Edit("a cast is dropped", "tidy", "        and x.dtype == y.dtype\n", "", Refusal.RECORD),
    Edit(
        "a cast to low precision and back is dropped",
        "tidy",
        "        new = node.args[1]\n",
        "        new = node.args[1].args[0] if node.args[1].target is aten._to_copy.default else node.args[1]\n",
    ),
    # ZeRO
    Edit(
        "the 1/N is forgotten",
        "shard",
        'start = program.call(ops.all_reduce, value, "avg", self.mesh.axis, origin=origin, before=start_before)',
        'start = program.call(ops.all_reduce, value, "sum", self.mesh.axis, origin=origin, before=start_before)',
    ),
    Edit(
        "a maximum over the ranks is a mean",
        "shard",
        "aten.amax.default, rows, [0]",
        "aten.mean.dim, rows, [0]",
    ),
    Edit(
        "the loss is that of one rank",
        "shard",
        "            results[0] = self._average(program, results[0], program.output_node, program.output_node)\n",
        "            pass\n",
    ),
    Edit(
        "the last bucket's gradient is not reduced",
        "shard",
        "for value, mine in readers.items():",
        "for value, mine in list(readers.items())[:-1]:",
    ),
    Edit(
        "the update reads the local gradient",
        "shard",
        "                reader.replace_input_with(value, mean)\n",
        "                assert mean\n",
    ),
    Edit(
        "a gradient travels in half precision",
        "shard",
        'start = program.call(ops.all_reduce, value, "avg", self.mesh.axis, origin=origin, before=start_before)\n'
        "        return program.call(ops.wait, start, origin=origin, before=wait_before)",
        "half = program.call(aten._to_copy.default, value, dtype=torch.bfloat16, origin=origin, before=start_before)\n"
        "        start = program.call("
        'ops.all_reduce, half, "avg", self.mesh.axis, origin=origin, before=start_before)\n'
        "        half = program.call(ops.wait, start, origin=origin, before=wait_before)\n"
        '        return program.call(aten._to_copy.default, half, dtype=value.meta["val"].dtype, '
        "origin=origin, before=wait_before)",
    ),
    Edit(
        "a gradient is averaged once more than it must be",
        "shard",
        "        return program.call(ops.wait, start, origin=origin, before=wait_before)\n",
        "        mean = program.call(ops.wait, start, origin=origin, before=wait_before)\n"
        '        again = program.call(ops.all_reduce, mean, "avg", self.mesh.axis, origin=origin, before=wait_before)\n'
        "        return program.call(ops.wait, again, origin=origin, before=wait_before)\n",
    ),
    Edit(
        "a mean is divided by the number of ranks",
        "shard",
        "        return program.call(ops.wait, start, origin=origin, before=wait_before)\n",
        "        mean = program.call(ops.wait, start, origin=origin, before=wait_before)\n"
        "        return program.call(aten.div.Tensor, mean, self.mesh.size, origin=origin, before=wait_before)\n",
    ),
    Edit(
        "a slice is averaged inside of its node only",
        "shard",
        "            if self.mesh.has_levels:\n",
        "            if not self.mesh:\n",
        Refusal.DIVISION,
        in_nodes=True,
    ),
    Edit(
        "a slice is added up between nodes",
        "shard",
        "ops.all_reduce, piece, operation, REPLICA",
        'ops.all_reduce, piece, "sum", REPLICA',
        Refusal.DIVISION,
        in_nodes=True,
    ),
    Edit(
        "a slice is averaged over all ranks, each of which has another one",
        "shard",
        "ops.all_reduce, piece, operation, REPLICA",
        "ops.all_reduce, piece, operation, self.mesh.axis",
        Refusal.DIVISION,
        in_nodes=True,
    ),
    Edit(
        "a slice is averaged between nodes once more than it must be",
        "shard",
        "                piece = program.call(ops.wait, between, origin=origin, before=mean)\n",
        "                piece = program.call(ops.wait, between, origin=origin, before=mean)\n"
        '                between = program.call(ops.all_reduce, piece, "avg", REPLICA, origin=origin, before=mean)\n'
        "                piece = program.call(ops.wait, between, origin=origin, before=mean)\n",
        in_nodes=True,
    ),
    Edit(
        "what each rank of a node has of a norm is added up over all nodes",
        "shard",
        'ops.all_reduce, share, "sum", self.mesh.shard_axis',
        'ops.all_reduce, share, "sum", self.mesh.axis',
        in_nodes=True,
    ),
    Edit(
        "a slice of the gradient passes for one of the parameter", "shard", "ops.shard, source,", "ops.shard, gradient,"
    ),
    Edit(
        "the gradient stays whole",
        "shard",
        "dict.fromkeys([flat, gradient])",
        "dict.fromkeys([flat])",
        Refusal.SHAPE,
    ),
    Edit(
        "state that is created stays whole",
        "shard",
        "                    _resize(node, bucket.numel, bucket.numel // world)\n",
        "                    pass\n",
        Refusal.SHAPE,
    ),
    Edit(
        "state stays whole",
        "shard",
        'state.meta["val"] = program.empty([numel // world], val.dtype, val.device)',
        'state.meta["val"] = program.empty([bucket.numel], val.dtype, val.device)',
        Refusal.SHAPE,
    ),
    Edit(
        "the updated slice is not shared",
        "shard",
        'results[index] = program.call(ops.wait, start, origin=new.meta["origin"], before=start.next)',
        'results[index] = program.call(ops.wait, start, origin=new.meta["origin"], before=start.next).args[0].args[0]',
        Refusal.SHAPE,
    ),
    Edit(
        "what is shared is the gradient",
        "shard",
        "start = program.call(ops.all_gather, new, world",
        "start = program.call(ops.all_gather, piece, world",
    ),
    Edit(
        "what is shared is the parameter before the update",
        "shard",
        "            new = results[index]\n            start",
        "            new = program.call(ops.shard, flat, world, axis, origin=results[index].meta['origin'], "
        "before=nodes[-1])\n            start",
    ),
    Edit(
        "slices are those of another axis",
        "shard",
        "ops.shard, source, world, axis, origin=",
        'ops.shard, source, world, "model", origin=',
        Refusal.RANKS,
    ),
    Edit(
        "a scattered gradient is a sum",
        "shard",
        "                operation,\n                self.mesh.shard_size,\n",
        '                "sum",\n                self.mesh.shard_size,\n',
    ),
    Edit(
        "backward reads what was gathered for forward and is gone",
        "shard",
        "for phase in (Phase.FORWARD, Phase.BACKWARD):",
        "for phase in (Phase.FORWARD,):",
    ),
    Edit(
        "a divided parameter is returned whole",
        "shard",
        "            results[index] = operand(operand(results[index]))\n",
        "            pass\n",
        Refusal.SHAPE,
    ),
    Edit(
        "a divided parameter is stored whole",
        "shard",
        'flat.meta["val"] = program.empty([bucket.numel // self.mesh.shard_size], bucket.dtype, bucket.device)',
        'flat.meta["val"] = program.empty([bucket.numel], bucket.dtype, bucket.device)',
        Refusal.SHAPE,
    ),
    Edit(
        "an operator moves up to its earliest input",
        "shard",
        "latest = max(others, key=order.__getitem__)",
        "latest = min(others, key=order.__getitem__)",
        Refusal.ORDER,
    ),
    # Tiles
    Edit(
        "all tiles of rows are stored in the first columns",
        "tile",
        "before=product), world, first",
        "before=product), world, 0",
    ),
    Edit(
        "the rows of a tile are stored as if they followed each other",
        "tile",
        "before=product), world, first",
        "before=product), 1, first",
    ),
    Edit(
        "the first columns are sent for every tile",
        "tile",
        "aten.slice.Tensor, here, 1, first, last,",
        "aten.slice.Tensor, here, 1, 0, last - first,",
    ),
    Edit(
        "a tile forgets what the tiles before have given",
        "tile",
        "ops.product_columns, made, operand(reader),",
        "ops.product_columns, None, operand(reader),",
    ),
    Edit(
        "the tiles of a gradient are put together the wrong way round",
        "tile",
        "aten.cat.default, parts,",
        "aten.cat.default, parts[::-1],",
    ),
    Edit(
        "every tile of a gradient is made of the first columns",
        "tile",
        "aten.slice.Tensor, blocks, 2, first, last,",
        "aten.slice.Tensor, blocks, 2, 0, last - first,",
    ),
    Edit(
        "every tile of a table's gradient is of the first rows",
        "tile",
        "ops.embedding_rows_backward, gradient, indices, num_weights, world, first, last - first,",
        "ops.embedding_rows_backward, gradient, indices, num_weights, world, 0, last - first,",
    ),
    # Precision
    Edit(
        "a reader of full precision reads what was cast",
        "precision",
        "                casts.append(user)\n            elif",
        "                casts.append(user)\n"
        "            elif ops.view_of(user) is None and user.op == 'call_function':\n"
        "                pass\n"
        "            elif",
    ),
    Edit(
        "slices are cast to another low precision",
        "precision",
        'dtype = casts[0].meta["val"].dtype',
        "dtype = torch.float16",
        Refusal.RECORD,
    ),
    Edit(
        "slices are rounded on the way",
        "precision",
        "        for node in (start, wait, *views):\n",
        "        rough = program.call(aten._to_copy.default, operand(low), dtype=torch.bfloat16, "
        'origin=start.meta["origin"], before=low)\n'
        "        low.replace_input_with(operand(low), rough)\n"
        "        for node in (start, wait, *views):\n",
    ),
    # In place
    Edit(
        "an update overtakes the last read",
        "inplace",
        "        arrange(program, {node: i for i, node in enumerate(program.graph.nodes)})\n",
        "",
        Refusal.MEMORY,
    ),
    Edit(
        "a result stays in an input's memory",
        "inplace",
        'if memory.op == "placeholder" and not (result is memory and what == memory.meta["input"]):',
        'if memory.op == "never":',
        Refusal.MEMORY,
    ),
    Edit(
        "results are written over each other's inputs",
        "inplace",
        "for node in leaving)\n        origin",
        "for node in leaving[::-1])\n        origin",
        Refusal.MEMORY,
    ),
    Edit(
        "gathered parameters land in another bucket",
        "inplace",
        'start.kwargs = {"out": params[what.name, ""]}',
        'start.kwargs = {"out": next(iter(params.values()))}',
        Refusal.MEMORY,
    ),
    Edit(
        "every result of a kernel is its first",
        "inplace",
        "program.graph.call_function(operator.getitem, (call, index))",
        "program.graph.call_function(operator.getitem, (call, 0))",
        Refusal.MEMORY,
    ),
    Edit(
        "the results of a kernel change places",
        "inplace",
        "region(nodes, leaving)",
        "region(nodes, leaving[::-1])",
    ),
    # Recomputation
    Edit(
        "a random operator runs again for backward",
        "recompute",
        "return ops.can_run_again(node) and source not in self.keep",
        "return source not in self.keep",
        Refusal.DRAWS,
    ),
    Edit(
        "a call is made again behind what reads it",
        "again",
        "origin=origin, before=reader, **kwargs)",
        "origin=origin, before=reader.next, **kwargs)",
        Refusal.ORDER,
    ),
    Edit(
        "a call is made again without its keywords",
        "again",
        "origin=origin, before=reader, **kwargs)",
        "origin=origin, before=reader)",
    ),
    Edit(
        "backward reads the first call that was made again for any",
        "again",
        "return copies[wanted]",
        "return next(iter(copies.values()))",
    ),
    Edit(
        "what is made again reads one source for all",
        "again",
        "lambda source: mine.get(source, source))",
        "lambda source: next(iter(mine.values()), source))",
    ),
    Edit(
        "masks of dropout are drawn again",
        "recompute_activations",
        "        make_again(program, _calls(program, chosen.way()))\n",
        "        draws = {node for node in program.graph.nodes if 'bernoulli' in str(node.target)}\n"
        "        make_again(program, {*_calls(program, chosen.way()), *draws})\n",
        Refusal.DRAWS,
    ),
]


# Passes of their own


def _first(program: Program, matches: Callable[[fx.Node], bool]) -> fx.Node | None:
    return next((node for node in program.graph.nodes if node.op == "call_function" and matches(node)), None)


@dataclass(frozen=True)
class StepPerMicroBatch(Pass):
    """Step the optimizer twice: once for what would be each of two micro-batches."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        update = [n for n in program.graph.nodes if n.op == "call_function" and n.meta["origin"].phase is Phase.UPDATE]
        results, outputs = program.results(), program.outputs
        inputs = {what: node for node, what in program.placeholders()}
        new = {inputs[w]: r for w, r in zip(outputs, results, strict=True) if w in inputs and w.role is not Role.BUFFER}
        copies: dict[fx.Node, fx.Node] = {}
        for node in update:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: copies.get(n, new.get(n, n)))
            copies[node] = program.call(
                node.target, *args, origin=node.meta["origin"], before=program.output_node, **kwargs
            )
        program.set_results([copies.get(r, r) for r in results], outputs)


def _sums(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What earlier micro-batches have added up, and where the gradient is added."""
    for earlier in program.inputs(Role.GRADIENT).values():
        yield from ((earlier, user) for user in earlier.users if user.target is aten.add.Tensor)


@dataclass(frozen=True)
class ForgetEarlierMicroBatches(Pass):
    """Take the gradient of the last micro-batch for the sum of all."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        for _, total in _sums(program):
            total.replace_all_uses_with(operand(total, 1))


@dataclass(frozen=True)
class AddGradientsTwice(Pass):
    """Add the gradient of a micro-batch once more."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        for earlier, total in list(_sums(program)):
            origin = total.meta["origin"]
            again = program.call(aten.add.Tensor, earlier, total.args[1], origin=origin, before=total)
            total.replace_input_with(earlier, again)


@dataclass(frozen=True)
class GoOnAddingUp(Pass):
    """Begin the next step with the gradients of this one."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        totals = {earlier.meta["input"]: total for earlier, total in _sums(program)}
        results = [totals.get(what, r) for what, r in zip(program.outputs, program.results(), strict=True)]
        program.set_results(results, program.outputs)


@dataclass(frozen=True)
class MoveStateOfSkippedSteps(Pass):
    """Skip only what changes parameters where gradients are not finite."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        results = program.results()
        for i, what in enumerate(program.outputs):
            if what is not None and what.role is Role.OPT_STATE and results[i].target is aten.where.self:
                results[i] = operand(results[i], 1)
        program.set_results(results, program.outputs)


@dataclass(frozen=True)
class AverageOldWeights(Pass):
    """Let averages move towards the weights from before the update."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        params = program.inputs(Role.PARAM)
        for what, result in zip(program.outputs, program.results(), strict=True):
            if what is not None and what.key == WEIGHT_EMA:
                result.replace_input_with(operand(result, 1), params[what.name, ""])


@dataclass(frozen=True)
class DropNoise(Pass):
    """Leave the noise of one gradient out."""

    takes = gives = Stage.BUCKETED

    def rewrite(self, program: Program) -> None:
        drawn = _first(program, lambda n: n.target is aten.randn.default)
        if drawn is not None:
            (scaled,) = drawn.users
            (noisy,) = scaled.users
            noisy.replace_all_uses_with(operand(noisy))


@dataclass(frozen=True)
class KeepLossScale(Pass):
    """Do not lower the scale of the loss where gradients were not finite."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        results = program.results()
        for i, what in enumerate(program.outputs):
            if what == LOSS_SCALE:
                results[i] = operand(results[i], 1)
        program.set_results(results, program.outputs)


@dataclass(frozen=True)
class UnscaleTwice(Pass):
    """Divide the gradient of one parameter by the scale of the loss once more."""

    takes = gives = Stage.BUCKETED

    def rewrite(self, program: Program) -> None:
        scales = [node for node, what in program.placeholders() if what == LOSS_SCALE]
        product = _first(program, lambda n: n.target is aten.mul.Tensor and n.meta["origin"].phase is Phase.UPDATE)
        if scales and product is not None:
            again = program.call(
                aten.div.Tensor, product, scales[0], origin=product.meta["origin"], before=product.next
            )
            for user in [user for user in product.users if user is not again]:
                user.replace_input_with(product, again)


@dataclass(frozen=True)
class AddUpWhatAllHave(Pass):
    """Add up over the ranks a norm that each of them has whole."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        total = _first(program, lambda n: n.target is ops.add_up)
        if total is None or total.meta["origin"].made_by == self.name or program.mesh.size == 1:
            return
        assert program.layout is not None
        if not program.layout.shard_state:
            readers, origin = list(total.users), total.meta["origin"]
            start = program.call(ops.all_reduce, total, "sum", program.mesh.axis, origin=origin, before=total.next)
            whole = program.call(ops.wait, start, origin=origin, before=start.next)
            for reader in readers:
                reader.replace_input_with(total, whole)


@dataclass(frozen=True)
class RecomputeDropout(Pass):
    """Draw a dropout mask again where backward reads it."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        mask = _first(program, lambda n: ops.is_random(n.target))
        if mask is None:
            return
        reader = max(mask.users, key=list(program.graph.nodes).index)
        again = program.call(mask.target, *mask.args, origin=mask.meta["origin"], before=reader)
        reader.replace_input_with(mask, again)


def _made_again(program: Program) -> Iterator[fx.Node]:
    """Calls that backward makes again."""
    yield from (n for n in program.graph.nodes if "origin" in n.meta and n.meta["origin"].made_by == "RecomputeModules")


@dataclass(frozen=True)
class RecomputeFromAnotherBlock(Pass):
    """Make a block again from what goes into another one."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        again = [n for n in _made_again(program) if n.target is aten.mm.default]
        for one, other in itertools.pairwise(again):
            one.replace_input_with(operand(one), operand(other))


@dataclass(frozen=True)
class RecomputeWithAnotherMask(Pass):
    """Make a block again with the dropout mask of another one."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        masked = [n for n in _made_again(program) if n.target is aten.mul.Tensor]
        for one, other in itertools.pairwise(masked):
            one.replace_input_with(operand(one, 1), operand(other, 1))


@dataclass(frozen=True)
class RecomputeAfterTheUpdate(Pass):
    """Make a call again from parameters that have been updated meanwhile."""

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        for node in list(_made_again(program)):
            if node.target is aten.mm.default:
                program.call(node.target, *node.args, origin=node.meta["origin"], before=program.output_node)
                return


@dataclass(frozen=True)
class SwapDraws(Pass):
    """Draw two masks in the other order."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        masks = [n for n in program.graph.nodes if n.op == "call_function" and ops.is_random(n.target)]
        for first, second in itertools.pairwise(masks):
            if first.args[0] is second.args[0] and first.args != second.args:
                first.prepend(second)
                return


@dataclass(frozen=True)
class NormOfBuckets(Pass):
    """Take the norm of a parameter over the whole bucket, padding and neighbours included."""

    takes = gives = Stage.BUCKETED

    def rewrite(self, program: Program) -> None:
        norm = _first(program, lambda n: n.target is aten.linalg_vector_norm.default)
        if norm is not None:
            source = operand(norm)
            while source.op != "placeholder":
                source = operand(source)
            norm.replace_input_with(operand(norm), source)


@dataclass(frozen=True)
class SwapResults(Pass):
    """Return the new values of two buckets as each other's."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        results, outputs = program.results(), program.outputs
        params = [i for i, what in enumerate(outputs) if what is not None and what.role is Role.PARAM]
        for i in params:
            for j in params:
                if i < j and results[i].meta["val"].shape == results[j].meta["val"].shape:
                    results[i], results[j] = results[j], results[i]
                    program.set_results(results, outputs)
                    return


@dataclass(frozen=True)
class SwapStates(Pass):
    """Return the new values of two kinds of optimizer state as each other's."""

    takes = gives = Stage.BUCKETED

    def rewrite(self, program: Program) -> None:
        results, outputs = program.results(), program.outputs
        at = {what: i for i, what in enumerate(outputs)}
        for what, i in at.items():
            if what is not None and what.key == "m0" and (other := replace(what, key="m1")) in at:
                results[i], results[at[other]] = results[at[other]], results[i]
        program.set_results(results, outputs)


@dataclass(frozen=True)
class SwapOperands(Pass):
    """Exchange the operands of a product."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        node = _first(program, lambda n: n.target is aten.add.Tensor and n.meta["origin"].phase is Phase.UPDATE)
        if node is not None:
            node.args = (node.args[1], node.args[0], *node.args[2:])


@dataclass(frozen=True)
class ReadAnotherLayer(Pass):
    """Let a layer read the parameter of another one of the same shape."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        params = list(program.inputs(Role.PARAM).values())
        for one in params:
            for other in params:
                readers = [u for u in one.users if u.op == "call_function" and u.meta["origin"].phase is Phase.FORWARD]
                if one is not other and describe(one.meta["val"]) == describe(other.meta["val"]) and readers:
                    readers[0].replace_input_with(one, other)
                    return


@dataclass(frozen=True)
class ReadNextHyperparameter(Pass):
    """Use one parameter group's learning rate for another."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        hypers = list(program.inputs(Role.HYPER).values())
        if len(hypers) > 1:
            hypers[0].replace_all_uses_with(hypers[-1])


@dataclass(frozen=True)
class FreezeHyperparameter(Pass):
    """Compile the learning rate of the first step into the graph."""

    takes = gives = Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        for node in program.inputs(Role.HYPER).values():
            for user in list(node.users):
                user.args = fx.map_arg(user.args, lambda n, node=node: 0.5 if n is node else n)
                user.kwargs = fx.map_arg(user.kwargs, lambda n, node=node: 0.5 if n is node else n)


@dataclass(frozen=True)
class ReuseGathered(Pass):
    """Gather parameters once and return the gathered copy as their new value."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        assert program.layout is not None
        if program.layout.shard_params or not program.layout.shard_state:
            return
        results, outputs = program.results(), program.outputs
        params = program.inputs(Role.PARAM)
        index = next(i for i, what in enumerate(outputs) if what is not None and what.role is Role.PARAM)
        flat = params[outputs[index].name, ""]  # type: ignore[union-attr]
        results[index] = program.call(aten.clone.default, flat, origin=Origin(Phase.UPDATE), before=program.output_node)
        program.set_results(results, outputs)


@dataclass(frozen=True)
class GatherLocalGradient(Pass):
    """Share slices of what every rank has for itself."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        start = _first(program, lambda n: n.target is ops.reduce_scatter)
        if start is None:
            return
        mean, mesh = next(iter(start.users)), program.mesh
        origin = start.meta["origin"]
        local = program.call(ops.shard, operand(start), mesh.size, mesh.axis, origin=origin, before=start)
        mean.replace_all_uses_with(local)
        program.graph.erase_node(mean)
        program.graph.erase_node(start)


@dataclass(frozen=True)
class WriteInPlace(Pass):
    """Add to a value in place while others still read it."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        node = _first(program, lambda n: n.target is aten.tanh.default or n.target is aten.mm.default)
        if node is not None:
            program.call(aten.mul_.Tensor, node, 1, origin=node.meta["origin"], before=node.next)


@dataclass(frozen=True)
class UpdateWhileSending(Pass):
    """Update parameters while a gather is still sending them."""

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        for wait in program.graph.find_nodes(op="call_function", target=ops.wait):
            start = operand(wait)
            if start.target is ops.all_gather:
                kernels = [u for u in operand(start).users if hasattr(u.target, "body")]
                if kernels:
                    again = program.call(ops.all_gather, *start.args, origin=start.meta["origin"], before=kernels[0])
                    late = program.call(ops.wait, again, origin=start.meta["origin"], before=program.output_node)
                    program.call(aten.neg.default, late, origin=start.meta["origin"], before=program.output_node)
                    return


@dataclass(frozen=True)
class SliceForMoreRanks(Pass):
    """Take slices for another number of ranks than there are."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        for node in program.graph.find_nodes(op="call_function", target=ops.shard):
            node.args = (node.args[0], program.mesh.size + 1, node.args[2])


@dataclass(frozen=True)
class ReceiveFirst(Pass):
    """Wait for the loss before it is sent."""

    takes = gives = Stage.SCHEDULED

    def rewrite(self, program: Program) -> None:
        for start in program.graph.find_nodes(op="call_function", target=ops.all_reduce):
            start.prepend(start.next)


@dataclass(frozen=True)
class UpdateFirst(Pass):
    """Update a bucket before its gradient has arrived."""

    takes = gives = Stage.SCHEDULED

    def rewrite(self, program: Program) -> None:
        for wait in program.graph.find_nodes(op="call_function", target=ops.wait):
            updates = [
                user for user in wait.users if "origin" in user.meta and user.meta["origin"].phase is Phase.UPDATE
            ]
            if updates and operand(wait).meta["origin"].phase is not Phase.UPDATE:
                operand(wait).prepend(updates[0])


@dataclass(frozen=True)
class SendFirst(Pass):
    """Send gradients before they are computed, and wait for them, too."""

    takes = gives = Stage.SCHEDULED

    def rewrite(self, program: Program) -> None:
        for start in program.graph.find_nodes(op="call_function", target=ops.reduce_scatter):
            operand(start).prepend(start)


@dataclass(frozen=True)
class AverageEachReadOfTiedWeights(Pass):
    """Average what each read adds to the gradient of a tied weight, which is averaged once more as a whole."""

    takes = gives = Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        total = _first(program, lambda n: n.target is aten.add.Tensor and n.meta["origin"].phase is Phase.BACKWARD)
        if total is None or program.mesh.size == 1:
            return
        origin, axis = total.meta["origin"], program.mesh.axis
        for source in list(total.all_input_nodes):
            start = program.call(ops.all_reduce, source, "avg", axis, origin=origin, before=total)
            mean = program.call(ops.wait, start, origin=origin, before=total)
            total.replace_input_with(source, mean)


EXTRAS = [
    Extra("the optimizer steps once per micro-batch", StepPerMicroBatch()),
    Extra("each read of a tied weight is averaged, and their sum again", AverageEachReadOfTiedWeights()),
    Extra("earlier micro-batches are forgotten", ForgetEarlierMicroBatches()),
    Extra("a micro-batch adds its gradient twice", AddGradientsTwice()),
    Extra("gradients go on adding up behind the update", GoOnAddingUp()),
    Extra("a skipped step moves optimizer state", MoveStateOfSkippedSteps()),
    Extra("the average is of the weights before the update", AverageOldWeights()),
    Extra("a gradient gets no noise", DropNoise()),
    Extra("a loss scale is never lowered", KeepLossScale()),
    Extra("a gradient is unscaled twice", UnscaleTwice()),
    Extra("a norm that all ranks have is added up over them", AddUpWhatAllHave()),
    Extra("dropout is drawn again for backward", RecomputeDropout(), Refusal.DRAWS),
    Extra("a block is made again from what goes into another", RecomputeFromAnotherBlock(), recomputes=True),
    Extra("a block is made again with another's mask", RecomputeWithAnotherMask(), recomputes=True),
    Extra("a call is made again behind the update", RecomputeAfterTheUpdate(), Refusal.MEMORY, recomputes=True),
    Extra("masks are drawn in the other order", SwapDraws(), Refusal.DRAWS),
    Extra("padding leaks into a norm", NormOfBuckets()),
    Extra("the new parameters of two buckets are exchanged", SwapResults()),
    Extra("two kinds of optimizer state are exchanged", SwapStates()),
    Extra("the operands of a sum with a factor are exchanged", SwapOperands()),
    Extra("a layer reads another layer's weight", ReadAnotherLayer()),
    Extra("a group has another group's learning rate", ReadNextHyperparameter()),
    Extra("the learning rate is a constant", FreezeHyperparameter()),
    Extra("parameters gathered before the update are returned as new", ReuseGathered()),
    Extra("slices of local gradients pass for reduced ones", GatherLocalGradient(), Refusal.DIVISION),
    Extra("a value is written over while others read it", WriteInPlace(), Refusal.MEMORY),
    Extra("parameters are updated while a gather sends them", UpdateWhileSending(), Refusal.MEMORY),
    Extra("slices are those of another number of ranks", SliceForMoreRanks(), Refusal.RANKS),
    Extra("a receive comes before what it waits for is sent", ReceiveFirst(), Refusal.ORDER),
    Extra("an update does not wait for its gradient", UpdateFirst(), Refusal.ORDER),
    Extra("a gradient travels before it is computed", SendFirst(), Refusal.ORDER),
]

MUTANTS: list[Mutant] = [*EDITS, *EXTRAS]
