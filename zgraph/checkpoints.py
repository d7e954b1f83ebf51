"""Files of training state that ``torch.save`` or safetensors wrote: what is in them, is it sound, in another form.

A checkpoint is what a user has put together: a ``state_dict``, or a dictionary of several and of numbers. Tensors are
named by the keys that lead to them, with dots between. Files are mapped into memory, so that one tensor after the other
is read.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from zgraph.errors import OptionError, StateError, ZgraphError, first_line
from zgraph.files import beside

SAFETENSORS = ".safetensors"
"""How a file ends that is none of ``torch.save``."""

TORCH = (".pt", ".pth", ".bin", ".ckpt")
"""How a file may end that is to be written by ``torch.save``."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What floating-point tensors may be converted to."""

_OLD_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How ``torch.save`` started a file when it was no zip file."""

_PIECE_BYTES = 2**20

_FIX = "give a file that torch.save wrote of tensors, numbers, texts, lists and dictionaries, or safetensors"


def read(path: Path) -> Any:
    """What a file holds, its tensors mapped into memory on the CPU.

    Raises:
        StateError: there is no such file, or it is none of a checkpoint.
        OptionError: it is of safetensors, which is not installed.
    """
    try:
        if path.suffix == SAFETENSORS:
            return _read_safetensors(path)
        return torch.load(path, map_location="cpu", mmap=_is_archive(path), weights_only=True)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {first_line(error)}") from error
    except ZgraphError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # as torch's messages have it
        more = f"holds more than data, such as {named[1]}" if named else "holds more than data, or is damaged"
        raise StateError(f"{path} {more}: it is not loaded, as that could run code", fix=_FIX) from error
    except Exception as error:  # an unpickler that reads damaged bytes raises anything
        raise StateError(f"{path} is not a checkpoint, or damaged: {first_line(error)}", fix=_FIX) from error


def leaves(held: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that dictionaries and lists lead to, tensors and others, with their names."""
    if isinstance(held, Mapping) or (isinstance(held, (list, tuple)) and held):
        items = held.items() if isinstance(held, Mapping) else enumerate(held)
        for key, value in items:
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, held


def tensors(held: Any) -> dict[str, torch.Tensor]:
    """Its tensors by name.

    Raises:
        StateError: two have the same name, or one is sparse, quantized or without values.
    """
    found: dict[str, torch.Tensor] = {}
    for name, leaf in leaves(held):
        if not isinstance(leaf, torch.Tensor):
            continue
        if name in found:
            raise StateError(f"two tensors are called {name}: one by keys with dots in them", fix="rename one of them")
        if leaf.layout is not torch.strided or leaf.is_meta or leaf.is_quantized:
            kind = "quantized" if leaf.is_quantized else "without values" if leaf.is_meta else f"of {leaf.layout}"
            raise StateError(f"{name} is {kind}", fix="save it as a plain tensor with its values")
        found[name] = leaf
    return found


def damage(path: Path) -> Iterator[str]:
    """Entries of a file of ``torch.save`` whose bytes are not those that were written, by their checksums.

    Files of safetensors have none. The file is read in pieces.

    Raises:
        StateError: it cannot be read.
    """
    try:
        if path.suffix == SAFETENSORS or not zipfile.is_zipfile(path):  # what else it is, ``read`` tells
            return
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not _is_whole(archive, entry):
                    yield f"{entry.filename} in the file: its {entry.file_size:,} bytes are not those that were written"
    except zipfile.BadZipFile as error:
        yield f"the file is damaged: {first_line(error)}"
    except OSError as error:
        raise StateError(f"{path} cannot be read: {first_line(error)}") from error


def problems(held: Any) -> Iterator[str]:
    """What is wrong with a checkpoint by itself: no tensors, numbers that are not finite, and state of no parameter."""
    if not tensors(held):
        yield "there is no tensor in it"
    for name, tensor in tensors(held).items():
        if tensor.is_floating_point() or tensor.is_complex():
            wide = tensor.float() if tensor.itemsize == 1 else tensor  # of 8 bits, isfinite is not implemented
            bad = tensor.numel() - int(wide.isfinite().sum())
            if bad:
                yield f"{name}: {bad:,} of {tensor.numel():,} elements are not finite"
    for name, optimizer in _optimizers(held):
        known = {param for group in optimizer["param_groups"] for param in group.get("params", ())}
        for param in optimizer["state"]:
            if param not in known:
                yield f"{name}: state of parameter {param}, which is in no group".removeprefix(": ")


def differences(held: Any, other: Any) -> Iterator[str]:
    """Where tensors of two checkpoints are not the same, bit for bit; two NaNs are the same."""
    mine, others = tensors(held), tensors(other)
    for name in sorted(mine.keys() | others.keys()):
        if name not in others or name not in mine:
            yield f"{name}: only in the {'first' if name in mine else 'second'}"
            continue
        one, two = mine[name], others[name]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            yield f"{name}: {describe(one)} in the first, {describe(two)} in the second"
        elif differing := int((_bits(one) != _bits(two)).any(1).sum()):
            yield f"{name}: {differing:,} of {one.numel():,} elements differ"


def convert(path: Path, target: Path, only: str = "", dtype: str | None = None, *, overwrites: bool = False) -> int:
    """Write a checkpoint in the form that the name of a new file asks for, all or nothing.

    Args:
        path: of the checkpoint.
        target: of the new file; one that ends in ``.safetensors`` holds tensors alone, by name.
        only: the part with this name, such as ``model``.
        dtype: of floating-point tensors, one of ``DTYPES``; as they are if None.
        overwrites: whether the new file may replace another than the checkpoint itself.

    Returns:
        How many tensors were written.

    Raises:
        OptionError: there is no such part, it holds what the new form cannot, or the new file's name is of no known
            form or taken.
        StateError: a file cannot be read or written.
    """
    _check_target(path, target, overwrites)
    held = _part(read(path), only, path)
    found = tensors(held)
    others = [name for name, leaf in leaves(held) if not isinstance(leaf, torch.Tensor)]
    if target.suffix == SAFETENSORS and others:
        raise OptionError(
            f"{path} holds {len(others)} values that are no tensors, such as {printable(others[0])}",
            fix="choose a part of it with --only, such as --only model, or write a file of torch.save",
        )
    wanted = None if dtype is None else DTYPES[dtype]

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(wanted) if wanted is not None and tensor.is_floating_point() else tensor

    try:
        with beside(target) as partial:
            if target.suffix == SAFETENSORS:  # which has no tensors that share memory
                _safetensors().save_file({n: cast(t).clone().contiguous() for n, t in found.items()}, partial)
            else:
                torch.save(pytree.tree_map_only(torch.Tensor, cast, held), partial)
            partial.replace(target)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where there is no room, or no directory
        raise StateError(f"{target} cannot be written: {first_line(error)}") from error
    return len(found)


def describe(tensor: torch.Tensor) -> str:
    """Dtype and shape: ``float32[4, 8]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def printable(text: str) -> str:
    """A name with its control characters escaped as ``repr`` does it: a terminal would obey them."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _is_archive(path: Path) -> bool:
    """Whether ``torch.save`` has written an archive, which can be mapped: before torch 1.6, or if asked to, it did not.

    What it cannot have written is refused in words of our own; raises OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(len(_OLD_START))
    if start == _OLD_START:
        return False
    if not start.startswith(b"PK\x03\x04"):
        raise StateError(f"{path} is not a checkpoint: {'no zip file' if start else 'it is empty'}", fix=_FIX)
    if not zipfile.is_zipfile(path):
        raise StateError(f"{path} is damaged: it starts as torch.save starts one, and its end is missing", fix=_FIX)
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise StateError(f"{path} is a zip file, and not one of torch.save", fix=_FIX)
    return True


def _check_target(path: Path, target: Path, overwrites: bool) -> None:
    """Refuse a name that says no form, and one that is taken."""
    if target.suffix not in (SAFETENSORS, *TORCH):
        raise OptionError(
            f"{target} does not say in which form to write", fix=f"end it in {', '.join(TORCH)} or {SAFETENSORS}"
        )
    if not os.path.exists(target):  # or it is out of reach, which writing tells
        return
    if os.path.exists(path) and target.samefile(path):
        raise OptionError(f"{target} is the checkpoint itself", fix="write another file")
    if not overwrites:
        raise OptionError(f"{target} exists already", fix="choose another name, or replace it with --force")


def _is_whole(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """Whether an entry has the checksum that was written with it."""
    try:
        with archive.open(entry) as file:
            while file.read(_PIECE_BYTES):
                pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error):
        return False
    return True


def _part(held: Any, name: str, path: Path) -> Any:
    for key in name.split(".") if name else ():
        if not isinstance(held, Mapping) or key not in held:
            there = printable(", ".join(map(str, held))) if isinstance(held, Mapping) else "no parts"
            raise OptionError(f"{path} has no part {name!r}", fix=f"at {key!r} there are {there}"[:500])
        held = held[key]
    return held


def _optimizers(held: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What looks like ``optimizer.state_dict()``."""
    if isinstance(held, Mapping):
        if isinstance(held.get("state"), Mapping) and isinstance(held.get("param_groups"), list):
            yield name, held
            return
        for key, value in held.items():
            yield from _optimizers(value, f"{name}.{key}" if name else str(key))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each element, of shape (elements, bytes)."""
    flat = tensor.contiguous().reshape(-1, 1)
    return (torch.view_as_real(flat) if flat.is_complex() else flat).view(torch.uint8).flatten(1)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Its tensors by name; raises ValueError where it is no such file."""
    load_file = _safetensors().load_file
    from safetensors import SafetensorError

    try:
        found: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return found


def _safetensors() -> Any:
    try:
        from safetensors import torch as found
    except ImportError as error:
        raise OptionError("safetensors is not installed", fix="pip install safetensors") from error
    return found
