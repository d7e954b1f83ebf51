"""Draw the largest models that trained under caps on memory, peer by peer, as an SVG.

    python benchmarks/offload.py --cap 512MiB --json FILE.jsonl     once for each cap
    python benchmarks/trainable.py FILE.jsonl OUT.svg

Of each peer and cap the last line counts. Where nothing larger was killed, since none was tried, a triangle says that
it may be more. Both axes are logarithmic.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

LEFT, TOP, WIDTH, HEIGHT, LEGEND = 64, 16, 420, 300, 200
"""Of the panel, and the width of the names to the right of it."""

ACROSS = "memory that each process may add to its imports"


@dataclass(frozen=True)
class Point:
    """A model that trained.

    Attributes:
        is_least: none that is larger was killed.
    """

    cap_bytes: int
    num_parameters: int
    is_least: bool


def read(lines: Iterable[str]) -> dict[str, list[Point]]:
    """What each peer trained, by rising caps; nothing of one that trained nothing."""
    last = {(row["name"], row["cap_bytes"]): row for row in map(json.loads, lines)}
    found: dict[str, list[Point]] = {}
    for (name, cap_bytes), row in sorted(last.items(), key=lambda item: item[0][1]):
        if row["trained"] is not None:
            point = Point(cap_bytes, row["trained"]["num_parameters"], row["killed"] is None)
            found.setdefault(name, []).append(point)
    return found


def draw(found: dict[str, Sequence[Point]]) -> str:
    """The picture; there is at least one point."""
    points = [point for mine in found.values() for point in mine]
    caps = sorted({point.cap_bytes for point in points})
    sizes = [point.num_parameters for point in points]
    across = _Axis(caps[0] / 1.3, caps[-1] * 1.3, LEFT, LEFT + WIDTH)
    up = _Axis(min(sizes) / 1.3, max(sizes) * 1.3, TOP + HEIGHT, TOP)
    box = f"0 0 {LEFT + WIDTH + LEGEND} {TOP + HEIGHT + 44}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="sans-serif" font-size="11">',
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="white" stroke="#888"/>',
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">{ACROSS}</text>',
        f'<text transform="translate(14,{TOP + HEIGHT / 2}) rotate(-90)" text-anchor="middle">parameters</text>',
    ]
    for cap_bytes in caps:
        x = across.at(cap_bytes)
        parts.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{_shown(cap_bytes)}</text>')
    for num in (mantissa * 10**power for power in range(5, 13) for mantissa in (1, 2, 5)):
        if up.low < num < up.high:
            y = up.at(num)
            parts += [
                f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + WIDTH}" y2="{y:.1f}" stroke="#ddd"/>',
                f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{num / 1e6:g}M</text>',
            ]
    ordered = sorted(found, key=lambda name: -found[name][-1].num_parameters)
    for index, name in enumerate(ordered):
        colour = f"hsl({360 * index // len(found)},65%,42%)"
        places = [(across.at(point.cap_bytes), up.at(point.num_parameters)) for point in found[name]]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for point, (x, y) in zip(found[name], places, strict=True):
            least = "at least " if point.is_least else ""
            said = f"{least}{point.num_parameters / 1e6:.1f}M in {_shown(point.cap_bytes)}"
            parts.append(f"{_mark(x, y, colour, point.is_least)}<title>{escape(name)}: {said}</title></path>")
        x, y = LEFT + WIDTH + 16, TOP + 10 + 18 * index
        parts.append(f'{_mark(x, y, colour, False)}</path><text x="{x + 10}" y="{y + 4}">{escape(name)}</text>')
    if any(point.is_least for point in points):
        x, y = LEFT + WIDTH + 16, TOP + 10 + 18 * len(found)
        parts.append(f'{_mark(x, y, "#444", True)}</path><text x="{x + 10}" y="{y + 4}">no larger one was tried</text>')
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis, from where its low end is drawn to where its high end is."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)


def _mark(x: float, y: float, colour: str, is_least: bool) -> str:
    """A triangle that points up, or a diamond; the tag is left open."""
    shape = "m0,-6 l5,9 h-10 z" if is_least else "m0,-4 l4,4 l-4,4 l-4,-4 z"
    return f'<path transform="translate({x:.1f},{y:.1f})" d="M0,0 {shape}" fill="{colour}">'


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:g} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:g} MiB"


def main(lines: Path, picture: Path) -> None:
    """Draw one file into the other."""
    with lines.open() as file:
        picture.write_text(draw(read(file)))
    print(picture)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: trainable.py FILE.jsonl OUT.svg")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
