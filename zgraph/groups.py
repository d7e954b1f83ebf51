"""Which process group a step runs on, what serves it, and who ends it."""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from zgraph.errors import RankError
from zgraph.program import Mesh


class HeldGroup:
    """An attribute that names a process group without keeping it alive; None for a single process.

    Destroying a gloo group has to end its threads, which the group does when nothing holds it any more. A thread that
    still runs while the interpreter finalizes aborts the process now and then ("terminate called without an active
    exception", 15 of 80 runs of a script that only reduces a tensor), and torchrun reports a failed rank.

    Raises:
        RankError: the attribute is read after the group was destroyed.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_held_{name}"

    def __set__(self, holder: Any, group: dist.ProcessGroup | None) -> None:
        holder.__dict__[self._name] = None if group is None else weakref.ref(group)

    def __get__(self, holder: Any, owner: type | None = None) -> dist.ProcessGroup | None:
        held = holder.__dict__[self._name]
        if held is None:
            return None
        group: dist.ProcessGroup | None = held()
        if group is None:
            raise _destroyed()
        return group


_along: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Mesh, str], weakref.ref[dist.ProcessGroup]]] = (
    WeakKeyDictionary()
)
"""By group of all ranks, mesh and axis: the group of this rank, which only torch keeps alive."""


def open_axes(group: dist.ProcessGroup | None, mesh: Mesh) -> None:
    """Make the process groups of a mesh's axes, where there are any; all ranks do it together, for the same meshes.

    They end with ``group``.
    """
    known = _along.setdefault(group, {}) if group is not None and len(mesh.axes) > 1 else {}
    for axis in mesh.axes:
        if group is None or axis == mesh.axis or (mesh, axis) in known:
            continue
        ranks, mine = dist.get_process_group_ranks(group), dist.get_rank(group)
        for members in mesh.groups(axis):  # a rank takes part in making those that it does not belong to
            made = dist.new_group([ranks[member] for member in members], backend=dist.get_backend_config(group))
            if mine in members:
                assert isinstance(made, dist.ProcessGroup)
                known[mesh, axis] = weakref.ref(made)


def axis_group(group: dist.ProcessGroup | None, mesh: Mesh, axis: str) -> dist.ProcessGroup | None:
    """The process group of this rank along an axis of a mesh; None for a single process.

    Raises:
        RankError: it was destroyed.
    """
    if group is None or axis == mesh.axis:
        return group
    found = _along[group][mesh, axis]()
    if found is None:
        raise _destroyed()
    return found


def _destroyed() -> RankError:
    return RankError(
        "the process group that the model was compiled for was destroyed",
        fix="call dist.destroy_process_group() after the last use of the model",
    )


def backends(group: dist.ProcessGroup) -> dict[str, str]:
    """The backend that serves each type of device: ``{"cpu": "gloo", "cuda": "nccl"}``.

    ``dist.get_backend`` knows one name only: it says "undefined" for a group that was made without naming a backend.
    """
    served = (part.partition(":") for part in dist.get_backend_config(group).split(","))
    return {device: backend for device, _, backend in served}


def serves_cpu(group: dist.ProcessGroup) -> bool:
    """Whether gloo carries tensors of a CPU."""
    return backends(group).get("cpu") == "gloo"


def default_backend() -> str:
    """What ``dist.init_process_group`` is given when the user has not called it: tensors of every device can travel."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def process_group() -> dist.ProcessGroup | None:
    """The default group, made from torchrun's environment if need be; None for a single process.

    A group made here ends with the process, unless an exception ends the process: other ranks may still be in a
    collective then. A group that the user made is the user's to destroy.
    """
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return None
        dist.init_process_group(default_backend())
        started = dist.group.WORLD
        assert started is not None
        atexit.register(_end, weakref.ref(started))
    group = dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None


def _end(started: weakref.ref[dist.ProcessGroup]) -> None:
    if started() is not None and dist.group.WORLD is started() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()
