"""What an exported step runs on: its state, its kernels, the memory of its temporaries. Imports torch and nothing else.

``zgraph.export`` writes a copy of this file beside a step; there it is ``runtime.py``, and belongs to whoever has it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Program:
    """A function that was emitted, and what goes in and comes out.

    Attributes:
        function: ``step(inputs, comm) -> results``, or ``step(inputs, comm, arena) -> results`` with places.
        inputs: names in order, such as ``param:bucket0`` and ``batch:0``.
        outputs: names of the results in order; None is the loss.
        places: of each tensor of ``arena``: first byte, dtype, shape, strides.
    """

    function: Callable[..., list[Any]]
    inputs: tuple[str, ...]
    outputs: tuple[str | None, ...]
    places: tuple[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]], ...]


class Step:
    """A training step with its state.

    Args:
        last: runs on the last micro-batch, and updates.
        earlier: runs on each one before it, of which there are ``num_earlier``.
        num_earlier: micro-batches before the last.
        world: ranks that it was exported for.
        arena_bytes: what temporaries take.
        hypers: hyperparameters by name, which may be changed.
        batch: of this rank: name, shape and dtype of each tensor.
        directory: that the state lies in.
        make_comm: gives what ranks communicate through; None for one rank.

    Attributes:
        state: by name, this rank's tensors and numbers; steps write over them.
    """

    def __init__(
        self,
        last: Program,
        *,
        earlier: Program | None = None,
        num_earlier: int = 0,
        world: int,
        arena_bytes: int,
        hypers: Mapping[str, float],
        batch: Sequence[tuple[tuple[int, ...], torch.dtype]],
        directory: str | Path,
        make_comm: Callable[[Any], Any] | None = None,
    ) -> None:
        self._last, self._earlier, self._num_earlier = last, earlier, num_earlier
        self.hypers = dict(hypers)
        self.batch = batch
        self.directory = Path(directory)
        self.rank = 0
        self._comm: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) != world:
            how = f"torchrun --nproc-per-node {world} step.py" if world > 1 else "python step.py"
            raise SystemExit(f"this step is for {world} rank{'s' if world > 1 else ''}: {how}")
        if world > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo")
            assert make_comm is not None
            self.rank, self._comm = dist.get_rank(), make_comm(dist.group.WORLD)
        path = self.directory / f"state-{self.rank}.pt"
        self.state: dict[str, Any] = torch.load(path, weights_only=True)
        self._block = mmap.mmap(-1, max(arena_bytes, 1))  # it begins at a page

    def __call__(self, *micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """One training step.

        Args:
            micro_batches: the tensors of each.

        Returns:
            The loss, averaged over micro-batches and ranks: a 0-dim tensor.
        """
        if len(micro_batches) != 1 + self._num_earlier:
            raise ValueError(f"{len(micro_batches)} micro-batches, and a step has {1 + self._num_earlier}")
        for batch in micro_batches[:-1]:
            assert self._earlier is not None
            self._run(self._earlier, batch)
        return self._run(self._last, micro_batches[-1])

    def _run(self, program: Program, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        given = {**self.state, **{f"hyper:{name}": value for name, value in self.hypers.items()}}
        given |= {f"batch:{index}": tensor for index, tensor in enumerate(batch)}
        arena = ([self._place(*place) for place in program.places],) if program.places else ()
        with torch.no_grad():
            inputs = [_detached(given[name]) for name in program.inputs]
            del given
            with torch.enable_grad():  # some operators keep what backward needs only then; nothing requires a gradient
                loss, *new = program.function(inputs, self._comm, *arena)
            for name, value in zip(program.outputs[1:], new, strict=True):
                assert name is not None
                old = self.state.get(name)
                is_number = name.startswith("opt_state:") and isinstance(old, torch.Tensor) and old.dim() != 1
                if is_number or name.startswith("recipe:") or not isinstance(old, torch.Tensor):
                    self.state[name] = value
                elif old.data_ptr() != value.data_ptr():
                    old.copy_(value)
        assert isinstance(loss, torch.Tensor)
        return loss

    def _place(self, start: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        numel = torch.Size(shape).numel()
        if not numel:
            return torch.empty_strided(shape, strides, dtype=dtype)
        return torch.frombuffer(self._block, dtype=dtype, count=numel, offset=start).as_strided(shape, strides)

    def example(self) -> list[list[torch.Tensor]]:
        """The micro-batches that were exported with it; or else zeros for integers, and numbers that are drawn."""
        path = self.directory / f"batch-{self.rank}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)  # type: ignore[no-any-return]
        drawn = [
            torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
            for shape, dtype in self.batch
        ]
        return [drawn] * (1 + self._num_earlier)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def main(step: Step) -> None:
    """What ``python step.py`` does: take steps on one batch, print their losses, and save the state if asked to."""
    parser = argparse.ArgumentParser(description="Take training steps, on the batch that was exported with them.")
    parser.add_argument("--steps", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--save", action="store_true", help="write the state after them over what was exported")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} are none")
    batch = step.example()
    for number in range(arguments.steps):
        loss = step(*batch)
        if step.rank == 0:
            sys.stdout.write(f"step {number + 1}: loss {loss.item()!r}\n")
    if arguments.save:
        state = step.directory / f"state-{step.rank}.pt"
        torch.save(step.state, state.with_suffix(".partial"))
        if dist.is_initialized():
            dist.barrier()  # all of them are written, or none takes the place of what was exported
        state.with_suffix(".partial").replace(state)
    if dist.is_initialized():
        dist.destroy_process_group()


# Kernels

_EXACT = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")

FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fopenmp", *_EXACT)


def load_kernels(path: str | Path) -> ctypes.CDLL:
    """Compile C++ kernels, and load them; what is compiled is kept beside the text.

    Raises:
        SystemExit: there is no compiler, or it refuses.
    """
    path = Path(path)
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), None)
    if compiler is None:
        raise SystemExit(f"{path} needs a C++ compiler: install g++, or export a step with kernels='eager'")
    # The OpenMP that torch has loaded, so that the process has one pool of threads.
    openmp = re.findall(r"\S*/libgomp[^/\s]*\.so\S*", Path("/proc/self/maps").read_text())[:1]
    digest = hashlib.sha256("\n".join([path.read_text(), compiler, *FLAGS, *openmp]).encode()).hexdigest()[:16]
    made = path.with_name(f"kernels-{digest}.so")
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            fresh = Path(scratch, made.name)
            done = subprocess.run([compiler, *FLAGS, str(path), "-o", str(fresh), *openmp], check=False)
            if done.returncode:
                raise SystemExit(f"{compiler} cannot compile {path}")
            fresh.rename(made)  # at once, for ranks that compile the same
    return ctypes.CDLL(str(made))


def kernel(
    library: ctypes.CDLL, name: str, writes: Iterable[int | None], dtypes: Iterable[torch.dtype]
) -> Callable[..., list[torch.Tensor]]:
    """A kernel as a function of flat tensors of equal length and of numbers, that gives its results.

    Args:
        library: that it is in.
        name: there.
        writes: for each result, the index of the input that it overwrites, or None for a new tensor.
        dtypes: of the results.
    """
    function = getattr(library, name)
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.POINTER(pointer), ctypes.POINTER(ctypes.c_double)]
    function.restype = None
    results = tuple(zip(writes, dtypes, strict=True))

    def run(*inputs: Any) -> list[torch.Tensor]:
        given = [value.contiguous() if isinstance(value, torch.Tensor) and value.dim() else value for value in inputs]
        vectors = [value for value in given if isinstance(value, torch.Tensor) and value.dim()]
        numbers = [float(value) for value in given if not isinstance(value, torch.Tensor) or not value.dim()]
        outputs = [
            torch.empty(len(vectors[0]), dtype=dtype) if write is None else inputs[write] for write, dtype in results
        ]
        made = [out for out, (write, _) in zip(outputs, results, strict=True) if write is None]
        addresses = [vector.data_ptr() for vector in (*vectors, *made)]
        function(
            len(vectors[0]),
            torch.get_num_threads(),
            (pointer * len(addresses))(*addresses),
            (ctypes.c_double * len(numbers))(*numbers),
        )
        return outputs

    return run


Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a tensor."""


def region(
    call: Callable[[Sequence[Any], Sequence[torch.Tensor]], None],
    writes: Sequence[int | None],
    inputs: Sequence[tuple[int, ...] | None],
    results: Sequence[Form],
    device: str | torch.device = "cpu",
) -> Callable[..., list[torch.Tensor]]:
    """A region of a step as a function of tensors of any shapes, that gives its results.

    Args:
        call: computes it: see ``loops`` and ``numbers``.
        writes: for each result, the index of the input that it overwrites, or None for a tensor of its own.
        inputs: strides that each has; None for a number.
        results: of which form each is.
        device: of the results.
    """

    def laid_out(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        """A tensor that lies in memory as it does in the program: an operator may give its results otherwise."""
        if x.stride() == strides:
            return x
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)

    def run(*values: Any, outs: Sequence[torch.Tensor | None] = ()) -> list[torch.Tensor]:
        given = [x if strides is None else laid_out(x, strides) for x, strides in zip(values, inputs, strict=True)]
        told = [
            out if write is None else given[write]
            for out, write in zip(outs or [None] * len(results), writes, strict=True)
        ]
        places = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device) if out is None else out
            for (shape, strides, dtype), out in zip(results, told, strict=True)
        ]
        call(given, places)
        return places

    return run


def loops(
    library: ctypes.CDLL, name: str, workspace: int, num_columns: int
) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
    """What computes a region in loops.

    Args:
        library: that it is in.
        name: there.
        workspace: float32 numbers that it takes while it runs.
        num_columns: of a row.
    """
    function, pointers = getattr(library, name), ctypes.POINTER(ctypes.c_void_p)
    function.argtypes = [ctypes.c_int, pointers, pointers, ctypes.c_void_p]
    function.restype = ctypes.c_long

    def call(inputs: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        values = [float(x) if isinstance(x, torch.Tensor) and not x.dim() else x for x in inputs]
        given, kept = _given(values)
        scratch = torch.empty(workspace, dtype=torch.float32, device="cpu") if workspace else None
        address = scratch.data_ptr() if scratch is not None else None
        wrong = function(torch.get_num_threads(), given, _places(outputs), address)
        del kept
        if wrong:
            raise IndexError(f"{wrong} targets are out of bounds: there are {num_columns} classes")

    return call


def numbers(library: ctypes.CDLL, name: str) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], None]:
    """What computes a region of single numbers, of which the host's are float64."""
    function = getattr(library, name)
    function.argtypes = [ctypes.POINTER(ctypes.c_void_p)] * 2
    function.restype = None

    def call(inputs: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        given, kept = _given(inputs)
        function(given, _places(outputs))
        del kept

    return call


def _given(values: Sequence[Any]) -> tuple[ctypes.Array[ctypes.c_void_p], list[ctypes.c_double]]:
    """Addresses of tensors and of numbers, and the numbers, which must live as long as these are used."""
    numbers: list[ctypes.c_double] = []
    addresses: list[int] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            addresses.append(value.data_ptr())
        else:
            numbers.append(ctypes.c_double(value))
            addresses.append(ctypes.addressof(numbers[-1]))
    return _pointers(len(addresses))(*addresses), numbers


def _places(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return _pointers(len(tensors))(*[tensor.data_ptr() for tensor in tensors])


@cache
def _pointers(num: int) -> type[ctypes.Array[ctypes.c_void_p]]:
    """So many; kept, as making a type takes longer than calling a small kernel."""
    return ctypes.c_void_p * num
