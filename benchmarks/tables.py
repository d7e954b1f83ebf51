"""What comparisons of predictions with measurements tell, and where they write it."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path


def ninth_decile(values: Sequence[float]) -> float:
    """The 90th percentile: the smallest that nine tenths are not above."""
    return sorted(values)[max(math.ceil(0.9 * len(values)) - 1, 0)]


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation, ties sharing their mean rank (Spearman 1904); None for fewer than three pairs."""
    if len(pairs) < 3:
        return None
    first, second = (_ranks([pair[i] for pair in pairs]) for i in range(2))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return statistics.correlation(first, second)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {value: index for index, value in reversed(list(enumerate(order)))}
    counts = Counter(order)
    return [first[value] + (counts[value] - 1) / 2 for value in values]


def write_between_marks(path: Path, text: str, name: str) -> None:
    """Replace what a document has between its two marks of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


FEWEST = 10
"""Measurements that an error is told of."""


def write_expected(device_type: str, measured_on: str, machines: Sequence[str] = (), **errors: Sequence[float]) -> None:
    """Let plans for a type of device quote these relative errors (``zgraph.expected_error``), of ``FEWEST`` or more.

    Args:
        machines: for which they are quoted; for all of the type if none are named.
    """
    path = Path(str(resources.files("zgraph").joinpath("expected_error.json")))
    table = json.loads(path.read_text())
    entry: dict[str, object] = {"measured_on": measured_on, **({"machines": list(machines)} if machines else {})}
    for name, values in errors.items():
        if len(values) >= FEWEST:
            sizes = [abs(value) for value in values]
            median, most = statistics.median(sizes), ninth_decile(sizes)
            entry[name] = {"median": round(median, 4), "ninth_decile": round(most, 4), "num": len(sizes)}
    path.write_text(json.dumps({**table, device_type: entry}, indent=2) + "\n")
