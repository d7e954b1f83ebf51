"""Fit zgraph's model of GPUs to published measurements, and say how far off it is on those it was not fitted to.

    python benchmarks/fit_hardware.py --facts DIR             print parameters and errors
    python benchmarks/fit_hardware.py --facts DIR --write     and write them to zgraph/fitted.py

DIR holds xla_gemm.csv, xla_collectives.csv and published.csv. For the errors, half of the shapes (all rows of a shape
together, drawn by a fixed seed) are fitted and the other half predicted; what is written is fitted to all. The models
are zgraph.curves.Matmul, Collective and Network themselves. No row of whole training steps is read.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zgraph.curves import Collective, Matmul, Network, collective_seconds
from zgraph.fitting import fit

TARGET = Path(__file__).parents[1] / "zgraph" / "fitted.py"

GPUS = {"sm_90": "H100", "sm_100_B200": "B200", "gfx942": "MI300X"}
UNITS = {"H100": 132, "B200": 148, "MI300X": 304}
"""Streaming multiprocessors, or compute units; data sheets."""

MEMORY = {"H100": 3.35e12, "B200": 8.0e12, "MI300X": 5.3e12}
"""Bytes per second; SP-004, SP-006, SP-012. A product moves its operands at most so fast."""

MATMULS = {
    # Peak: dense, of the data sheets that SP-004, SP-006 and SP-012 quote; the highest rate of a large product is the
    # best that any shape was found to reach (GM-003, GM-005, GM-008 for bfloat16), as a part of the peak.
    ("H100", "bf16xbf16->bf16"): ("bfloat16", 2, 2, 989e12, 794.5 / 989),
    ("H100", "f32xf32->f32"): ("tf32", 4, 4, 494.5e12, 794.5 / 989),
    ("B200", "bf16xbf16->bf16"): ("bfloat16", 2, 2, 2250e12, 1745 / 2250),
    ("B200", "f32xf32->f32"): ("tf32", 4, 4, 1125e12, 1745 / 2250),
    ("B200", "f8e4m3fnxf8e4m3fn->bf16"): ("float8_e4m3fn", 1, 2, 4500e12, 1745 / 2250),
    ("MI300X", "bf16xbf16->bf16"): ("bfloat16", 2, 2, 1307e12, 668.4 / 1307),
    ("MI300X", "f32xf32->f32"): ("tf32", 4, 4, 653.7e12, 668.4 / 1307),
}
"""Left out: float8 of the H100, up to 2,593 TFLOP/s where the peak is 1,979; float8 of the MI300X, most of which ran at
100 TFLOP/s and some at 680, so two kernels; the mixed kinds of float8, which time the same kernels again."""

KINDS = {"all-gather": "all_gather", "reduce-scatter": "reduce_scatter", "all-reduce": "all_reduce"} | {
    "all-to-all": "all_to_all"
}
SMALLEST_BYTES = 16 * 1024
"""Collectives of fewer are noise in the table: 1 KiB takes up to 200 us and 64 KiB after it 12."""


@dataclass
class Errors:
    """Absolute relative errors of predictions."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ninth_decile(self) -> float:
        return statistics.quantiles(self.values, n=10)[-1] if len(self.values) > 1 else self.values[0]

    def __str__(self) -> str:
        return f"median {self.median:.1%}, 90th percentile {self.ninth_decile:.1%} of {len(self.values)} rows"


@dataclass
class Row:
    """A measurement: what identifies its shape, arguments of the model's ``seconds``, and seconds."""

    shape: tuple[Any, ...]
    arguments: tuple[Any, ...]
    seconds: float


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def halves(rows: Sequence[Row], seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Two halves by shape."""
    shapes = sorted({row.shape for row in rows})
    first = set(random.Random(seed).sample(shapes, len(shapes) // 2))
    return [row for row in rows if row.shape in first], [row for row in rows if row.shape not in first]


def significant(value: float) -> float:
    """Three digits: more are not known."""
    return float(f"{value:.3g}")


def fitted(
    rows: Sequence[Row],
    make: Callable[[Sequence[float]], Any],
    start: Sequence[float],
    bounds: Sequence[tuple[float, float]],
) -> Any:
    """The model that ``make`` makes of the best parameters."""

    def times(parameters: Sequence[float]) -> list[float]:
        model = make(parameters)
        return [model.seconds(*row.arguments) for row in rows]

    return make([significant(value) for value in fit(times, [row.seconds for row in rows], start, bounds)])


def errors(model: Any, rows: Iterable[Row]) -> Errors:
    """How far a model is off on each row."""
    return Errors([abs(model.seconds(*row.arguments) / row.seconds - 1) for row in rows])


def fit_both(
    rows: Sequence[Row],
    make: Callable[[Sequence[float]], Any],
    start: Sequence[float],
    bounds: Sequence[tuple[float, float]],
) -> tuple[Any, Errors]:
    """The model of all rows, and the errors of the model of one half on the other."""
    some, others = halves(rows)
    return fitted(rows, make, start, bounds), errors(fitted(some, make, start, bounds), others)


def fit_matmul(rows: Sequence[dict[str, str]], gpu: str, kinds: str) -> tuple[Matmul, Errors, int]:
    """The model of products on one GPU, its errors, and how many rows there are."""
    _, in_bytes, out_bytes, peak, best = MATMULS[gpu, kinds]
    measured = []
    for row in rows:
        if GPUS[row["device_key"]] == gpu and row["dtypes"] == kinds:
            shape = tuple(int(row[name]) for name in ("b", "m", "n", "k"))
            measured.append(Row(shape, shape, 2 * math.prod(shape) / (float(row["TFLOPS"]) * 1e12)))

    def make(parameters: Sequence[float]) -> Matmul:
        rate, quantisation, memory, fixed_s, ramp_k, overlap = parameters
        return Matmul(
            rate=rate,
            in_bytes=in_bytes,
            out_bytes=out_bytes,
            bytes_per_s=memory,
            fixed_s=fixed_s,
            units=UNITS[gpu],
            tile=128,
            quantisation=quantisation,
            ramp_k=ramp_k,
            overlap=overlap,
        )

    most = MEMORY[gpu]
    start = (0.9 * best * peak, 0.3, 0.6 * most, 5e-6, 100, 0.7)
    bounds = ((0.1 * peak, best * peak), (1e-3, 1), (0.1 * most, 0.95 * most), (1e-7, 3e-5), (1e-1, 1000), (1e-3, 1))
    model, error = fit_both(measured, make, start, bounds)
    return model, error, len(measured)


def fit_collective(measured: Sequence[Row], kind: str, *, mesh: bool) -> tuple[Collective, Errors]:
    """The model of one kind inside a node, as far as the rows tell: with one size of group, nothing about groups."""
    one_size = len({row.shape[0] for row in measured}) == 1

    def make(parameters: Sequence[float]) -> Collective:
        latency_s, bandwidth, ramp_s, ramp_bytes, *of_groups = parameters
        per_rank_s, small_group = of_groups or (0.0, 0.0)
        return Collective(
            latency_s=latency_s,
            per_rank_s=per_rank_s,
            bandwidth=bandwidth,
            small_group=0.0 if mesh else small_group,
            ramp_s=ramp_s,
            ramp_bytes=ramp_bytes,
            rounds=2 if kind == "all_reduce" else 1,
            mesh=mesh,
        )

    start = [1e-5, 5e10 if mesh else 4e11, 3e-5, 1e7]
    bounds = [(1e-6, 1e-3), (1e9, 2e12), (1e-7, 1e-3), (1e5, 1e9)]
    if not one_size:
        start += [1e-6, 0.5]
        bounds += [(1e-8, 1e-4), (1e-3, 0.95)]
    model, error = fit_both(measured, make, start, bounds)
    return model, error


def table_rows(rows: Sequence[dict[str, str]], device: str, collective: str) -> list[Row]:
    """Collectives of one device and kind in xla_collectives.csv that are not too small."""
    measured = []
    for row in rows:
        num_bytes = int(row["tensor_bytes(full/unsharded)"])
        if row["device_key"] == device and row["collective"] == collective and num_bytes >= SMALLEST_BYTES:
            world = int(row["group_size"])
            measured.append(Row((world, num_bytes), (num_bytes, world, world), float(row["time_us"]) * 1e-6))
    return measured


def published_all_reduces(rows: Sequence[dict[str, str]], first: int, last: int) -> list[tuple[str, str, int, Row]]:
    """Id, GPU, nodes and measurement of all-reduces with a size, of the rows from BW-first to BW-last."""
    units = {"MiB": 2**20, "GiB": 2**30}
    found = []
    for row in rows:
        family, _, number = row["id"].partition("-")
        if family == "BW" and first <= int(number) <= last:
            world = int(row["n_gpus"])
            size = row["metric"].rpartition("@ ")[2]
            num_bytes = int(size[:-3]) * units[size[-3:]]
            seconds = 2 * num_bytes * (world - 1) / world / (float(row["value"]) * 1e9)
            shape = (world, num_bytes, row["gpu"])
            found.append((row["id"], row["gpu"], int(row["n_nodes"]), Row(shape, (num_bytes, world, world), seconds)))
    return found


class Cluster:
    """All-reduce of the machines of the rows between nodes; what ``Network`` is fitted through."""

    CARDS = {"B200": 50e9, "H100": 25e9}  # noqa: RUF012
    """Bytes per second and device: "EFA 50GB/s per GPU", "8x200Gb/s per node" of 8."""

    def __init__(self, inside: dict[str, Collective], parameters: Sequence[float]) -> None:
        self.inside, self.parameters = inside, parameters

    def seconds(self, gpu: str, num_bytes: int, world: int) -> float:
        network = Network(self.CARDS[gpu], *self.parameters, reduces_in_node=True)
        return float(collective_seconds("all_reduce", self.inside[gpu], network, num_bytes, world, 8))


def fit_network(rows: Sequence[dict[str, str]], inside: dict[str, Collective]) -> tuple[Sequence[float], Errors]:
    """Efficiency, latency and filling of a network, of the B200s (4 nodes, EFA) and H100s (2 nodes, TCPXO)."""
    several = [row for row in published_all_reduces(rows, 24, 37) if row[2] > 1] + published_all_reduces(rows, 52, 57)
    measured = [Row((gpu, row.shape[1]), (gpu, *row.arguments[:2]), row.seconds) for _, gpu, _, row in several]
    start = (0.8, 1e-4, 1e-4, 1e6)
    bounds = ((0.5, 0.94), (1e-6, 1e-3), (1e-6, 1e-2), (1e4, 1e9))
    model = fitted(measured, lambda parameters: Cluster(inside, parameters), start, bounds)
    return model.parameters, errors(model, measured)


HEADER = '''"""Rates of GPUs fitted to published measurements. Written by benchmarks/fit_hardware.py, never by hand.

Each entry is fitted to all rows that its comment names; the errors are those, on one half of the shapes, of the same
model fitted to the other half.
"""

from __future__ import annotations

from zgraph.curves import Collective, Matmul
'''


def source_of(model: Matmul | Collective, indent: int) -> str:
    """The call that makes a model, without what is left at its default."""
    lines = [f"{type(model).__name__}("]
    for each in fields(model):
        value = getattr(model, each.name)
        if value != each.default:
            lines.append(f"    {each.name}={value!r},")
    return ("\n" + " " * indent).join([*lines, ")"])


def main() -> int:
    """Fit everything, print it, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=Path, required=True, metavar="DIR", help="the folder of the three tables")
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.name}")
    arguments = parser.parse_args()
    try:
        products = read(arguments.facts / "xla_gemm.csv")
        timings = read(arguments.facts / "xla_collectives.csv")
        published = read(arguments.facts / "published.csv")
    except OSError as error:
        print(f"fit_hardware.py: {error}", file=sys.stderr)
        return 2

    text = [HEADER, "MATMULS = {"]

    def add(key: tuple[str, str], model: Matmul | Collective, source: str, error: Errors, how: str) -> None:
        comment = f"{source}; {how} {error}"
        print(f"{key[0]:7} {key[1]:15} {comment}\n    {model}")
        text.append(f'    # {comment}\n    ("{key[0]}", "{key[1]}"): {source_of(model, 4)},')

    for (gpu, kinds), (dtype, *_) in MATMULS.items():
        product, error, count = fit_matmul(products, gpu, kinds)
        add((gpu, dtype), product, f"xla_gemm.csv, {count} rows {kinds}", error, "held out:")
    text += ["}", "", "COLLECTIVES = {"]

    inside = {}
    for device, gpu in GPUS.items():
        for collective, kind in KINDS.items():
            rows = table_rows(timings, device, collective)
            model, error = fit_collective(rows, kind, mesh=gpu == "MI300X")
            add((gpu, kind), model, f"xla_collectives.csv, {len(rows)} rows", error, "held out:")
            inside[gpu, kind] = model
    for gpu, first, last in (("A100", 1, 12), ("H200", 13, 19)):
        rows = [row for _, _, _, row in published_all_reduces(published, first, last)]
        model, error = fit_collective(rows, "all_reduce", mesh=False)
        add((gpu, "all_reduce"), model, f"BW-{first:03} to {last:03}", error, "held out:")
    text += ["}", ""]

    reduces = {gpu: inside[gpu, "all_reduce"] for gpu in ("H100", "B200")}
    parameters, error = fit_network(published, reduces)
    comment = f"BW-025 to 037 and BW-052 to 057, between nodes; on these rows: {error}"
    print(f"network\n    {comment}\n    {parameters}")
    names = ("NETWORK_EFFICIENCY", "NETWORK_LATENCY_S", "NETWORK_RAMP_S", "NETWORK_RAMP_BYTES")
    text += [f"# {comment}"] + [f"{name} = {value!r}" for name, value in zip(names, parameters, strict=True)]
    if arguments.write:
        TARGET.write_text("\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
