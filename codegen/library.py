"""C++ in a shared object: compiled once for each text, compiler, processor and OpenMP, and kept on disk.

The directory is private to the user, and what is found there is loaded only if it is what its name says.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path

from zgraph.errors import OptionError, first_line
from zgraph.files import scratch, user_cache

FLAGS = (
    "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp",
    # Neither changes a result: nobody reads errno or the flags of the floating-point unit.
    "-fno-math-errno", "-fno-trapping-math",
    # Sums of products are rounded once where the text says so, and nowhere else.
    "-ffp-contract=off",
)  # fmt: skip


@lru_cache
def find_compiler() -> str | None:
    """``$CXX``, or what is called g++ or c++; None if there is none."""
    names = (os.environ.get("CXX"), "g++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


PROBE = """extern "C" double zgraph_probe(long n, int threads, const double *x) {
    double sum = 0.0;
    #pragma omp parallel for simd num_threads(threads) reduction(+: sum)
    for (long i = 0; i < n; i++) sum += __builtin_sqrt(x[i]);
    return sum;
}
"""
"""What every kernel needs: a compiler, a linker, OpenMP, and a place that libraries load from."""


@lru_cache(maxsize=1)
def problem() -> str | None:
    """Why kernels cannot be compiled here; None where they can."""
    try:
        load(PROBE)
    except OptionError as error:
        return error.what
    return None


@lru_cache(maxsize=256)
def load(source: str) -> ctypes.CDLL:
    """The library of a text.

    Raises:
        OptionError: there is no compiler, or it refuses, or what it makes cannot be kept or loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OptionError("there is no C++ compiler", fix="install g++, or give kernels='eager'")
    try:
        return _load(source, compiler, cache_directory())
    except OSError as error:  # a disk that is full, or one that nothing may run from
        raise OptionError(
            f"kernels cannot be kept or loaded: {first_line(error)}",
            fix="set XDG_CACHE_HOME to a directory that libraries can be loaded from, or give kernels='eager'",
        ) from error


def _load(source: str, compiler: str, directory: Path) -> ctypes.CDLL:
    openmp = _openmp()
    # Of the OpenMP it is the name that a library asks for as it is loaded.
    about = "\n".join([source, *FLAGS, compiler, _version(compiler), _processor(), *(Path(p).name for p in openmp)])
    key = hashlib.sha256(about.encode()).hexdigest()[:32]
    for kept in sorted(directory.glob(f"{key}-*.so")):
        with suppress(FileNotFoundError):  # another rank has found the same wrong with it
            if kept.stem.split("-")[1] == _digest(kept):
                return ctypes.CDLL(str(kept))
            kept.unlink()  # cut off as a disk filled up, say
    with scratch(directory) as place:
        text, made = place / "kernels.cpp", place / "kernels.so"
        text.write_text(source)
        done = subprocess.run(
            [compiler, *FLAGS, str(text), "-o", str(made), *openmp], capture_output=True, text=True, check=False
        )
        if done.returncode:
            problem = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
            raise OptionError(f"{compiler} cannot compile kernels: {problem}", fix="give kernels='eager'")
        kept = directory / f"{key}-{_digest(made)}.so"
        made.rename(kept)  # at once, for ranks that compile the same
    return ctypes.CDLL(str(kept))


def cache_directory() -> Path:
    """``zgraph/kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, or a fresh one where that is not this user's alone."""
    try:
        place = user_cache() / "kernels"
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = place.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(place, os.W_OK):
            return place
    except (OSError, RuntimeError):
        pass  # a home that cannot be written to, or a user without one, is no reason not to train
    return _own_directory()


@lru_cache(maxsize=1)
def _own_directory() -> Path:
    """A directory that goes as the process ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch(Path(tempfile.gettempdir())))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@lru_cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@lru_cache(maxsize=1)
def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(sorted(set(re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", text, re.MULTILINE))))


def _openmp() -> list[str]:
    """The OpenMP that torch has loaded, so that the process has one pool of threads; none if it has another kind."""
    maps = Path("/proc/self/maps")
    loaded = re.search(r"\S*/libgomp[^/\s]*\.so\S*", maps.read_text()) if maps.exists() else None
    return [loaded[0]] if loaded else []
