"""Files of zgraph: where those lie that are kept for a user, and how one is written all or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def user_cache() -> Path:
    """``zgraph`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: neither is known.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zgraph"


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """The name of a file beside ``path``, to write and then to ``replace`` it with; gone in any case after."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
    finally:
        if os.path.exists(partial):  # not so if its folder is a file, or out of reach
            partial.unlink()
