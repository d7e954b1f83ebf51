"""Compare what zgraph predicts of published training steps with what was measured.

    python benchmarks/accuracy.py --published FILE.csv                 tables: rows by source, medians by class
    python benchmarks/accuracy.py --published FILE.csv --trust A       only the best documented rows
    python benchmarks/accuracy.py --published FILE.csv --json OUT      and every row as one JSON object a line
    python benchmarks/accuracy.py --published FILE.csv --markdown DOC  and the tables into DOC, between its marks
    python benchmarks/accuracy.py --published FILE.csv --plot OUT.svg  and predicted over measured
    python benchmarks/accuracy.py --here                               steps on this machine: see benchmarks/here.py

FILE.csv is any collection with the columns of ``peers_predicted.COLUMNS``. Seconds are told as tokens per second and
device, bytes as GiB of what the allocator reserved or what was live, whichever was published. What is not predicted is
counted by reason. docs/accuracy.md says how rows are predicted.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peers_predicted import Case, NotUsedError, case_of, complete, is_fitted
from predicted import Constants, predicted
from tables import FEWEST, ninth_decile, spearman, write_between_marks, write_expected
from traces import Step, steps_of


@dataclass(frozen=True)
class Result:
    """A row, predicted and measured: tokens per second and device, and GiB; None where not measured."""

    id: str
    source: str
    software: str
    machine: str
    trust: str
    is_complete: bool
    tokens_s: float
    measured_tokens_s: float | None
    peak_gib: float
    measured_peak_gib: float | None
    peak_kind: str
    step_s: float
    exposed_s: float

    @property
    def time_error(self) -> float | None:
        """Relative error of the throughput."""
        return None if self.measured_tokens_s is None else self.tokens_s / self.measured_tokens_s - 1

    @property
    def memory_error(self) -> float | None:
        """Relative error of the peak."""
        return None if self.measured_peak_gib is None else self.peak_gib / self.measured_peak_gib - 1


def read(path: Path, trust: str = "ABCD") -> tuple[list[Case], Counter[str]]:
    """The rows that can be predicted, and how many cannot, by reason.

    Args:
        path: of the table.
        trust: grades to use.
    """
    cases: list[Case] = []
    reasons: Counter[str] = Counter()
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                case = case_of(complete(row))
            except NotUsedError as reason:
                reasons[str(reason)] += 1
                continue
            if case.trust not in trust:
                reasons[f"trust {case.trust or 'not stated'} was not asked for"] += 1
            else:
                cases.append(case)
    return cases, reasons


def results_of(cases: Sequence[Case], steps: Sequence[Step], constants: Constants | None = None) -> list[Result]:
    """What is predicted of each case."""
    found = []
    for case, step in zip(cases, steps, strict=True):
        made = predicted(case, step, constants or Constants())
        found.append(
            Result(
                case.id,
                case.source,
                case.software.name,
                case.machine,
                case.trust,
                case.is_complete,
                made.tokens_s,
                case.tokens_s,
                made.reserved_gib if case.peak_kind == "reserved" else made.live_gib,
                case.peak_gib,
                case.peak_kind,
                made.step_s,
                made.exposed_s,
            )
        )
    return found


MEASURED_ON = "published steps of other trainers on such machines"


def errors(results: Iterable[Result], what: str) -> list[float]:
    """Absolute relative errors of ``time`` or ``memory``, where it was measured."""
    values = (getattr(result, f"{what}_error") for result in results)
    return [abs(value) for value in values if value is not None]


# -- telling ----------------------------------------------------------------------------------------------------


def rows_table(results: Sequence[Result]) -> str:
    """Every row, by source."""
    lines: list[str] = []
    for source, mine in _by(results, lambda result: result.source).items():
        head = f"  {'row':9} {'software':19} {'machine':8} {'tokens/s':>9} {'measured':>9} {'error':>7}"
        lines += ["", source, f"{head}   {'GiB':>6} {'measured':>8} {'error':>7}"]
        lines += [
            f"  {r.id:9} {r.software:19} {r.machine:8} {r.tokens_s:9.0f} {_shown(r.measured_tokens_s, '9.0f')} "
            f"{_shown(r.time_error, '+7.1%')}   {_shown(r.peak_gib if r.measured_peak_gib else None, '6.1f')} "
            f"{_shown(r.measured_peak_gib, '8.1f')} {_shown(r.memory_error, '+7.1%')}"
            + ("" if r.is_complete else "  network not stated")
            for r in mine
        ]
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    width = int("".join(c for c in form.split(".")[0] if c.isdigit()))
    return " " * width if value is None else format(value, form)


def _by(results: Sequence[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(key(result), []).append(result)
    return found


def summary(results: Sequence[Result], name: str) -> list[str]:
    """One line of a table: errors of some results, and how well they are ranked."""
    cells = [name]
    for what in ("time", "memory"):
        found = errors(results, what)
        cells += [str(len(found))]
        cells += [f"{statistics.median(found):.1%}", f"{ninth_decile(found):.1%}"] if found else ["", ""]
    rank = spearman([(r.tokens_s, r.measured_tokens_s) for r in results if r.measured_tokens_s is not None])
    memory = spearman([(r.peak_gib, r.measured_peak_gib) for r in results if r.measured_peak_gib is not None])
    return [*cells, "" if rank is None else f"{rank:.3f}", "" if memory is None else f"{memory:.3f}"]


HEAD = ["", "rows", "median", "90 %", "rows", "median", "90 %", "rank", "rank"]


def tables(results: Sequence[Result]) -> list[tuple[str, list[list[str]]]]:
    """Errors of all, by class and by source: titles and lines."""
    complete_rows = [r for r in results if r.is_complete]
    of_all = [
        summary([r for r in complete_rows if r.trust == "A"], "trust A, complete"),
        summary(complete_rows, "complete"),
        summary([r for r in results if not r.is_complete], "network not stated"),
    ]
    by_class = _by(results, lambda r: r.software + ("" if r.is_complete else ", network not stated"))
    return [
        ("All", of_all),
        ("By class", [summary(mine, name) for name, mine in sorted(by_class.items())]),
        ("By machine", [summary(mine, name) for name, mine in sorted(_by(results, lambda r: r.machine).items())]),
        ("By source", [summary(mine, name) for name, mine in _by(results, lambda r: r.source).items()]),
    ]


def as_text(results: Sequence[Result]) -> str:
    """The tables for a terminal."""
    lines = []
    for title, found in tables(results):
        lines += ["", f"{title:44} {'throughput':>21} {'peak memory':>23}   {'rank of each':>12}"]
        lines += [_line(HEAD), *map(_line, found)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    name, *rest = cells
    widths = (6, 7, 7, 8, 7, 7, 8, 8)
    return f"{name[-44:]:44}" + "".join(f"{cell:>{width}}" for cell, width in zip(rest, widths, strict=True))


def as_markdown(results: Sequence[Result], reasons: Counter[str]) -> str:
    """The tables for a document."""
    lines = []
    for title, found in tables(results):
        head = [title, "rows", "throughput, median", "90th percentile", "rows", "memory, median", "90th percentile"]
        lines += ["| " + " | ".join([*head, "rank, throughput", "rank, memory"]) + " |", "|" + " --- |" * 9]
        lines += ["| " + " | ".join(cells) + " |" for cells in found] + [""]
    lines += ["| not predicted | rows |", "| --- | --- |"]
    lines += [f"| {reason} | {count} |" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def plot(results: Sequence[Result]) -> str:
    """Predicted over measured as an SVG: throughput on the left, memory on the right, both axes logarithmic."""
    size, gap = 300, 56
    box = f"0 0 {2 * (size + gap) + 20} {size + 2 * gap}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="sans-serif" font-size="11">']
    classes = sorted({r.software for r in results})
    colours = {name: f"hsl({360 * i // max(len(classes), 1)},65%,45%)" for i, name in enumerate(classes)}
    panels = (
        ("tokens per second and device", [(r, r.measured_tokens_s, r.tokens_s) for r in results]),
        ("GiB at the peak", [(r, r.measured_peak_gib, r.peak_gib) for r in results]),
    )
    for column, (title, points) in enumerate(panels):
        known = [(r, measured, value) for r, measured, value in points if measured is not None]
        if not known:
            continue
        low = math.log10(min(min(m, v) for _, m, v in known) / 1.3)
        high = math.log10(max(max(m, v) for _, m, v in known) * 1.3)
        left, top = gap + column * (size + gap), 20

        def at(value: float, low: float = low, high: float = high) -> float:
            return size * (math.log10(value) - low) / (high - low)

        parts.append(f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#888"/>')
        parts.append(
            f'<line x1="{left}" y1="{top + size}" x2="{left + size}" y2="{top}" stroke="#888" stroke-dasharray="4"/>'
        )
        for value in (mantissa * 10**power for power in range(7) for mantissa in (1, 2, 5)):
            if low < math.log10(value) < high:
                x, y = left + at(value), top + size - at(value)
                parts.append(f'<text x="{x:.1f}" y="{top + size + 14}" text-anchor="middle">{value}</text>')
                parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
        parts.append(f'<text x="{left + size / 2}" y="{top + size + 32}" text-anchor="middle">measured, {title}</text>')
        parts += [
            f'<circle cx="{left + at(m):.1f}" cy="{top + size - at(v):.1f}" r="3" fill="{colours[r.software]}" '
            f'fill-opacity="0.7"><title>{r.id}</title></circle>'
            for r, m, v in known
        ]
    for i, name in enumerate(classes):
        x, y = gap + (i % 4) * 160, size + 20 + 52 + 14 * (i // 4)
        parts.append(
            f'<circle cx="{x}" cy="{y - 4}" r="3" fill="{colours[name]}"/><text x="{x + 8}" y="{y}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    """Predict a collection, and tell how far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, metavar="FILE", help="a collection of measurements")
    parser.add_argument("--here", action="store_true", help="steps on this machine instead: benchmarks/here.py")
    parser.add_argument(
        "--trust", default="ABCD", metavar="GRADES", help="use only rows of these grades, such as A or AB"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every row here, one JSON object a line")
    parser.add_argument("--markdown", type=Path, metavar="DOC", help="write the tables between the marks of a document")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw predicted over measured, as SVG")
    parser.add_argument(
        "--write",
        action="store_true",
        help="let plans on GPUs quote the errors of complete rows that were not fitted",
    )
    parser.add_argument("--processes", type=int, default=2, help="how many capture steps at once (default: 2)")
    options, others = parser.parse_known_args()
    if options.here:
        given = [argument for argument in sys.argv[1:] if argument != "--here"]
        return subprocess.run([sys.executable, Path(__file__).with_name("here.py"), *given], check=False).returncode
    if others or options.published is None:
        parser.error(f"unknown: {' '.join(others)}" if others else "give --published FILE, or --here")
    cases, reasons = read(options.published, options.trust)
    steps, failed = steps_of(cases, options.processes)
    reasons.update(failed.values())
    cases = [case for case in cases if case.id not in failed]
    results = results_of(cases, steps)
    print(rows_table(results))
    print(as_text(results))
    print(f"\n{len(results)} rows were predicted; {sum(reasons.values())} were not used:")
    for reason, count in reasons.most_common():
        print(f"  {count:4}  {reason}")
    if options.json:
        extra = ({"time_error": r.time_error, "memory_error": r.memory_error} for r in results)
        lines = (json.dumps(asdict(result) | more) for result, more in zip(results, extra, strict=True))
        options.json.write_text("".join(f"{line}\n" for line in lines))
    if options.markdown:
        write_between_marks(options.markdown, as_markdown(results, reasons), "accuracy")
    if options.write:
        unseen = [r for case, r in zip(cases, results, strict=True) if r.is_complete and not is_fitted(case)]
        by_kind = {
            kind: errors([r for r in unseen if r.peak_kind == name], "memory")
            for kind, name in (("live", "allocated"), ("reserved", "reserved"))
        }
        rows = Counter(r.machine for r in unseen)
        compared = sorted(machine for machine, count in rows.items() if count >= FEWEST)
        write_expected("cuda", MEASURED_ON, compared, time=errors(unseen, "time"), **by_kind)
    if options.plot:
        options.plot.write_text(plot(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
