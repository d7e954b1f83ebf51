"""Which implementation of the collectives serves a process group."""

from __future__ import annotations

import torch.distributed as dist

from zgraph.comm import Comm, FunctionalComm, PointToPointComm, SingleComm
from zgraph.direct import DirectComm
from zgraph.groups import backends
from zgraph.peer_memory import find_readable_peers


def make_comm(group: dist.ProcessGroup | None, devices: set[str]) -> Comm:
    """The implementation for a group (None is a single process) and the types of device that the buckets are on.

    All ranks call it together: whether they can read each other's memory is found out by trying.
    """
    if group is None:
        return SingleComm()
    if devices == {"cpu"} and backends(group).get("cpu") == "gloo":
        pids = find_readable_peers(group)
        return PointToPointComm(group) if pids is None else DirectComm(group, pids)
    return FunctionalComm(group)
