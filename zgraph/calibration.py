"""What ``zgraph calibrate`` saved: where it is, what is in it, and the hardware that it describes.

A file is one JSON object, all times in seconds and sizes in bytes, as measured: on a CPU with the launch of operators
still in them. ``schema`` is raised when its meaning changes; a file of another schema is refused.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from zgraph import machines
from zgraph.curves import Collective, Curve, Matmul, MeasuredCollective
from zgraph.errors import StateError, first_line
from zgraph.files import beside, user_cache, writing
from zgraph.fitting import fit
from zgraph.hardware import Disk, Hardware, HostLink, LoopRates

SCHEMA = 3

Rows = list[list[float]]
"""Points: sizes, and seconds last."""

_ELEMENT_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Run:
    """What one rank measured while as many ranks as its run has measured the same.

    Attributes:
        threads: of this rank, in one operator.
        launch_s: of an operator with next to nothing to do.
        matmul: batch, m, n, k and seconds, by dtype.
        memory: bytes read and written; ``memory_in_place`` likewise.
        vector: operations, by dtype.
        transcendental: how many exponentials.
        gather: bytes read and written.
        attention: operations, by dtype.
        collectives: bytes of the full tensor, by kind.
        loops: operations, or exponentials, of zgraph's own loops in C++, by ``"operations"`` and ``"functions"``;
            nothing on a GPU, and where there is no compiler.
        reads_peers: whether ranks read each other's memory for them.
        host_link: bytes, by ``"pinned"`` and ``"pageable"``; nothing on a CPU.
        host_memory: bytes that all processors of the host read and write of its memory; nothing on a CPU.
        disk: bytes, by ``"read"`` and ``"write"``; in the run of one rank only.
    """

    threads: int
    launch_s: float
    matmul: dict[str, Rows]
    memory: Rows
    memory_in_place: Rows
    vector: dict[str, Rows]
    transcendental: Rows
    gather: Rows
    attention: dict[str, Rows]
    collectives: dict[str, Rows]
    reads_peers: bool = False
    loops: dict[str, Rows] = field(default_factory=dict)
    host_link: dict[str, Rows] = field(default_factory=dict)
    host_memory: Rows = field(default_factory=list)
    disk: dict[str, Rows] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """A machine and its measurements.

    Attributes:
        device_type: ``"cpu"`` or ``"cuda"``.
        device: name of the processor or GPU.
        devices: GPUs of the machine, or cores that its ranks may use.
        units: multiprocessors of a GPU; 1 on a CPU.
        memory_bytes: of one GPU, or of the machine.
        host_memory_bytes: of the machine.
        torch: version that was measured with.
        seconds: that measuring took.
        runs: by number of ranks.
    """

    device_type: str
    device: str
    devices: int
    units: int
    memory_bytes: int
    host_memory_bytes: int
    torch: str
    seconds: float
    runs: dict[int, Run]

    def as_dict(self) -> dict[str, Any]:
        """As plain data, as it is saved."""
        return {"schema": SCHEMA} | asdict(self) | {"runs": {str(n): asdict(run) for n, run in self.runs.items()}}

    def save(self, path: Path) -> None:
        """Write it, all or nothing.

        Raises:
            StateError: the file cannot be written.
        """
        with _writing(path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
            partial.replace(path)

    def hardware(self) -> Hardware:
        """The machine as one rank finds it, and on a CPU with ``variants`` for the other numbers of ranks."""
        several = self.runs[max(self.runs)]
        first = self.runs[min(self.runs)]
        found = {ranks: self._of_run(run, several, first) for ranks, run in self.runs.items()}
        if self.device_type == "cpu":  # ranks share the memory
            found = {n: replace(one, memory_bytes=one.memory_bytes // n) for n, one in found.items()}
        alone = found[min(found)]
        return alone if self.device_type == "cuda" else replace(alone, variants=found)

    def _without_launch(self, run: Run, rows: Rows) -> list[tuple[float, float]]:
        """Size and seconds without the host's part, of which a measurement is at least a twentieth.

        Of a GPU, whose work is recorded and played back, there is no such part.
        """
        launch_s = min(run.launch_s, *(row[-1] for row in rows)) if self.device_type == "cpu" else 0.0
        return [(size, max(seconds - launch_s, seconds / 20)) for size, seconds in rows]

    def _of_run(self, run: Run, several: Run, first: Run) -> Hardware:
        assumed = self._assumed()
        best = {name: max(2 * b * m * n * k / s for b, m, n, k, s in rows) for name, rows in run.matmul.items()}
        collectives: dict[str, Collective | MeasuredCollective] = dict(assumed.collectives)
        ranks = max(self.runs)
        for kind, rows in several.collectives.items():
            rounds = 2 if kind == "all_reduce" else 1
            moved = [(rounds * size * (ranks - 1) / ranks, seconds) for size, seconds in rows]
            collectives[kind] = MeasuredCollective(Curve.through(moved), rounds)
        # Like an all-gather, a rank receives a part from each other one; zgraph has no all-to-all to measure.
        if several.collectives:
            collectives["all_to_all"] = collectives["all_gather"]
        in_place = Curve.through(self._without_launch(run, run.memory_in_place))
        largest, longest = in_place.points[-1]
        launch_s = run.launch_s if self.device_type == "cpu" else 0.0
        link = {name: _line(rows) for name, rows in run.host_link.items()}
        return Hardware(
            name=f"{self.device_type}, calibrated",
            device_type=self.device_type,
            memory_bytes=self.memory_bytes,
            memory_bandwidth=largest / longest,
            devices_per_node=self.devices,
            launch_s=run.launch_s,
            host_memory_bytes=self.host_memory_bytes,
            host_bandwidth=_line(first.host_memory)[0] if first.host_memory else assumed.host_bandwidth,
            peak_flops=best,
            vector_flops={name: _rate(rows) for name, rows in run.vector.items()},
            matmuls=_Fitted({name: partial(self._matmul, name, rows, launch_s) for name, rows in run.matmul.items()}),
            attention={name: Curve.through(self._without_launch(run, rows)) for name, rows in run.attention.items()},
            memory=Curve.through(self._without_launch(run, run.memory)),
            memory_in_place=in_place,
            gather=Curve.through(self._without_launch(run, run.gather)),
            transcendental=Curve.through(self._without_launch(run, run.transcendental)),
            collectives=collectives,
            reads_peers=several.reads_peers,
            loops=_loop_rates(run, assumed.loops) if self.device_type == "cpu" else None,
            network=assumed.network,
            host_link=HostLink(link["pinned"][0], link["pageable"][0], link["pinned"][1])
            if link
            else assumed.host_link,
            disk=Disk(_line(first.disk["read"])[0], _line(first.disk["write"])[0], _line(first.disk["read"])[1]),
            sources=f"zgraph calibrate on {self.device} with torch {self.torch}",
        )

    def _assumed(self) -> Hardware:
        """What is not measured, such as links between nodes: of a GPU as of its preset, or of one without fast ones."""
        if self.device_type == "cpu":
            return machines.this_cpu()
        return machines.preset(machines.preset_of(self.device, self.memory_bytes) or "L40S")

    def _matmul(self, name: str, rows: Rows, launch_s: float) -> Matmul:
        """The model of products fitted to the measured ones; on a GPU with its tiles, on a CPU with ramps."""
        element = _ELEMENT_BYTES[name]
        best = max(2 * b * m * n * k / s for b, m, n, k, s in rows)
        on_gpu = self.device_type == "cuda"

        def make(parameters: Sequence[float]) -> Matmul:
            rate, bytes_per_s, fixed_s, ramp_k, overlap, first, second, packed_per_s = parameters
            common = Matmul(rate, element, element, bytes_per_s, fixed_s, ramp_k=ramp_k, overlap=overlap)
            if on_gpu:
                return replace(common, units=self.units, tile=128, quantisation=first)
            return replace(common, ramp_m=first, ramp_n=second, packed_per_s=packed_per_s)

        def times(parameters: Sequence[float]) -> list[float]:
            model = make(parameters)
            return [launch_s + model.seconds(*map(int, row[:4])) for row in rows]

        start = (best, best / 10, 1e-6, 8.0, 0.9, 0.3 if on_gpu else 2.0, 8.0, best / 10)
        ramp = (1e-1, 200.0)
        bounds = (
            (best / 3, best * 1.2),
            (best / 1e4, best * 10),
            (1e-8, 1e-3),
            (1e-1, 1000.0),
            (1e-3, 1.0),
            (1e-3, 1.0) if on_gpu else ramp,
            ramp,
            (best / 1e3, best * 10),
        )
        return make(fit(times, [row[4] for row in rows], start, bounds))


class _Fitted(Mapping[str, Matmul]):
    """Models of products by dtype, each fitted when it is first asked for: that takes a tenth of a second."""

    def __init__(self, fits: Mapping[str, Callable[[], Matmul]]) -> None:
        self._fits = fits
        self._fitted: dict[str, Matmul] = {}

    def __getitem__(self, name: str) -> Matmul:
        if name not in self._fitted:
            self._fitted[name] = self._fits[name]()
        return self._fitted[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fits

    def __iter__(self) -> Iterator[str]:
        return iter(self._fits)

    def __len__(self) -> int:
        return len(self._fits)


def _rate(rows: Rows) -> float:
    """By how much more is done in the largest measurement than in the smallest, and how much longer it takes."""
    (least, first_s), (most, last_s) = rows[0], rows[-1]
    return (most - least) / max(last_s - first_s, last_s / 20)


def _loop_rates(run: Run, assumed: LoopRates | None) -> LoopRates | None:
    """As measured; otherwise what is assumed, where a call takes as many of PyTorch's as it does there."""
    if not run.loops:
        return replace(assumed, launch_s=4 * run.launch_s) if assumed is not None else None
    return LoopRates(_rate(run.loops["operations"]), _rate(run.loops["functions"]), run.loops["operations"][0][-1])


def _line(rows: Rows) -> tuple[float, float]:
    """Rate of the largest transfer, and seconds of the smallest."""
    size, seconds = rows[-1]
    return size / seconds, rows[0][1]


def default_path() -> Path:
    """``$ZGRAPH_HARDWARE``, or ``zgraph/hardware.json`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        StateError: none of them is known.
    """
    if chosen := os.environ.get("ZGRAPH_HARDWARE"):
        return Path(chosen)
    try:
        return user_cache() / "hardware.json"
    except RuntimeError as error:
        raise StateError("this user has no home directory", fix="set ZGRAPH_HARDWARE or HOME") from error


def saved_path() -> Path | None:
    """Where this machine's calibration lies; None if there is none."""
    with suppress(StateError):  # without a home, none was saved
        path = default_path()
        return path if path.exists() else None
    return None


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that can be written, and become it."""
    with writing(path, "choose another --output"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as partial:
            yield partial


def check_writable(path: Path) -> None:
    """Find out before measuring whether the result can be saved.

    Raises:
        StateError: it cannot.
    """
    with _writing(path):
        pass


def load(path: Path) -> Hardware:
    """The hardware of a saved calibration.

    Raises:
        StateError: there is no such file, or it is not a calibration, damaged or of another version.
    """
    return read(path).hardware()


_AGAIN = "run `zgraph calibrate` to make it anew"


def read(path: Path) -> Calibration:
    """A saved calibration; raises as ``load`` does."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}", fix=_AGAIN) from error
    except ValueError as error:
        raise StateError(f"{path} is not JSON: {first_line(error)}", fix=_AGAIN) from error
    return from_dict(data, str(path))


def from_dict(data: Any, name: str) -> Calibration:
    """The calibration that ``as_dict`` gave, as plain data from ``name``; raises as ``load`` does."""
    if not isinstance(data, dict) or "schema" not in data:
        raise StateError(f"{name} is not a calibration: it has no schema", fix=_AGAIN)
    if data["schema"] != SCHEMA:
        raise StateError(f"{name} is of schema {data['schema']!r}; this zgraph reads {SCHEMA}", fix=_AGAIN)
    try:
        return _calibration(data)
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise StateError(f"{name} is damaged: {what}", fix=_AGAIN) from error


def _calibration(data: Mapping[str, Any]) -> Calibration:
    runs = {int(ranks): _run(run, f"runs.{ranks}") for ranks, run in _mapping(data["runs"], "runs").items()}
    if not runs:
        raise ValueError("runs is empty")
    for direction in ("read", "write"):
        if direction not in runs[min(runs)].disk:
            raise ValueError(f"no disk.{direction} in the run of {min(runs)} rank(s)")
    numbers = {
        name: _positive(data[name], name)
        for name in ("devices", "units", "memory_bytes", "host_memory_bytes", "seconds")
    }
    if data["device_type"] not in ("cpu", "cuda"):
        raise ValueError(f"device_type is {data['device_type']!r}")
    return Calibration(
        device_type=data["device_type"],
        device=str(data["device"]),
        devices=int(numbers["devices"]),
        units=int(numbers["units"]),
        memory_bytes=int(numbers["memory_bytes"]),
        host_memory_bytes=int(numbers["host_memory_bytes"]),
        torch=str(data["torch"]),
        seconds=numbers["seconds"],
        runs=runs,
    )


def _run(data: Any, where: str) -> Run:
    run = _mapping(data, where)

    def rows(name: str) -> Rows:
        return _rows(run[name], f"{where}.{name}", 2)

    def tables(name: str, width: int = 2) -> dict[str, Rows]:
        table = _mapping(run[name], f"{where}.{name}")
        return {key: _rows(value, f"{where}.{name}.{key}", width) for key, value in table.items()}

    return Run(
        threads=int(_positive(run["threads"], f"{where}.threads")),
        launch_s=_positive(run["launch_s"], f"{where}.launch_s"),
        matmul=tables("matmul", 5),
        memory=rows("memory"),
        memory_in_place=rows("memory_in_place"),
        vector=tables("vector"),
        transcendental=rows("transcendental"),
        gather=rows("gather"),
        attention=tables("attention"),
        collectives=tables("collectives"),
        reads_peers=_boolean(run["reads_peers"], f"{where}.reads_peers"),
        loops=tables("loops") if "loops" in run else {},  # not measured before
        host_link=tables("host_link"),
        host_memory=rows("host_memory") if run.get("host_memory") else [],  # likewise
        disk=tables("disk"),
    )


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{where} is not an object")
    return value


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{where} is {value!r}, not a positive number")
    return value


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{where} is {value!r}, not true or false")
    return value


def _rows(value: Any, where: str, width: int) -> Rows:
    if not isinstance(value, list) or not value:
        raise TypeError(f"{where} is not a list of points")
    for row in value:
        if not isinstance(row, list) or len(row) != width:
            raise TypeError(f"{where} has a point that is not {width} numbers: {row!r}")
    return [[_positive(number, where) for number in row] for row in value]
