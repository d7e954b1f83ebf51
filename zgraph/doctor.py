"""``zgraph doctor``: what this machine is, what works on it and what will not, with the fix, to be pasted.

Where it can, it tries rather than asks: it compiles a kernel, lets two gloo ranks reduce a tensor, writes a file past
the page cache, and trains a small model on two simulated ranks beside plain PyTorch. A check that fails in a way that
nobody thought of is a finding as well: nothing here raises, because a machine that is asked about is often one where
something is broken.
"""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import nn

from zgraph import calibration, surroundings
from zgraph.codegen.library import cache_directory, find_compiler, problem
from zgraph.command_line import PATH, Command, json_option
from zgraph.disk import DEFAULT_PATH, Disk
from zgraph.errors import OptionError, StateError, ZgraphError, first_line
from zgraph.files import user_cache
from zgraph.machines import available_cores
from zgraph.peer_memory import may_read_peers
from zgraph.plans import show_bytes
from zgraph.simulate import simulate_ranks
from zgraph.surroundings import Facts, told, without_home
from zgraph.which_hardware import tell

WORKS, LIMITED, FAILS = "works", "limited", "will not work"
"""What a finding says: LIMITED works, but slower than it could, or not for everything."""

_SECONDS = 10.0
"""That is waited for what may never answer."""

_FEW_FILES = 1024
_LITTLE_SHARED = 2**28
_FEW_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        subject: what was checked.
        status: ``"works"``, ``"limited"`` or ``"will not work"``.
        what: was found.
        fix: what to do about it; nothing where it works.
    """

    subject: str
    status: str
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that ``zgraph doctor`` has found.

    Attributes:
        facts: by kind, what is there.
        findings: in the order in which they were checked.
    """

    facts: dict[str, Facts]
    findings: tuple[Finding, ...]

    @property
    def works(self) -> bool:
        """Whether nothing will fail."""
        return all(finding.status != FAILS for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"works": self.works}

    def __str__(self) -> str:
        lines = []
        for kind, facts in self.facts.items():
            lines.append(f"{kind}:")
            lines += [f"  {name}: {_indented(value)}" for name, value in facts.items()]
        for status in (WORKS, LIMITED, FAILS):
            found = [finding for finding in self.findings if finding.status == status]
            lines += [f"{status}:"] if found else []
            for finding in found:
                lines.append(f"  {finding.subject}: {finding.what}")
                lines += [f"    fix: {finding.fix}"] if finding.fix else []
        return "\n".join(lines)


def _indented(value: str) -> str:
    return value.replace("\n", "\n    ")


def examine(directory: str | Path = DEFAULT_PATH) -> Diagnosis:
    """Look at this machine and try what zgraph needs of it; takes a few seconds, and raises nothing.

    Args:
        directory: where state would be offloaded to.
    """
    kinds: dict[str, Callable[[], Facts]] = {
        "versions": surroundings.versions,
        "processors": surroundings.processors,
        "memory": surroundings.memory,
        "devices": surroundings.devices,
        "links": surroundings.links,
        "disk": partial(surroundings.disk, directory),
        "limits": surroundings.limits,
        "environment": surroundings.environment,
    }
    facts = {kind: _facts(collect) for kind, collect in kinds.items()}
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": check_packages,
        "threads": check_threads,
        "a step": partial(check_step, torch.device("cpu")),
        "kernels on CPUs": check_compiler,
        "GPUs": check_gpus,
        "environment": check_environment,
        "host name": check_host_name,
        "ranks with gloo": check_gloo,
        "reading other ranks' memory": check_peer_memory,
        "shared memory": check_shared_memory,
        "limits": check_limits,
        "offloading": partial(check_disk, directory),
        "calibration": check_calibration,
    }
    findings = [finding for subject, check in checks.items() for finding in _findings(subject, check)]
    return Diagnosis(
        {kind: {name: without_home(value) for name, value in of_kind.items()} for kind, of_kind in facts.items()},
        tuple(Finding(*map(without_home, astuple(finding))) for finding in findings),
    )


def _facts(collect: Callable[[], Facts]) -> Facts:
    try:
        return collect()
    except Exception as error:  # noqa: BLE001 -- what is broken is what is asked about
        return {"not known": f"{type(error).__name__}: {first_line(error)}"}


def _findings(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except ZgraphError as error:
        yield Finding(subject, FAILS, error.what, error.fix or "")
    except Exception as error:  # noqa: BLE001 -- what is broken is what is asked about
        what = f"{type(error).__name__}: {first_line(error)}"
        yield Finding(subject, FAILS, what, "this check itself failed; please report it with all of this block")


# What zgraph stands on


def check_packages() -> Iterator[Finding]:
    """Versions that zgraph needs are installed; Triton matters where there is a GPU."""
    if not (3, 10) <= sys.version_info[:2] < (3, 14):
        yield Finding("Python", FAILS, f"{sys.version.split()[0]} is none of 3.10 to 3.13", "use another interpreter")
    needed = [
        re.match(r"([\w-]+)>=([\d.]+)", line) for line in requires("zgraph-compiler") or () if "extra" not in line
    ]
    problems = []
    for name, least in (found.groups() for found in needed if found is not None):
        have = surroundings.installed(name)
        if have is None and (name != "triton" or torch.cuda.is_available()):
            problems.append((f"{name} is not installed", f"pip install '{name}>={least}'"))
        elif have is not None and _numbers(have) < _numbers(least):
            problems.append((f"{name} is {have}, and {least} is needed", f"pip install --upgrade '{name}>={least}'"))
    for what, fix in problems:
        yield Finding("packages", FAILS, what, fix)
    if not problems:
        yield Finding("packages", WORKS, "all that are needed are installed")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text.split("+")[0])[:3]))


def check_threads() -> Iterator[Finding]:
    """No more threads than cores, and no more cores than a control group gives time for."""
    threads, cores, quota = torch.get_num_threads(), available_cores(), surroundings.cores_of_group()
    most = cores if quota is None else min(cores, max(int(quota), 1))
    if threads > most:
        what = f"{threads} threads share the time of {most} core(s)"
        yield Finding("threads", LIMITED, what, f"export OMP_NUM_THREADS={most}, divided by the ranks of this machine")


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layers(x).square().mean()
        return loss


def check_step(device: torch.device) -> Iterator[Finding]:
    """A small model trains on two simulated ranks as it does in plain PyTorch: capture, passes, proof and kernels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = _Small().to(device), torch.randn(4, 8).to(device)
    plain = copy.deepcopy(model)
    ranks = simulate_ranks(model, torch.optim.AdamW(model.parameters()), world_size=2)
    ranks.train_step([(part,) for part in x.chunk(2)])
    optimizer = torch.optim.AdamW(plain.parameters())
    plain(x).backward()
    optimizer.step()
    found = ranks.state_dict()
    worst = max(float((found[name] - value).abs().max()) for name, value in plain.state_dict().items())
    subject, what = f"a training step on {device.type}", "captured, sharded over two ranks, proved"
    if worst <= 1e-6:
        yield Finding(subject, WORKS, f"{what}, and equal to plain PyTorch")
    else:
        fix = "run the tests of zgraph here (make test), and report what fails"
        yield Finding(subject, FAILS, f"{what}, but parameters are off by {worst:.1e} after it", fix)


def check_compiler() -> Iterator[Finding]:
    """The C++ compiler makes a library that can be loaded, and the directory where kernels are kept is to be used."""
    subject = "kernels on CPUs"
    if find_compiler() is None:
        chosen = os.environ.get("CXX")
        what = f"there is no {chosen!r}, as CXX says" if chosen else "there is no C++ compiler"
        fix = "install g++, or set CXX; until then updates run operator by operator"
        yield Finding(subject, LIMITED, what, fix)
        return
    why = problem()
    if why is not None:
        yield Finding(
            subject, LIMITED, why, "mend it, or set CXX to another; until then updates run operator by operator"
        )
        return
    yield Finding(subject, WORKS, "C++ is compiled and loaded")
    if cache_directory().parent != told_path(user_cache):
        what = f"they are not kept, for {told(lambda: str(user_cache() / 'kernels'))} is not this user's"
        fix = "chmod it 700 and own it, or set XDG_CACHE_HOME to a directory that is"
        yield Finding("kept kernels", LIMITED, f"{what} alone: every run compiles them anew", fix)


def told_path(find: Callable[[], Path]) -> Path | None:
    """A directory, if there is a home that it could lie in."""
    try:
        return find()
    except RuntimeError:
        return None


# GPUs


def check_gpus() -> Iterator[Finding]:
    """GPUs that the driver shows can be used, and are known to the cost model."""
    if not torch.cuda.is_available():
        there = surroundings.gpus_of_driver()
        if there and torch.version.cuda is None:
            what = f"{len(there)} are there, and this torch is built without CUDA"
            yield Finding("GPUs", FAILS, what, "install a build of torch for CUDA, see pytorch.org/get-started")
        elif there and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1"):
            fix = "update the driver, or install a torch for the CUDA version that nvidia-smi shows"
            yield Finding("GPUs", FAILS, f"{len(there)} are there, and torch cannot use them: {_no_cuda()}", fix)
        return
    if not dist.is_nccl_available():
        yield Finding("GPUs", FAILS, "this torch has no NCCL, so ranks cannot communicate", "install another build")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        for finding in check_step(device):  # its update is a kernel in Triton
            yield Finding(f"GPU {index}", finding.status, finding.what, finding.fix)
        try:
            tell(device)
        except OptionError as error:
            yield Finding(f"GPU {index}, predictions", LIMITED, error.what, error.fix or "")
    blocked = [
        f"{a} and {b}"
        for a in range(torch.cuda.device_count())
        for b in range(a)
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    if blocked:
        what = f"GPUs {', '.join(blocked)} cannot read each other's memory: messages go through the host"
        yield Finding("GPU links", LIMITED, what, "see `nvidia-smi topo -m`; in a virtual machine, pass NVLink through")


def _no_cuda() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 -- what it says is what is wanted
        return first_line(error)
    return "it finds none"


# Ranks


def check_environment() -> Iterator[Finding]:
    """Variables do not make a process wait for ranks or networks that are not there."""
    world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
    if world.isdecimal() and int(world) > 1 and rank is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
        what = f"RANK={rank} and WORLD_SIZE={world} are set, so zgraph.compile waits for {int(world) - 1} other rank(s)"
        yield Finding("environment", LIMITED, what, "unset RANK WORLD_SIZE to train in one process, or use torchrun")
    networks = surroundings.interfaces()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        given = os.environ.get(variable, "")
        # NCCL takes the beginnings of names, and names to leave out.
        wanted = [] if given.startswith("^") else given.removeprefix("=").split(",")
        missing = [name for name in wanted if name and not any(each.startswith(name) for each in networks)]
        if missing:
            what = f"{variable} names {', '.join(missing)}, and there are {', '.join(networks)}"
            yield Finding("environment", FAILS, what, f"unset {variable}, or name one that is there")


def check_host_name() -> Iterator[Finding]:
    """The name of this machine leads to an address of it, by which ranks find each other."""
    outcome = _within(lambda: [each[4][0] for each in socket.getaddrinfo(socket.gethostname(), None)])
    fix = (
        "write the name with 127.0.0.1 into /etc/hosts; or start ranks of one machine with "
        "`torchrun --local-addr 127.0.0.1` and GLOO_SOCKET_IFNAME=lo"
    )
    if outcome is None:
        what = f"looking it up takes more than {_SECONDS:.0f} s: ranks that torchrun starts may hang"
        yield Finding("host name", FAILS, what, fix)
    elif isinstance(outcome, OSError):
        what = f"it does not resolve ({outcome.strerror or outcome}): ranks that torchrun starts may hang"
        yield Finding("host name", FAILS, what, fix)
    elif isinstance(outcome, Exception):
        raise outcome
    elif not any(map(_is_own, outcome)):
        what = "it resolves to no address of this machine: ranks that torchrun starts may hang"
        yield Finding("host name", FAILS, what, fix)
    else:
        yield Finding("host name", WORKS, "it resolves to an address of this machine")


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as opened:
            opened.bind((address, 0))
    except OSError:
        return False
    return True


def check_gloo() -> Iterator[Finding]:
    """Two gloo ranks, here threads, reduce a tensor over the network that gloo chooses by itself."""
    subject = "ranks with gloo"
    if not dist.is_available() or not dist.is_gloo_available():
        yield Finding(subject, FAILS, "this torch is built without gloo", "install another build")
        return
    store = dist.HashStore()  # type: ignore[attr-defined]

    def reduce(rank: int) -> float:
        group: Any = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=_SECONDS))
        value = torch.tensor([rank + 1.0])
        group.allreduce([value]).wait()
        return value.item()

    waiting = [_started(partial(reduce, rank)) for rank in range(2)]
    outcomes = [wait(_SECONDS + 1) for wait in waiting]
    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    fix = "name a network of `ip link` in GLOO_SOCKET_IFNAME (lo for ranks of one machine), and let a firewall pass it"
    if failed:
        yield Finding(subject, FAILS, first_line(failed[0]) or type(failed[0]).__name__, fix)
    elif outcomes != [3.0, 3.0]:
        yield Finding(subject, FAILS, f"two ranks have not met within {_SECONDS:.0f} s", fix)
    else:
        yield Finding(subject, WORKS, "two ranks have reduced a tensor")


def _started(function: Callable[[], Any]) -> Callable[[float], Any]:
    """Run a function in a thread; what is returned waits for so many seconds, for its result or exception, or None."""
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append(function())
        except Exception as error:  # noqa: BLE001 -- it is told
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()

    def wait(seconds: float) -> Any:
        thread.join(seconds)
        return outcome[0] if outcome else None

    return wait


def _within(function: Callable[[], Any]) -> Any:
    return _started(function)(_SECONDS)


def check_peer_memory() -> Iterator[Finding]:
    """Ranks of this machine may read each other's memory instead of sending messages."""
    subject = "reading other ranks' memory"
    if may_read_peers():
        yield Finding(subject, WORKS, "ranks of this machine need send each other no messages")
    else:
        fix = "set kernel.yama.ptrace_scope to 0 or 1; in a container, allow it (docker run --cap-add SYS_PTRACE)"
        yield Finding(subject, LIMITED, "it is not permitted, so gloo ranks send each other messages", fix)


def check_shared_memory() -> Iterator[Finding]:
    """There is room for what processes pass to each other."""
    free = surroundings.free_bytes("/dev/shm")
    if free < _LITTLE_SHARED:
        what = f"/dev/shm has {show_bytes(free)} free; NCCL and the workers of a DataLoader pass tensors through it"
        yield Finding("shared memory", LIMITED, what, "in a container, docker run --ipc=host or --shm-size=8g")


def check_limits() -> Iterator[Finding]:
    """Limits of this process are not in the way."""
    files = surroundings.soft_limit(resource.RLIMIT_NOFILE)
    if files is not None and files < _FEW_FILES:
        yield Finding("limits", LIMITED, f"only {files} files may be open at once", "ulimit -n 65536")
    for name, option in (("address space", "v"), ("file size", "f")):
        most = surroundings.soft_limit(surroundings.LIMITS[name])
        if most is not None:
            yield Finding("limits", LIMITED, f"{name} is limited to {show_bytes(most)}", f"ulimit -{option} unlimited")
    locked = surroundings.soft_limit(resource.RLIMIT_MEMLOCK)
    if locked is not None and any(Path("/sys/class/infiniband").glob("*")):
        what = f"only {show_bytes(locked)} of memory may be locked, which InfiniBand needs"
        yield Finding("limits", LIMITED, what, "ulimit -l unlimited; in a container, docker run --ulimit memlock=-1")


# Files


def check_disk(directory: str | Path) -> Iterator[Finding]:
    """A file can be written and read in the directory of offloaded state, on a disk, past the page cache."""
    subject, value = f"offloading to {directory}", torch.arange(4096.0)
    fix = "give offload_path= a directory on a local disk that you may write to (zgraph doctor --directory tries one)"
    try:
        disk = Disk(directory)
        stored = disk.allocate(len(value), value.dtype)
        stored.write(value)
        is_same = torch.equal(stored.read(), value)
    except ZgraphError as error:
        yield Finding(subject, FAILS, error.what, fix)
        return
    if not is_same:
        yield Finding(subject, FAILS, "what was read is not what was written", fix)
        return
    free = surroundings.free_bytes(directory)
    if not disk.is_direct:
        what = "the file system has no O_DIRECT, so that state takes memory in the page cache, too"
        yield Finding(subject, LIMITED, what, fix)
    elif free < _FEW_BYTES:
        yield Finding(subject, LIMITED, f"only {show_bytes(free)} are free", fix)
    else:
        yield Finding(
            subject, WORKS, f"{show_bytes(free)} are free, on {surroundings.file_system(directory)}, O_DIRECT"
        )


def check_calibration() -> Iterator[Finding]:
    """What was measured of this machine can be read, and is of this machine and this torch."""
    path = calibration.default_path()
    fix = "run `zgraph calibrate`"
    if not path.exists():
        if not torch.cuda.is_available():  # GPUs have presets
            what = "this machine was not measured, so that times are guesses"
            yield Finding("calibration", LIMITED, what, fix)
        return
    try:
        found = calibration.read(path)
    except StateError as error:
        yield Finding("calibration", FAILS, error.what, f"{fix}, or remove {path}")
        return
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    devices = torch.cuda.device_count() if device_type == "cuda" else available_cores()
    stale = [
        f"{name} was {then}, and is {now}"
        for name, then, now in (
            ("the kind of device", found.device_type, device_type),
            ("the number of devices or cores", found.devices, devices),
            ("torch", found.torch, torch.__version__),
        )
        if str(then) != str(now)
    ]
    if stale:
        yield Finding("calibration", LIMITED, f"{path} is out of date: {'; '.join(stale)}", fix)
    else:
        yield Finding("calibration", WORKS, f"{path} is of this machine")


@click.command(
    "doctor",
    cls=Command,
    short_help="what works on this machine, and what will not?",
    epilog="Example: zgraph doctor --directory /scratch",
)
@click.option("--directory", type=PATH, default=DEFAULT_PATH, help="where state would be offloaded to")
@json_option("what was found")
def command(directory: Path, *, as_json: bool) -> bool:
    """Look at this machine, try what zgraph needs of it, and print one block to paste into a question: versions,
    devices, limits, what works, what is limited and what will not work, each with the fix. It names neither the user
    nor the machine.

    Exits with status 1 if something will not work.
    """
    found = examine(directory)
    click.echo(json.dumps(found.as_dict()) if as_json else found)
    return found.works
