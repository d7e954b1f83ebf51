"""Files of zgraph: where those lie that are kept for a user, and those that are nobody's once their process has ended.

The latter are locked by their process, and the kernel unlocks them when it ends, by ``kill -9``, too. So what can be
locked is provably left behind, and the next process that makes such files there removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PASSING = ".zgraph-"
"""How the name of what belongs to one process begins; eight characters of ``tempfile`` follow."""


def user_cache() -> Path:
    """``zgraph`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: neither is known.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zgraph"


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """The name of a file beside ``path``, to write and then to ``replace`` it with; gone in any case after.

    Raises:
        OSError: there can be none.
    """
    _remove_left_behind(path.parent, re.escape(path.name) + r"\.\d+\.partial")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while (lock := _lock(os.open(partial, flags, 0o666), partial)) is None:
        pass
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A new directory in another, gone after.

    Raises:
        OSError: there can be none.
    """
    remove_left_behind(directory)
    while True:
        made = Path(tempfile.mkdtemp(prefix=PASSING, dir=directory))
        with suppress(FileNotFoundError):  # before it was locked, somebody took it for left behind
            lock = _lock(os.open(made, os.O_RDONLY | os.O_CLOEXEC), made)
            if lock is not None:
                break
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def remove_left_behind(directory: Path) -> None:
    """Remove what begins with ``PASSING`` and is of processes of this user that have ended; all else stays."""
    _remove_left_behind(directory, re.escape(PASSING) + "[a-z0-9_]{8}")


def _remove_left_behind(directory: Path, pattern: str) -> None:
    with suppress(OSError):  # who cannot look there leaves it to others
        for name in os.listdir(directory):
            if re.fullmatch(pattern, name):
                _remove_if_left_behind(directory / name)


def _remove_if_left_behind(path: Path) -> None:
    with suppress(OSError):  # it is in use, gone or a link, or there are no locks there, which would prove it dead
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(lock)
            if status.st_uid == os.geteuid() and _is_at(lock, path):
                if stat.S_ISDIR(status.st_mode):
                    shutil.rmtree(path)
                elif stat.S_ISREG(status.st_mode):
                    path.unlink()
        finally:
            os.close(lock)


def _lock(descriptor: int, path: Path) -> int | None:
    """Lock what was opened, where the file system knows locks; None, and closed, if the path has lost it meanwhile."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether that path leads to what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
