"""Give free heap memory back to the system.

glibc keeps freed blocks below 32 MiB for reuse. What capture leaves behind is never used again, and what is to be
measured as fresh memory must not be memory that was used before.
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
