"""``zgraph doctor`` tells what works and what will not, with the fix, and raises nothing where things are broken."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from zgraph import calibration, cli, doctor, surroundings
from zgraph.disk import DEFAULT_PATH
from zgraph.doctor import FAILS, LIMITED, WORKS, Diagnosis, Finding


def only(found: Iterator[Finding]) -> Finding:
    (finding,) = found
    return finding


def broken(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("planted\nin two lines")


@pytest.mark.slow
def test_this_machine_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["works"] is True
    assert {"versions", "processors", "memory", "devices", "links", "disk", "limits", "environment"} == set(
        found["facts"]
    )
    works = {finding["subject"] for finding in found["findings"] if finding["status"] == WORKS}
    assert {"packages", "a training step on cpu", "ranks with gloo", f"offloading to {DEFAULT_PATH}"} <= works
    assert found["facts"]["versions"]["torch"].startswith(torch.__version__)


def test_a_machine_where_everything_is_broken_is_told_about_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("versions", "processors", "memory", "devices", "links", "disk", "limits", "environment"):
        monkeypatch.setattr(surroundings, name, broken)
    checks = [name for name in vars(doctor) if name.startswith("check_")]
    for name in checks:
        monkeypatch.setattr(doctor, name, broken)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("not known: RuntimeError: planted\n") == 8
    assert printed.count("RuntimeError: planted\n    fix: this check itself failed") == len(checks)
    assert "in two lines" not in printed


def test_the_block_sorts_by_what_works() -> None:
    found = Diagnosis(
        {"memory": {"all": "1 GiB\nand more"}},
        (Finding("b", FAILS, "it is broken", "mend it"), Finding("a", WORKS, "fine"), Finding("c", LIMITED, "so so")),
    )
    assert str(found).splitlines() == [
        "memory:", "  all: 1 GiB", "    and more", "works:", "  a: fine", "limited:", "  c: so so", "will not work:",
        "  b: it is broken", "    fix: mend it",
    ]  # fmt: skip
    assert not found.works


def test_neither_the_user_nor_the_machine_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_SECRET_TOKEN", "hunter2")
    facts = {**surroundings.environment(), **surroundings.disk(tmp_path)}
    assert facts["XDG_CACHE_HOME"] == "~/cache"
    assert str(tmp_path) not in str(facts)
    assert "hunter2" not in str(facts)


def test_a_package_that_is_too_old_or_missing_will_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"torch": "2.9.1+cpu", "numpy": None, "triton": None}
    known = surroundings.installed
    monkeypatch.setattr(surroundings, "installed", lambda name: have[name] if name in have else known(name))
    old, missing = sorted(doctor.check_packages(), key=lambda finding: "installed" in finding.what)
    assert (old.status, old.what) == (FAILS, "torch is 2.9.1+cpu, and 2.13 is needed")
    assert (missing.what, missing.fix[:20]) == ("numpy is not installed", "pip install 'numpy>=")


@pytest.mark.parametrize("quota", [None, 0.5])
def test_more_threads_than_there_is_time_for_is_told(quota: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "cores_of_group", lambda: quota)
    monkeypatch.setattr(doctor, "available_cores", lambda: 4)
    assert list(doctor.check_threads()) == []
    torch.set_num_threads(6)
    assert f"share the time of {4 if quota is None else 1} core(s)" in only(doctor.check_threads()).what


def test_a_step_that_computes_something_else_will_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(doctor._Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.layers[0].weight.sum() * self.off

        off = 0.0

        def __deepcopy__(self, memo: dict[int, Any]) -> Wrong:
            other = Wrong()
            other.load_state_dict(self.state_dict())
            other.off = 1.0
            return other

    monkeypatch.setattr(doctor, "_Small", Wrong)
    found = only(doctor.check_step(torch.device("cpu")))
    assert found.status == FAILS
    assert "parameters are off by" in found.what


def test_without_a_compiler_updates_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_compiler", lambda: None)
    monkeypatch.setenv("CXX", "no-such")
    found = only(doctor.check_compiler())
    assert (found.status, found.what) == (LIMITED, "there is no 'no-such', as CXX says")


def test_with_a_compiler_that_is_broken_updates_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "problem", lambda: "g++ cannot compile kernels: no cc1plus")
    found = only(doctor.check_compiler())
    assert (found.status, found.what) == (LIMITED, "g++ cannot compile kernels: no cc1plus")


def test_kernels_that_are_not_kept_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "zgraph" / "kernels").mkdir(parents=True)
    (tmp_path / "zgraph" / "kernels").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    works, kept = doctor.check_compiler()
    assert (works.status, kept.status) == (WORKS, LIMITED)
    assert "every run compiles them anew" in kept.what


def test_a_gpu_that_torch_cannot_use_will_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(doctor.check_gpus()) == []
    monkeypatch.setattr(surroundings, "gpus_of_driver", lambda: ["GPU 0: H100"])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is built without CUDA" in only(doctor.check_gpus()).what
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", broken)
    assert only(doctor.check_gpus()).what == "1 are there, and torch cannot use them: planted"


def test_variables_that_make_a_process_wait_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor.check_environment()) == []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "waits for 3 other rank(s)" in only(doctor.check_environment()).what
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker,lo")
    assert list(doctor.check_environment()) == []
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=nowhere0,lo")
    found = only(doctor.check_environment())
    assert found.status == FAILS
    assert found.what.startswith("NCCL_SOCKET_IFNAME names nowhere0")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (socket.gaierror(-2, "Name or service not known"), "it does not resolve (Name or service not known)"),
        ([(0, 0, 0, "", ("192.0.2.1", 0))], "it resolves to no address of this machine"),
    ],
    ids=["unknown", "elsewhere"],
)
def test_a_host_name_that_leads_nowhere_may_hang_ranks(answer: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    found = only(doctor.check_host_name())
    assert found.status == FAILS
    assert found.what.startswith(says)
    assert "torchrun --local-addr 127.0.0.1" in found.fix


def test_what_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SECONDS", 0.05)
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: release.wait(5))
    assert "takes more than" in only(doctor.check_host_name()).what
    release.set()


def test_ranks_that_cannot_meet_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupGloo", broken)
    found = only(doctor.check_gloo())
    assert (found.status, found.what) == (FAILS, "planted")
    assert "GLOO_SOCKET_IFNAME" in found.fix


def test_little_shared_memory_and_low_limits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "free_bytes", lambda _: 64 * 2**20)
    assert only(doctor.check_shared_memory()).what.startswith("/dev/shm has 64 MiB free")
    low = {resource.RLIMIT_NOFILE: 256, resource.RLIMIT_AS: 2**30}
    monkeypatch.setattr(surroundings, "soft_limit", low.get)
    assert [finding.fix for finding in doctor.check_limits()] == ["ulimit -n 65536", "ulimit -v unlimited"]


def test_a_directory_that_cannot_hold_state_is_told(tmp_path: Path, disk_path: Path) -> None:
    assert only(doctor.check_disk(disk_path)).status == WORKS
    missing = only(doctor.check_disk(tmp_path / "missing"))
    assert (missing.status, "offload_path" in missing.fix) == (FAILS, True)
    if surroundings.file_system("/dev/shm") == "tmpfs":
        assert "lies in memory" in only(doctor.check_disk("/dev/shm")).what


def test_a_calibration_is_missing_damaged_or_of_another_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "hardware.json"
    monkeypatch.setenv("ZGRAPH_HARDWARE", str(path))
    assert only(doctor.check_calibration()).status == LIMITED
    path.write_text("{}")
    assert only(doctor.check_calibration()).status == FAILS

    class Saved:
        device_type, devices, torch = "cpu", len(os.sched_getaffinity(0)), torch.__version__

    monkeypatch.setattr(calibration, "read", lambda _: Saved)
    assert only(doctor.check_calibration()).status == WORKS
    Saved.torch = "2.0"
    assert f"torch was 2.0, and is {torch.__version__}" in only(doctor.check_calibration()).what


@pytest.mark.parametrize(
    ("lines", "files", "cores", "memory"),
    [
        ("0::/job\n", {"job/cpu.max": "150000 100000", "job/memory.max": "max", "memory.max": "4096"}, 1.5, 4096),
        (
            "4:memory:/job\n3:cpu,cpuacct:/\n",
            {"memory/job/memory.limit_in_bytes": "8192", "cpu,cpuacct/cpu.cfs_quota_us": "-1",
             "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            None, 8192,
        ),
        ("4:memory:/elsewhere\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None, None),
    ],
    ids=["version 2", "version 1", "no limit"],
)  # fmt: skip
def test_control_groups_of_both_versions_are_read(
    lines: str, files: dict[str, str], cores: float | None, memory: int | None, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(lines)
    monkeypatch.setattr(surroundings, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(surroundings, "OWN_GROUPS", tmp_path / "own")
    assert surroundings.cores_of_group() == cores
    assert surroundings.memory_of_group() == memory


def test_what_is_shown_names_nobodys_home_and_no_other_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "node17.corp.example")
    monkeypatch.setenv("LD_PRELOAD", "")
    assert (
        surroundings.without_home(f"/lib/a.so:{tmp_path}/b.so and {tmp_path}2") == f"/lib/a.so:~/b.so and {tmp_path}2"
    )
    assert surroundings.environment()["MASTER_ADDR"] == "that of a machine"
    said = str(doctor.examine(tmp_path / "none"))
    assert f"{tmp_path}/none" not in said
    assert "~/none" in said
