"""What is around zgraph on this machine, in words: versions, processors, memory, devices, links, disk and limits.

These are facts, each a line that can be pasted into a question; ``zgraph.doctor`` judges them. A fact that cannot be
found out is left out or says why, since a machine that is asked about is often one where something is broken. Nothing
in them names the user or the machine.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from zgraph.codegen.library import cache_directory, find_compiler
from zgraph.errors import first_line
from zgraph.plans import show_bytes

Facts = dict[str, str]
"""Name -> value, both to be read."""

PACKAGES = ("torch", "triton", "numpy", "networkx", "sympy", "click", "rich", "zgraph-compiler")

_VARIABLES = re.compile(
    r"(ZGRAPH|OMP|MKL|KMP|GOMP|NCCL|GLOO|TORCH|PYTORCH|CUDA|HIP)_\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
    r"|CXX|XDG_CACHE_HOME|TMPDIR|LD_PRELOAD|MALLOC_\w+"
)
_SECONDS = 20
"""That a program that is asked may take."""

CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

LIMITS: Mapping[str, int] = {
    "open files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "locked memory": resource.RLIMIT_MEMLOCK,
    "address space": resource.RLIMIT_AS,
    "file size": resource.RLIMIT_FSIZE,
    "stack": resource.RLIMIT_STACK,
}


def told(fact: Callable[[], str]) -> str:
    """What a function says, or why it cannot."""
    try:
        return fact()
    except Exception as error:  # noqa: BLE001 -- what is broken is what is asked about
        return f"not known: {type(error).__name__}: {first_line(error)}"


def without_home(text: str) -> str:
    """A text as it may be shown to others: it does not say whose home a path lies in."""
    home = os.path.expanduser("~")
    return re.sub(rf"{re.escape(home)}(?=[^\w.-]|$)", "~", text) if len(home) > 1 else text


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def said_by(*command: str) -> str:
    """What a program prints; nothing if there is no such program, or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


# Of each kind


def versions() -> Facts:
    """Python, the packages that zgraph stands on, the compiler and the system."""
    compiler = find_compiler()
    found = {"python": f"{platform.python_version()} ({platform.python_implementation()})"}
    found |= {name.removesuffix("-compiler"): installed(name) or "not installed" for name in PACKAGES}
    found["torch"] += f", built for CUDA {torch.version.cuda}" if torch.version.cuda else ", built without CUDA"
    found["compiler"] = "none" if compiler is None else (said_by(compiler, "--version").splitlines() or [compiler])[0]
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    return found


def processors() -> Facts:
    """The processor, how many of its cores this process may use, and how many threads it will."""
    model = re.search(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    quota = cores_of_group()
    flags = set((re.search(r"^flags\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE) or [""])[0].split())
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return {
        "processor": (model[1] if model else platform.processor() or "not known") + "".join(f", {v}" for v in vectors),
        "cores": f"{os.cpu_count()}, of which this process may use {len(os.sched_getaffinity(0))}"
        + ("" if quota is None else f", for as much time as {quota:g} would have"),
        "threads": f"{torch.get_num_threads()} in an operator, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def memory() -> Facts:
    """Memory of the machine, what control groups leave of it, and shared memory."""
    sizes = {
        name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    }
    found = {}
    if "MemTotal" in sizes:
        free = show_bytes(sizes.get("MemAvailable", 0))
        found["memory"] = f"{show_bytes(sizes['MemTotal'])}, {free} of it available"
        found["swap"] = show_bytes(sizes.get("SwapTotal", 0))
    limit = memory_of_group()
    found["control group"] = "no limit" if limit is None else f"at most {show_bytes(limit)}"
    found["/dev/shm"] = told(lambda: _room("/dev/shm"))
    return found


def devices() -> Facts:
    """GPUs, their driver and what connects them."""
    if not torch.cuda.is_available():
        there = gpus_of_driver()
        return {"GPUs": f"none that torch can use, {len(there)} that the driver has" if there else "none"}
    found = {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free = told(lambda index=index: show_bytes(torch.cuda.mem_get_info(index)[0]))  # type: ignore[misc]
        size = f"{show_bytes(about.total_memory)}, {free} of it free"
        found[f"GPU {index}"] = f"{about.name}, {size}, compute capability {about.major}.{about.minor}"
    found["driver"] = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    found["NCCL"] = told(lambda: ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    topology = said_by("nvidia-smi", "topo", "-m")
    if len(found) > 3 and topology:
        found["links"] = "\n" + re.sub(r"\x1b\[[0-9;]*m", "", topology).partition("\n\n")[0]
    return found


def links() -> Facts:
    """What carries messages between ranks: backends, networks."""
    built = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    found = {"backends": ", ".join(name for name, is_there in built.items() if dist.is_available() and is_there())}
    shown = []
    for name in interfaces():
        speed = _read(f"/sys/class/net/{name}/speed")
        rate = f" {int(speed) / 1000:g} Gbit/s" if speed.isdecimal() and int(speed) else ""
        shown.append(f"{name} {_read(f'/sys/class/net/{name}/operstate') or 'unknown'}{rate}")
    found["networks"] = ", ".join(shown) or "none"
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    found["InfiniBand"] = ", ".join(adapters) or "none"
    return found


def disk(directory: str | Path) -> Facts:
    """The file systems of the directory that state is offloaded to, and of the kernels that are kept."""
    kept = cache_directory()
    sizes = [path.stat().st_size for path in kept.glob("*.so")]
    return {
        without_home(str(directory)): told(lambda: f"{file_system(directory)}, {_room(directory)}"),
        "kernels": f"{without_home(str(kept))}, {len(sizes)} kept, {show_bytes(sum(sizes))}",
    }


def limits() -> Facts:
    """What the system lets this process have: ``ulimit``, the soft limits."""
    shown = {}
    for name, limit in LIMITS.items():
        most = soft_limit(limit)
        is_count = name in ("open files", "processes")
        shown[name] = "unlimited" if most is None else str(most) if is_count else show_bytes(most)
    return shown


def environment() -> Facts:
    """Variables that change what torch and zgraph do; of the address of another machine, that there is one."""
    found = {name: without_home(os.environ[name]) for name in sorted(os.environ) if _VARIABLES.fullmatch(name)}
    address = found.get("MASTER_ADDR", "localhost")
    return found if address in ("localhost", "127.0.0.1", "::1") else {**found, "MASTER_ADDR": "that of a machine"}


# Which judgements ask, too


def soft_limit(limit: int) -> int | None:
    """Of a resource; None if there is none."""
    most, _ = resource.getrlimit(limit)
    return None if most == resource.RLIM_INFINITY else most


def interfaces() -> list[str]:
    """Names of the networks that this machine is part of."""
    return sorted(os.listdir("/sys/class/net")) if os.path.isdir("/sys/class/net") else []


def gpus_of_driver() -> list[str]:
    """NVIDIA GPUs that the driver shows, whether torch can use them or not."""
    return said_by("nvidia-smi", "-L").splitlines() or sorted(map(str, Path("/proc/driver/nvidia/gpus").glob("*")))


def free_bytes(directory: str | Path) -> int:
    """Room for files of this user.

    Raises:
        OSError: there is no such directory.
    """
    about = os.statvfs(directory)
    return about.f_bavail * about.f_frsize


def file_system(directory: str | Path) -> str:
    """The kind of file system that a directory lies in (proc_pid_mountinfo(5)).

    Raises:
        OSError: there is no such directory.
    """
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in _read("/proc/self/mountinfo").splitlines()]
    return next((mount[mount.index("-") + 1] for mount in mounts if mount[2] == number), "unknown")


def _room(directory: str | Path) -> str:
    about = os.statvfs(directory)
    return f"{show_bytes(about.f_blocks * about.f_frsize)}, {show_bytes(free_bytes(directory))} of it free"


def cores_of_group() -> float | None:
    """How many cores' time the control groups of this process leave it; None for no limit."""
    found = [float(quota) / float(period) for quota, period in _quotas() if quota not in ("max", "-1")]
    return min(found, default=None)


def _quotas() -> Iterator[tuple[str, str]]:
    for group in _groups("cpu"):
        both = _read(group / "cpu.max").split()
        if len(both) == 2:
            yield both[0], both[1]
        old = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if all(old):
            yield old


def memory_of_group() -> int | None:
    """Bytes that the control groups of this process leave it; None for no limit."""
    told = [_read(group / name) for group in _groups("memory") for name in ("memory.max", "memory.limit_in_bytes")]
    found = [
        int(text) for text in told if text.isdecimal() and int(text) < 2**60
    ]  # more is how v1 says that it is none
    return min(found, default=None)


def _groups(controller: str) -> tuple[Path, ...]:
    """Directories of the control groups that this process is in, of version 2 and of version 1 (cgroups(7))."""
    found: list[Path] = []
    for line in _read(OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = CONTROL_GROUPS
        elif controller in controllers.split(","):
            root = CONTROL_GROUPS / controllers
            root = root if root.is_dir() else CONTROL_GROUPS / controller
        else:
            continue
        own = root / path.lstrip("/")
        # A container often sees its own group as the root.
        found += [own, *(parent for parent in own.parents if root in (parent, *parent.parents)), root]
    return tuple(dict.fromkeys(found))
