"""Bytes on the wire: a loopback device that carries nothing but this benchmark."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1


def enter_private_network() -> bool:
    """Move the calling thread, and all it forks, to a network of their own; False where that is not allowed."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))
    return True


def loopback_bytes() -> int:
    """Bytes that went over the loopback device of the calling thread's network, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "lo":
            return int(counters.split()[0])
    raise RuntimeError("/proc/net/dev lists no loopback device")
