"""Another process's memory is read whole or refused with the reason."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks
from zgraph import peer_memory
from zgraph.errors import RankError
from zgraph.peer_memory import PeerMemory, _refusal, find_readable_peers, may_read_peers, read_memory

PAGE = mmap.PAGESIZE


def test_bytes_come_whole_in_as_many_calls_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "_MOST_BYTES", 100)
    source, found = torch.arange(333, dtype=torch.int32), torch.zeros(333, dtype=torch.int32)
    read_memory(os.getpid(), source.data_ptr(), found)
    assert torch.equal(found, source)
    read_memory(os.getpid(), 0, torch.empty(0))


def test_memory_that_is_partly_there_is_refused() -> None:
    pages = mmap.mmap(-1, 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    read_memory(os.getpid(), start, torch.empty(2 * PAGE, dtype=torch.uint8))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + PAGE), PAGE, mmap.PROT_READ & 0) == 0
    with pytest.raises(OSError, match="Bad address") as raised:
        read_memory(os.getpid(), start, torch.empty(2 * PAGE, dtype=torch.uint8))
    assert raised.value.errno == errno.EFAULT


def gone() -> int:
    """The id of a process that has ended."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return pid


def test_an_error_names_the_rank_and_what_was_read() -> None:
    memory = PeerMemory([os.getpid(), gone()])
    with pytest.raises(RankError, match=r"rank 1 has stopped: its 1,024 bytes of a gather.*No such process"):
        memory.read(1, 4096, torch.empty(256), "a gather")
    with pytest.raises(RankError, match=r"rank 0 .*Bad address"):
        memory.read(0, 0, torch.empty(256), "a gather")


def test_a_process_with_the_id_but_not_the_bytes_is_another() -> None:
    token = torch.arange(4)
    assert _refusal(os.getpid(), token.data_ptr(), token) is None
    assert _refusal(os.getpid(), token.data_ptr(), token + 1) == "another process has its id here"
    assert _refusal(gone(), token.data_ptr(), token) == "No such process"


def test_one_process_knows_what_would_keep_its_siblings_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for scope, may in ((0, True), (1, True), (2, False), (3, False)):
        monkeypatch.setattr(peer_memory, "_yama_scope", lambda scope=scope: scope)
        assert may_read_peers() is may
    monkeypatch.setattr(peer_memory, "_yama_scope", lambda: 0)
    monkeypatch.setattr(peer_memory, "_process_vm_readv", lambda: None)
    assert may_read_peers() is False


def test_other_systems_have_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "_process_vm_readv", lambda: None)
    token = torch.arange(4)
    assert _refusal(os.getpid(), token.data_ptr(), token) == "Function not implemented"


def find(scope: Path, refusing_rank: int) -> list[int]:
    """Whom a process lets trace it while ranks try, where Yama refuses those that are not named."""
    named: list[int] = []
    group = torch.distributed.group.WORLD
    assert group is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_memory, "_found", {})  # whatever groups there have been
        patch.setattr(peer_memory, "_YAMA", scope)
        patch.setattr(peer_memory, "_set_tracer", named.append)
        if torch.distributed.get_rank(group) == refusing_rank:
            patch.setattr(peer_memory, "_refusal", lambda *_: "not permitted")
        found = find_readable_peers(group)
    assert (found is None) == (refusing_rank >= 0)
    return ["parent" if pid == os.getppid() else pid for pid in named]  # type: ignore[misc]


@pytest.mark.parametrize(("scope", "while_trying"), [("0", []), ("1", ["parent"]), ("2", []), ("", [])])
def test_the_descendants_of_a_ranks_parent_may_read_it_where_they_have_to_be_named(
    ranks: Ranks, tmp_path: Path, scope: str, while_trying: list[str]
) -> None:
    file = tmp_path / "ptrace_scope"
    file.write_text(scope + "\n")
    assert ranks.run(find, file, -1) == [while_trying] * 2
    after_refusal = [*while_trying, 0] if while_trying else []
    assert ranks.run(find, file, 0) == [after_refusal] * 2


def test_descendants_of_the_first_process_are_everybody_and_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[int] = []
    monkeypatch.setattr(peer_memory, "_yama_scope", lambda: 1)
    monkeypatch.setattr(peer_memory, "_set_tracer", named.append)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    peer_memory._allow_siblings()
    assert named == []
