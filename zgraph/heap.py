"""Give free heap memory back to the system, so that resident memory follows live memory.

glibc keeps freed blocks below 32 MiB for reuse; between them, a training step leaves gaps that no later tensor fits.
Calling this just before the step's memory peak returns those gaps: a few milliseconds once per step, where mapping
every tensor separately costs page faults throughout.
"""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None).malloc_trim


def release_free_memory() -> None:
    """Return free heap pages to the system; does nothing where the C library is not glibc."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
