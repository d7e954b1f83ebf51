"""Files of zgraph: where those lie that are kept for a user, and those that are nobody's once their process has ended.

The latter have names that nobody else gives, and are locked by their process; the kernel unlocks them when it ends, by
``kill -9``, too. So what has such a name and can be locked is left behind, and the next process that makes such files
there removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zgraph.errors import StateError

PASSING = "zgraph-of-process-"
"""How the name of what belongs to one process begins; see ``passing_name``."""

_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""Locks of other machines are not seen everywhere, so what they have made is left to them."""

_OF_PROCESS = re.compile(re.escape(f"{PASSING}{_MACHINE}-") + r"[0-9a-f]{16}\.partial")


def passing_name() -> str:
    """A new name for what belongs to this process."""
    return f"{PASSING}{_MACHINE}-{secrets.token_hex(8)}.partial"


def user_cache() -> Path:
    """``zgraph`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: neither is known.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zgraph"


@contextmanager
def writing(path: str | Path, fix: str) -> Iterator[None]:
    """Around what writes a file for a user.

    Args:
        path: as the user knows it.
        fix: a way out.

    Raises:
        StateError: the system has refused something.
    """
    try:
        yield
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror}", fix=fix) from error


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """The name of a file beside ``path``, to write and then to ``replace`` it with; gone in any case after.

    Raises:
        OSError: there can be none.
    """
    remove_left_behind(path.parent)
    lock = None
    while lock is None:  # before it was locked, somebody took it for left behind
        partial = path.parent / passing_name()
        lock = _lock(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), partial)
    try:
        yield partial
    finally:
        if _is_at(lock, partial):
            partial.unlink()
        os.close(lock)


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A new directory in another, gone after.

    Raises:
        OSError: there can be none.
    """
    remove_left_behind(directory)
    lock = None
    while lock is None:
        made = directory / passing_name()
        made.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # before it was locked, somebody took it for left behind
            lock = _lock(os.open(made, os.O_RDONLY | os.O_CLOEXEC), made)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def remove_left_behind(directory: Path) -> None:
    """Remove what processes of this user on this machine have made under such names before they ended; all else stays.

    So does what no lock proves dead: directories where the file system, as NFS, locks none.
    """
    with suppress(OSError):  # who cannot look there leaves it to others
        for name in filter(_OF_PROCESS.fullmatch, os.listdir(directory)):
            _remove_if_left_behind(directory / name)


def _remove_if_left_behind(path: Path) -> None:
    with suppress(OSError):  # it is in use, gone or a link, or there are no locks there, which would prove it dead
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
        access = os.O_RDONLY if is_folder else os.O_RDWR  # NFS locks for itself what may be written to
        lock = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
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
