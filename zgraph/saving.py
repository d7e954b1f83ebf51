"""Save a model and what its optimizer remembers in one file, tensor by tensor: neither is in memory as a whole.

The file is what ``torch.save`` would write of both ``state_dict``: pickled objects that name their tensors' bytes, and
these bytes, each under its name in an archive, with its checksum. ``torch.save`` has all tensors in memory before it
writes the first; here each is read when its turn comes, in the order of the buckets.
"""

from __future__ import annotations

import io
import os
import pickle
import stat
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, cast

import torch
from torch.serialization import _get_storage_alignment
from torch.storage import _dtype_to_storage_type_map

from zgraph.compiler import CompiledModule
from zgraph.errors import OptionError, StateError, ZgraphError, first_line
from zgraph.files import beside, writing
from zgraph.unread import Unread

_FIX = "give a directory that exists and has room"

TAKEN = ("model", "optimizer")
"""What the file has under these names: both ``state_dict``."""


def save(model: Any, path: str | os.PathLike[str], others: Mapping[str, Any] | None = None) -> None:
    """Write what ``torch.load`` gives as ``{"model": ..., "optimizer": ...}``: of both, the ``state_dict``.

    A bucket is in memory at a time, whatever is divided or lies on a lower tier. All ranks call it together, and rank 0
    writes; a file that was there is replaced when the new one is whole. ``torch.load(path, mmap=True)`` reads it tensor
    by tensor, for ``model.load_state_dict`` and ``optimizer.load_state_dict``.

    Args:
        model: a compiled one that has done a step.
        path: of the file.
        others: what else to save, by name, such as a number of steps. Tensors become plain ones, as of ``detach()``.

    Raises:
        OptionError: ``model`` is none that ``zgraph.compile`` gave, ``path`` is none of a file, or one of the
            ``others`` is called as the model is.
        ZgraphError: no step has been compiled yet.
        StateError: the file cannot be written, or something is none that can be saved so: a hook, or a method of the
            user's, computes what a ``state_dict`` has. It is raised on all ranks.
        RankError: another rank has called something else, or has failed.
    """
    if not isinstance(model, CompiledModule):
        raise OptionError(
            f"a {type(model).__name__} is no model that zgraph.compile gave",
            fix="zgraph.save(model, path), or torch.save for what is not compiled",
        )
    runtime = model.__dict__["_zgraph"]
    runtime.last()
    state, agreement = runtime.state, runtime.agreement
    target = Path()
    error: ZgraphError | None = None
    try:
        target = _target(path, others)
    except OptionError as refused:
        error = refused
    agreement.check("zgraph.save()", error=error)
    with ExitStack() as opened:
        file: _File | None = None
        with agreement.together():
            pickled = _pickled({**state.unread(super(CompiledModule, model).state_dict), **(others or {})})
            if agreement.rank == 0:
                file = opened.enter_context(_new_file(target))
                file.begin(pickled.text)
        with agreement.no_return(), torch.no_grad():
            for name, unread in pickled.in_order():
                value = unread.read()
                if file is not None:
                    file.add(name, value)
        with agreement.together():
            if file is not None:
                file.finish()


def _target(path: Any, others: Any) -> Path:
    """The file that is written, where a link leads to.

    Raises:
        OptionError: there can be none, or one of the ``others`` is called as the model is.
    """
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise OptionError(f"a file cannot be at a {type(path).__name__}", fix="zgraph.save(model, path)")
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise OptionError(f"{path} is a directory", fix="give the name of a file in it")
    if not isinstance(others, (Mapping, type(None))):
        raise OptionError(f"others={others!r} has no names", fix="give a dictionary, such as {'steps': 3}")
    for name in TAKEN:
        if name in (others or {}):
            raise OptionError(f"others={name!r} is what the file has of the model itself", fix="choose another name")
    return target


@dataclass(frozen=True)
class _Pickled:
    """Objects, and the tensors that are named in them.

    Attributes:
        text: the objects.
        tensors: by their names in the archive.
    """

    text: bytes
    tensors: Mapping[str, Unread]

    def in_order(self) -> Iterable[tuple[str, Unread]]:
        """Of the buckets that they lie in."""
        return sorted(self.tensors.items(), key=lambda each: each[1].order)


def _pickled(held: Any) -> _Pickled:
    """Raises: StateError: something cannot be pickled."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(held)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise StateError(
            f"what is to be saved cannot be pickled: {first_line(error)}",
            fix="give tensors, numbers, texts, lists and dictionaries",
        ) from error
    return _Pickled(buffer.getvalue(), pickler.tensors)


@dataclass(frozen=True)
class _Storage:
    """What stands for the bytes of a tensor in pickled objects."""

    key: str
    dtype: torch.dtype
    numel: int


class _Pickler(pickle.Pickler):
    """Pickles as ``torch.save`` does, tensors as if each had its elements alone and in order.

    Attributes:
        tensors: by name; one that is met twice is pickled once.
    """

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=2)
        self.tensors: dict[str, Unread] = {}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_meta or value.layout is not torch.strided or value.is_quantized:
                kind = "on meta" if value.is_meta else "quantized" if value.is_quantized else f"of {value.layout}"
                raise StateError(f"a tensor is {kind}", fix="save it as a plain tensor with its values")
            unread = Unread(tuple(value.shape), value.dtype, value.detach, -1)
        elif isinstance(value, Unread):
            unread = value
        else:
            return NotImplemented
        key = str(len(self.tensors))
        self.tensors[f"data/{key}"] = unread
        shape, dtype = torch.Size(unread.shape), unread.dtype
        storage = _Storage(key, dtype, shape.numel())
        form: tuple[Any, ...] = (
            storage,
            0,
            tuple(shape),
            torch.empty(shape, device="meta").stride(),
            False,
            OrderedDict(),
        )
        if dtype in _dtype_to_storage_type_map():
            return torch._utils._rebuild_tensor_v2, form
        return torch._utils._rebuild_tensor_v3, (*form, dtype)

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = _dtype_to_storage_type_map().get(value.dtype)
        if kind is None:
            return ("storage", torch.UntypedStorage, value.key, "cpu", value.numel * value.dtype.itemsize)
        return ("storage", getattr(torch, kind), value.key, "cpu", value.numel)


class _File:
    """An archive that becomes the file when it is whole: see ``_new_file``.

    All ranks go on to the end, so what goes wrong on the way is told by ``finish``.
    """

    def __init__(self, path: Path, partial: Path, sink: _Sink) -> None:
        self._path, self._partial, self._sink = path, partial, sink
        self._writer = torch._C.PyTorchFileWriter(cast("Any", sink), True, _get_storage_alignment())

    def begin(self, pickled: bytes) -> None:
        """Write what comes before tensors."""
        for name, text in (
            ("data.pkl", pickled),
            (".format_version", b"1"),
            (".storage_alignment", str(_get_storage_alignment()).encode()),
            ("byteorder", sys.byteorder.encode()),
        ):
            self._writer.write_record(name, text, len(text))

    def add(self, name: str, value: torch.Tensor) -> None:
        """Write the elements of a tensor."""
        storage = (
            value.cpu().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg().untyped_storage()
        )
        self._writer.write_record(name, cast("Any", storage), storage.nbytes())

    def finish(self) -> None:
        """Let it become the file.

        Raises:
            StateError: it could not be written.
        """
        self._writer.write_end_of_file()
        with writing(self._path, _FIX):
            self._sink.finish()
            with suppress(FileNotFoundError):
                self._partial.chmod(stat.S_IMODE(self._path.stat().st_mode))  # it may be for some eyes only
            self._partial.replace(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


@contextmanager
def _new_file(path: Path) -> Iterator[_File]:
    """Raises: StateError: there can be none."""
    with ExitStack() as opened:
        with writing(path, _FIX):
            partial = opened.enter_context(beside(path))
            sink = _Sink(opened.enter_context(partial.open("wb", buffering=0)))
        yield _File(path, partial, sink)


class _Sink:
    """A file to which torch writes; it cannot be told in the middle that there is no room."""

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, content: Any) -> int:
        """All of it, unless something could not be written before, or the file is given up."""
        left = memoryview(content).cast("B")
        num_bytes = left.nbytes
        if self._error is None and not self._file.closed:
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError as error:
                self._error = error
        return num_bytes

    def finish(self) -> None:
        """Have all of it on the disk, before it gets its name.

        Raises:
            OSError: something could not be written.
        """
        if self._error is not None:
            raise self._error
        os.fsync(self._file.fileno())
