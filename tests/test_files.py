"""What belongs to one process goes with it, or with the next one that has such files there; and nothing else does."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from zgraph import files
from zgraph.files import PASSING, beside, passing_name, remove_left_behind, scratch


def killed_in(make: Callable[[Path], AbstractContextManager[Path]], where: Path) -> None:
    """Have a process make a file or a directory, put something there, and be killed."""
    child = os.fork()
    if not child:
        with make(where) as made:
            (made / "file" if made.is_dir() else made).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def there(directory: Path) -> set[str]:
    return set(os.listdir(directory))


def test_a_file_beside_another_becomes_it_or_goes(tmp_path: Path) -> None:
    with beside(tmp_path / "a") as partial:
        partial.write_text("new")
        assert there(tmp_path) == {partial.name}
        partial.replace(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"

    def fail() -> None:
        with beside(tmp_path / "a") as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "a").read_text() == "new"
    assert there(tmp_path) == {"a"}


def test_a_scratch_directory_is_private_and_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with scratch(tmp_path) as made:
        assert made.stat().st_mode & 0o777 == 0o700
        (made / "folder").mkdir()
        (made / "folder" / "file").touch()
    assert there(tmp_path) == set()


def test_what_killed_processes_leave_is_removed_by_the_next_and_what_is_alive_stays(tmp_path: Path) -> None:
    name = passing_name()
    elsewhere = name.replace(files._MACHINE, "0123abcd")  # of another machine, whose locks may not be seen here
    near = (
        "a.1.partial",
        ".zgraph-settings",
        f"{PASSING}mine",
        f"{name}0",
        name.removesuffix(".partial"),
        f"a{name}",
        elsewhere,
    )
    foreign = ("notes", *near)
    for name in foreign:
        (tmp_path / name).write_text("theirs")
    linked, pipe = passing_name(), passing_name()
    (tmp_path / linked).symlink_to(tmp_path / "notes")
    os.mkfifo(tmp_path / pipe)
    with beside(tmp_path / "a") as file, scratch(tmp_path) as folder:
        alive = there(tmp_path)
        assert len(alive) == len(foreign) + 4
        for _ in range(2):
            killed_in(lambda path: beside(path / "a"), tmp_path)
            killed_in(scratch, tmp_path)
            assert len(there(tmp_path) - alive) == 1, "the second has removed what the first has left"
        remove_left_behind(tmp_path)
        assert there(tmp_path) == alive
        killed_in(lambda path: beside(path / "a"), tmp_path)
        with scratch(tmp_path) as other:
            assert there(tmp_path) - alive == {other.name}
        file.write_text("whole")
        file.replace(tmp_path / "a")
        assert folder.is_dir()
    with beside(tmp_path / "a"):
        pass
    assert there(tmp_path) == {*foreign, "a", linked, pipe}
    assert (tmp_path / "notes").read_text() == "theirs"


def test_what_another_user_left_or_no_lock_proves_dead_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_in(scratch, tmp_path)
    left = there(tmp_path)

    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: -2)
        remove_left_behind(tmp_path)
        assert there(tmp_path) == left
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", unknown)
        with scratch(tmp_path) as made, beside(tmp_path / "a") as partial:
            assert there(tmp_path) == {*left, made.name, partial.name}
        assert there(tmp_path) == left
    remove_left_behind(tmp_path)
    assert there(tmp_path) == set()


def test_what_is_taken_for_left_behind_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, taken = os.open, list[str]()

    def open_and_lose(path: Any, *options: Any, **more: Any) -> int:
        descriptor = opened(path, *options, **more)
        if Path(path).name.startswith(PASSING) and len(taken) < 2:
            taken.append(str(path))
            Path(path).rmdir() if Path(path).is_dir() else Path(path).unlink()
        return descriptor

    monkeypatch.setattr(os, "open", open_and_lose)
    with scratch(tmp_path) as folder, beside(tmp_path / "a") as file:
        assert folder.is_dir()
        assert file.is_file()
        remove_left_behind(tmp_path)
        assert there(tmp_path) == {folder.name, file.name}
    assert len(taken) == 2


def test_one_process_may_write_a_file_from_several_threads(tmp_path: Path) -> None:
    def write(number: int) -> None:
        with beside(tmp_path / "a") as partial:
            partial.write_text(str(number))
            partial.replace(tmp_path / "a")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(40)))
    assert there(tmp_path) == {"a"}
    assert (tmp_path / "a").read_text() in map(str, range(40))
