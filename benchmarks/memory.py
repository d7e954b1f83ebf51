"""What a process holds: bytes it allocated, and bytes the kernel gave it.

The two differ by what the allocator keeps after a free, which for some peers is as much as the tensors themselves, so
both are measured. Allocated bytes come from ``malloc_counter.c``, which has to be in place before the interpreter
starts: ``load_malloc_counter`` compiles it and starts the program anew. Resident bytes come from ``/proc/self``; pages
of files are not among them.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_DIRECTORY_VARIABLE = "ZGRAPH_BENCH_COUNTER_DIRECTORY"
_PRELOAD_VARIABLE = "ZGRAPH_BENCH_OUTER_LD_PRELOAD"


def compile_malloc_counter(directory: Path) -> Path:
    """Compile the counter into ``directory``; its path.

    Raises:
        RuntimeError: there is no C compiler, or it refused; with its output.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(
            f"{compiler[0]} not found: bytes are counted by a small C library, so set CC to a C compiler"
        )
    source, library = Path(__file__).with_name("malloc_counter.c"), directory / "malloc_counter.so"
    command = [*compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return library


def load_malloc_counter(environment: dict[str, str]) -> None:
    """Return with the counter loaded and ``environment`` set; the first call starts the program anew to get there."""
    directory = os.environ.pop(_DIRECTORY_VARIABLE, None)
    if directory is None:
        directory = tempfile.mkdtemp(prefix="zgraph-bench-")
        try:
            library = compile_malloc_counter(Path(directory))
        except RuntimeError:
            shutil.rmtree(directory)
            raise
        outer = os.environ.get("LD_PRELOAD", "")
        started_anew = {
            _DIRECTORY_VARIABLE: directory,
            _PRELOAD_VARIABLE: outer,
            "LD_PRELOAD": f"{library}:{outer}" if outer else str(library),
        }
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **environment, **started_anew})
    shutil.rmtree(directory)  # the library stays mapped
    outer = os.environ.pop(_PRELOAD_VARIABLE)
    # Compilers that a peer starts are none of our business.
    if outer:
        os.environ["LD_PRELOAD"] = outer
    else:
        del os.environ["LD_PRELOAD"]


@dataclass(frozen=True)
class Held:
    """Bytes of one process above its baseline; the peaks are since ``Meter.restart_peaks``."""

    live_bytes: int
    resident_bytes: int
    live_peak_bytes: int
    resident_peak_bytes: int


class Meter:
    """Measures the calling process against what it held when the meter was made.

    Of memory that ranks share, each counts its own part: that is allocated, and what is resident of the others' is
    theirs, as a control group counts it.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.malloc_trim(0)  # or what was freed before would be taken again, and be no more than it was
        self._library.malloc_counter_live.restype = ctypes.c_long
        self._library.malloc_counter_peak.restype = ctypes.c_long
        self.baseline_live_bytes = int(self._library.malloc_counter_live())
        self.baseline_resident_bytes = _taken_bytes("VmRSS")
        self.restart_peaks()

    def restart_peaks(self) -> None:
        """Let both peaks start from what is held now."""
        Path("/proc/self/clear_refs").write_text("5")  # 5 sets VmHWM to VmRSS
        self._library.malloc_counter_restart_peak()

    def read(self) -> Held:
        """What is held now, and the peaks."""
        sharing = sys.modules.get("zgraph.shared_memory")  # a peer of zgraph's may have nothing of it
        mine, others = sharing.shared_bytes() if sharing is not None else (0, 0)
        others = min(others, max(_status_bytes("RssShmem") - mine, 0))
        return Held(
            live_bytes=int(self._library.malloc_counter_live()) - self.baseline_live_bytes + mine,
            resident_bytes=_taken_bytes("VmRSS") - self.baseline_resident_bytes - others,
            live_peak_bytes=int(self._library.malloc_counter_peak()) - self.baseline_live_bytes + mine,
            resident_peak_bytes=_taken_bytes("VmHWM") - self.baseline_resident_bytes - others,
        )


def _taken_bytes(key: str) -> int:
    """What is resident, or was, but pages of files: those of libraries come and go as the kernel likes."""
    return _status_bytes(key) - _status_bytes("RssFile")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: resident memory is measured on Linux only")
