"""A cap on the memory of one process, by a memory control group of its own.

Whichever hierarchy has the memory controller is used, version 1 or 2. Pages that a process shares with the one it was
forked from stay charged to that one, so a cap counts what a rank adds to the imports.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


class CapError(Exception):
    """This machine, or this user, cannot cap memory; the message says why."""


class MemoryCap:
    """A control group that kills its member when it would hold more than ``limit_bytes``.

    Raises:
        CapError: no memory controller, or no right to make a group.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        parent, self._version = _find_parent()
        self._group = parent / name
        if self._version == 1:
            limit, swap, swap_bytes = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit_bytes
        else:
            limit, swap, swap_bytes = "memory.max", "memory.swap.max", 0
        try:
            self._group.mkdir()
            (self._group / limit).write_text(str(limit_bytes))
            if (self._group / swap).exists():  # not where the kernel does not account swap
                (self._group / swap).write_text(str(swap_bytes))
        except OSError as error:
            raise CapError(f"no control group can be made in {parent} ({error.strerror}): run as root") from error

    def enter(self) -> None:
        """Move the calling process in."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def killed(self) -> bool:
        """Whether a member was killed for memory."""
        report = self._group / ("memory.oom_control" if self._version == 1 else "memory.events")
        return dict(line.split() for line in report.read_text().splitlines())["oom_kill"] != "0"

    def remove(self) -> None:
        """Remove the group; its member has ended."""
        for _ in range(100):
            with contextlib.suppress(OSError):  # busy for a moment after the member's end
                self._group.rmdir()
            if not self._group.exists():
                return
            time.sleep(0.05)
        raise CapError(f"control group {self._group} still has members, so it cannot be removed")


def _find_parent() -> tuple[Path, int]:
    """The control group to make ours in, and the version of its hierarchy."""
    if os.geteuid() != 0:
        raise CapError("a memory cap needs a control group, and that needs root: run as root")
    membership = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        membership[controllers] = path.lstrip("/")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options = line.split()[:4]
        root = Path(mount)
        if kind == "cgroup" and "memory" in options.split(","):
            own = next((path for controllers, path in membership.items() if "memory" in controllers.split(",")), "")
            # Inside a container the path may be the host's, which is not under this mount.
            return (root / own if (root / own).is_dir() else root), 1
        if kind == "cgroup2":
            # A group with members cannot hand controllers down, so ours goes beside the nearest that does.
            own_group = root / membership.get("", "")
            for group in (own_group, *own_group.parents):
                control = group / "cgroup.subtree_control"
                if control.is_file() and "memory" in control.read_text().split():
                    return group, 2
                if group == root:
                    break
    raise CapError("no control group hierarchy with the memory controller is mounted, so memory cannot be capped")
