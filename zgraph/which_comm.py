"""Which implementation of the collectives serves a process group."""

from __future__ import annotations

import torch.distributed as dist

from zgraph.comm import Comm, FunctionalComm, PointToPointComm, SingleComm
from zgraph.direct import DirectComm
from zgraph.groups import axis_group, serves_cpu
from zgraph.peer_memory import find_readable_peers
from zgraph.program import Mesh


def make_comm(group: dist.ProcessGroup | None, devices: set[str], mesh: Mesh | None = None) -> Comm:
    """The implementation for a group and the types of device that the buckets are on.

    All ranks call it together: whether they can read each other's memory is found out by trying, axis by axis, so that
    ranks of one host do where those of several cannot.

    Args:
        group: all ranks; None for a single process.
        devices: types of device.
        mesh: with axes inside and between nodes, whose groups have been made (``zgraph.groups.open_axes``).
    """
    whole = _make(group, devices)
    if mesh is not None:
        for name in mesh.axes:
            if name != mesh.axis:
                whole.axes[name] = along = _make(axis_group(group, mesh, name), devices)
                along.count_along(name, whole.traffic)
    return whole


def _make(
    group: dist.ProcessGroup | None, devices: set[str]
) -> SingleComm | PointToPointComm | DirectComm | FunctionalComm:
    if group is None:
        return SingleComm()
    if devices == {"cpu"} and serves_cpu(group):
        pids = find_readable_peers(group)
        return PointToPointComm(group) if pids is None else DirectComm(group, pids)
    return FunctionalComm(group)
