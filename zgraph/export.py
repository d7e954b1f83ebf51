"""``model.export``: the step that ran last, as Python and kernels that need no zgraph.

    step.py         python step.py, or torchrun for several ranks; Step(...) for a program of your own
    program.py      the function that ran, word for word, and what its names stand for
    earlier.py      the same for micro-batches before the last, if there are any
    operators.py    operators of zgraph's own that these call
    kernels.cpp     kernels of updates
    collectives.py  what ranks communicate through
    runtime.py      state, the memory of temporaries, and how kernels are loaded (zgraph.standalone)
    state-0.pt      what rank 0 stores, and so on

From the state in there, a step computes bit for bit what it would have computed here.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zgraph import comm, into, ops, packed, quantized, standalone, tiling
from zgraph.codegen import quantizers
from zgraph.codegen.cpp import CppWriter
from zgraph.codegen.elementwise import results_of
from zgraph.codegen.emit import Step
from zgraph.codegen.inductor import InductorRegion
from zgraph.codegen.kernel import CPP, SLICES, Kernel
from zgraph.codegen.lowering import lower
from zgraph.codegen.numbers import Numbers
from zgraph.codegen.owned import OwnedUpdate
from zgraph.codegen.region import Region
from zgraph.codegen.region_cpp import RegionCppWriter
from zgraph.codegen.source import SourceWriter
from zgraph.comm import PointToPointComm, Transfer
from zgraph.errors import OptionError, StateError, first_line
from zgraph.files import beside
from zgraph.program import Program, Role, describe, target_name

_HEAD = '"""{what}\n\nWritten by zgraph, which it does not need.\n"""\n\nfrom __future__ import annotations\n\n'

_AT_ONCE = f"AT_ONCE_BYTES = {ops.AT_ONCE_BYTES}\n"
_OF_LOGITS = [ops.rows_at_once, ops._cross_entropy_backward_into]

_OWN: dict[Any, tuple[str, Sequence[Any], str]] = {
    ops.square_sum: ("_square_sum", [ops._square_sum], f"_ROW = {ops._ROW}\n"),
    ops.add_up: ("_add_up", [ops._add_up], ""),
    ops.elements: ("_elements", [ops._elements], ""),
    ops.cross_entropy_backward: ("_cross_entropy_backward", [*_OF_LOGITS, ops._cross_entropy_backward], _AT_ONCE),
    torch.ops.zgraph.cross_entropy_backward.out: ("_cross_entropy_backward_into", _OF_LOGITS, _AT_ONCE),
    ops.product_columns: ("product_columns", [tiling.product_columns_into, tiling.product_columns], ""),
    torch.ops.zgraph.product_columns.out: ("product_columns_into", [tiling.product_columns_into], ""),
    ops.embedding_rows_backward: ("embedding_rows_backward", [tiling.embedding_rows_backward], ""),
    ops.max_over_ranks: ("torch.clone", [], ""),
    ops.sym_choose: ("sym_choose", [ops.sym_choose], ""),
    ops.quantize: ("quantized.quantize", [packed, quantized], ""),
    ops.dequantize: ("quantized.dequantize", [packed, quantized], ""),
    ops.mean_of_quantized: ("quantized.mean_of_quantized", [packed, quantized], ""),
    ops.pack_state: ("packed.pack", [packed], ""),
    ops.pack_state_into: ("packed.pack_into", [packed], ""),
    ops.unpack_state: ("packed.unpack", [packed], ""),
    quantizers.pack: ("packed.pack", [packed], ""),
    quantizers.pack_into: ("packed.pack_into", [packed], ""),
    quantizers.unpack: ("packed.unpack", [packed], ""),
    quantizers.quantize: ("quantized.quantize", [packed, quantized], ""),
    quantizers.dequantize: ("quantized.dequantize", [packed, quantized], ""),
    quantizers.mean_of_quantized: ("quantized.mean_of_quantized", [packed, quantized], ""),
    **{each: (each.__name__, [each], "") for each in (into.copy, into.fill, into.embedding, into.embedding_gradient)},
}
"""Operators of zgraph's: what is called instead, what that is made of, and what that reads."""


class InRankOrder(PointToPointComm):
    """Transfers between pairs of ranks, with every sum in rank order."""

    def all_reduce(self, value: torch.Tensor, operation: str) -> Transfer:
        tag = self.next_tag()
        flat = value.contiguous()
        parts = [flat if rank == self.rank else torch.empty_like(flat) for rank in range(self.world)]
        works = [self.receive(parts[p], p, tag) for p in self.peers]
        works += [self.send(flat, p, tag) for p in self.peers]
        return Transfer(works, flat, parts, divide_by=self._divisor(operation))


def check_exportable(programs: Sequence[Program], device: torch.device, options: Any) -> None:
    """Refuse what cannot run without zgraph yet.

    Raises:
        OptionError: with what is in the way.
    """
    targets = [node.target for program in programs for node in program.graph.nodes]
    reasons = {
        f"a step on {device.type}": device.type != "cpu",
        "offload": options.offload is not None,
        "check_memory": options.check_memory,
        "check_collectives": options.check_collectives,
        "keep_gathered": options.keep_gathered,
        "a mesh of nodes": len(programs[-1].mesh.axes) > 1,
        f"kernels={options.kernels!r}, of which Inductor compiles some,": any(
            isinstance(target, InductorRegion) for target in targets
        ),
        "an update of whole parameters": any(isinstance(target, OwnedUpdate) for target in targets),
    }
    for what, is_so in reasons.items():
        if is_so:
            raise OptionError(f"{what} cannot be exported yet", fix="export a step without it; model.source shows any")
    if not programs[-1].reads_all_state():
        raise OptionError(
            "the step that ran last creates optimizer state, and would do so in every step",
            fix="call train_step once more before export",
        )


def write(
    directory: Path,
    steps: Sequence[tuple[Program, Step]],
    *,
    state: dict[str, Any],
    batch: Sequence[Sequence[torch.Tensor]] | None,
    hypers: dict[str, float],
    num_micro_batches: int,
    arena_bytes: int,
    rank: int,
) -> list[Path]:
    """Write a step; rank 0 writes the programs, and each rank its own state.

    Args:
        directory: where to; it is made if it is not there.
        steps: of the last micro-batch, and before it that of those before it, if there are any.
        state: of this rank, by name.
        batch: tensors of each micro-batch, as an example; none if None.
        hypers: hyperparameters by name.
        num_micro_batches: of a step.
        arena_bytes: what temporaries take.
        rank: which this is.

    Returns:
        The files.

    Raises:
        OptionError: the step calls something that cannot be written down.
        StateError: a file cannot be written.
    """
    texts = dict(_texts(steps, hypers, num_micro_batches, arena_bytes))  # what one rank refuses, all refuse
    saved: dict[str, Any] = {f"state-{rank}.pt": state}
    if batch is not None:
        saved[f"batch-{rank}.pt"] = [list(tensors) for tensors in batch]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items() if rank == 0 else ():
            (directory / name).write_text(text, encoding="utf-8")
        for name, value in saved.items():
            with beside(directory / name) as partial:
                torch.save(value, partial)
                partial.replace(directory / name)
        if batch is None:  # the one of another export is not this one's
            (directory / f"batch-{rank}.pt").unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # the second is what torch raises where a disk is full
        what = getattr(error, "strerror", None) or first_line(error)
        raise StateError(f"{directory} cannot be written: {what}", fix="choose another directory") from error
    return [directory / name for name in (*(texts if rank == 0 else ()), *saved)]


def _texts(
    steps: Sequence[tuple[Program, Step]], hypers: dict[str, float], num_micro_batches: int, arena_bytes: int
) -> Iterator[tuple[str, str]]:
    """Names of files and what is in them."""
    world = steps[-1][0].mesh.size
    names = {"program": steps[-1]} | ({"earlier": steps[0]} if len(steps) > 1 else {})
    needed = _Needed()
    for name, (program, step) in names.items():
        yield f"{name}.py", _program_text(program, step, needed)
    yield from needed.files()
    if world > 1:
        yield "collectives.py", _collectives_text()
    yield "runtime.py", inspect.getsource(standalone)
    yield "step.py", _step_text(steps[-1][0], names, hypers, num_micro_batches, arena_bytes)


def _step_text(program: Program, names: Any, hypers: dict[str, float], num_micro_batches: int, arena_bytes: int) -> str:
    world, writer = program.mesh.size, SourceWriter()
    how = f"torchrun --nproc-per-node {world} step.py" if world > 1 else "python step.py"
    lines = [
        _HEAD.format(what=f"A training step: ``{how} --steps 10``."),
        "from pathlib import Path\n\nimport torch\n",
        *(["import collectives"] if world > 1 else []),
        *(f"import {name}" for name in sorted(names)),
        "import runtime\n",
        "HYPERS = {",
        *(f"    {name!r}: {writer.literal(value)}," for name, value in hypers.items()),
        "}",
        '"""Hyperparameters, which may be changed here, or in ``hypers`` of a step."""\n',
        "BATCH = [",
        *(
            f"    ({tuple(val.shape)!r}, {val.dtype}),"
            for val in (node.meta["val"] for node in program.inputs(Role.BATCH).values())
        ),
        "]",
        '"""Shape and dtype of each tensor of a micro-batch of one rank."""\n\n',
        "def make_step() -> runtime.Step:",
        '    """The step, with the state that it was exported with."""',
        "    return runtime.Step(",
        "        program.PROGRAM,",
        *(["        earlier=earlier.PROGRAM,"] if "earlier" in names else []),
        f"        num_earlier={num_micro_batches - 1},",
        f"        world={world},",
        f"        arena_bytes={arena_bytes},",
        "        hypers=HYPERS,",
        "        batch=BATCH,",
        "        directory=Path(__file__).parent,",
        *(["        make_comm=collectives.InRankOrder,"] if world > 1 else []),
        "    )\n\n",
        'if __name__ == "__main__":',
        "    runtime.main(make_step())",
    ]
    return "\n".join(lines) + "\n"


def _program_text(program: Program, step: Step, needed: _Needed) -> str:
    bound = {
        name: value
        for name, value in step.function.__globals__.items()
        if name not in ("torch", "__builtins__", "step")
    }
    needed.imports = set()
    bindings = [f"{name} = {needed.expression(value)}" for name, value in bound.items()]
    has_kernels = any("(LIBRARY," in line for line in bindings)
    names = ", ".join(f"{str(what)!r}" for _, what in program.placeholders())
    results = ", ".join("None" if what is None else f"{str(what)!r}" for what in program.outputs)
    places = "".join(f"        ({p.start}, {p.dtype}, {p.shape!r}, {p.strides!r}),\n" for p in step.places)
    lines = [
        _HEAD.format(what="What ran on the last micro-batch, or on those before it; and what its names stand for."),
        "import math\nimport operator\nfrom pathlib import Path\n\nimport torch\n",
        *(f"import {name}" for name in sorted({*needed.imports, "runtime"})),
        "",
        "# ruff: noqa\n",
        *(['LIBRARY = runtime.load_kernels(Path(__file__).parent / "kernels.cpp")\n'] if has_kernels else []),
        *bindings,
        "\n",
        step.source,
        "\nPROGRAM = runtime.Program(",
        "    step,",
        f"    ({names},),",
        f"    ({results},),",
        f"    (\n{places}    ),",
        ")",
    ]
    return "\n".join(lines) + "\n"


class _Needed:
    """What the programs need besides torch."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self._functions: dict[str, str] = {}
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, str] = {}
        self._slices: dict[Any, str] = {}

    def files(self) -> Iterator[tuple[str, str]]:
        for name, module in self._modules.items():
            yield f"{name}.py", inspect.getsource(module).replace("from zgraph.packed", "from packed")
        if self._functions:
            imports = "import math\nimport operator\n\nimport torch\n"
            imports += "".join(f"import {name}\n" for name in sorted(self._modules))
            text = "\n\n".join(self._functions.values())
            yield "operators.py", _HEAD.format(what="Operators of zgraph's own.") + f"{imports}\n\n{text}"
        if self._kernels:
            yield "kernels.cpp", "\n".join(self._kernels.values())

    def expression(self, value: Any) -> str:
        """What a global stands for, as an expression in a program's file.

        Raises:
            OptionError: it cannot be written down.
        """
        if isinstance(value, Kernel):
            return self._kernel(value)
        found = self._plain(value)
        if found is None:
            raise OptionError(
                f"{target_name(value)} cannot be exported: it is none of torch's operators",
                fix="export a step that does not call it",
            )
        expression, home = found
        if home:
            self.imports.add(home)
        return f"{home}.{expression}" if home == "operators" else expression

    def _plain(self, value: Any) -> tuple[str, str] | None:
        """An expression, and the module of the export that it needs; None for what cannot be written."""
        own = _OWN.get(value) if getattr(value, "__hash__", None) else None
        if own is not None:
            return self._take(*own)
        if isinstance(value, torch._ops.OpOverload) and value.namespace != "zgraph":
            return f"torch.ops.{value.namespace}.{value._opname}.{value._overloadname}", ""
        name = getattr(value, "__name__", "")
        for module in (math, operator):
            if name and getattr(module, name, None) is value:
                return f"{module.__name__}.{name}", ""
        return (name, "") if value in (float, int) else None

    def _take(self, expression: str, made_of: Sequence[Any], reads: str) -> tuple[str, str]:
        home = "operators" if made_of else ""
        for each in made_of:
            if inspect.ismodule(each):
                home = expression.split(".")[0]
                self._modules[each.__name__.rpartition(".")[2]] = each
            else:
                self._functions[each.__name__] = f"{reads}\n\n{inspect.getsource(each)}".lstrip()
        return expression, home

    def _kernel(self, kernel: Kernel) -> str:
        language = kernel.runs_in("cpu")
        if language == CPP and isinstance(kernel, Region):
            return self._region(kernel)
        if language == CPP:
            text = CppWriter(kernel).source()
            name = text.split("(")[0].split()[-1]
            self._kernels[name] = text
            dtypes = ", ".join(str(node.meta["val"].dtype) for node in results_of(kernel))
            return f"runtime.kernel(LIBRARY, {name!r}, {tuple(kernel.writes)!r}, ({dtypes},))"
        assert language == SLICES, language
        if kernel in self._slices:
            self.imports.add("operators")
            return f"operators.{self._slices[kernel]}()"
        writer = SourceWriter()
        text = kernel.source(writer)
        bound = {name: value for name, value in writer.namespace.items() if name != "torch"}
        made = f"make_{len(self._slices)}"
        self._slices[kernel] = made
        lines = [f"def {made}():", f'    """The kernel {kernel.name}, in slices that stay in cache."""']
        for name, value in bound.items():
            lines.append(f"    {name} = {self.expression(value).removeprefix('operators.')}")
        lines += [f"    {line}" if line else "" for line in text.splitlines()]
        self._functions[made] = "\n".join([*lines, "    return kernel"]) + "\n"
        self.imports.add("operators")
        return f"operators.{made}()"

    def _region(self, region: Region) -> str:
        if isinstance(region, Numbers):
            text = region.text(CPP)
            name = text.split("(")[0].split()[-1]
            self._kernels[name] = text
            call = f"runtime.numbers(LIBRARY, {name!r})"
        else:
            made = lower(region.body, RegionCppWriter)
            writer = RegionCppWriter(made)
            parts = dict(writer.parts())
            self._kernels |= parts
            call = f"runtime.loops(LIBRARY, {list(parts)[-1]!r}, {writer.workspace}, {made.num_columns})"
        return f"runtime.region({call}, {region.writes!r}, {region.input_strides!r}, {region.forms!r})"


def _collectives_text() -> str:
    head = _HEAD.format(what="Collectives between gloo ranks, in halves: a start, and a wait. Sums are in rank order.")
    imports = (
        "from collections import Counter\nfrom dataclasses import dataclass, field\nfrom typing import Any\n"
        "from weakref import WeakKeyDictionary\n\nimport torch\nimport torch.distributed as dist\n\n"
        "_tags: Any = WeakKeyDictionary()\n"
    )
    parts: list[Callable[..., Any]] = [comm.Traffic, comm.Group, comm.Transfer, PointToPointComm, InRankOrder]
    text = "\n\n".join(inspect.getsource(part) for part in parts)
    return f"{head}{imports}\n\n{text.replace('group = HeldGroup()', 'group: Any = None', 1)}"


def check_batch(program: Program, tensors: Sequence[torch.Tensor]) -> None:
    """Refuse an example that the step was not compiled for.

    Raises:
        OptionError: with what was expected.
    """
    expected = [describe(node.meta["val"]) for node in program.inputs(Role.BATCH).values()]
    given = [describe(tensor) for tensor in tensors]
    if given != expected:
        raise OptionError(
            f"the batch is {', '.join(given) or 'empty'}, and the step takes {', '.join(expected) or 'none'}",
            fix="give this rank's batch, as train_step was given it",
        )


def rank_of(group: dist.ProcessGroup | None) -> int:
    """Which rank this is."""
    return 0 if group is None else dist.get_rank(group)
