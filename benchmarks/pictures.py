"""Draw the lanes of a step as zgraph's timeline plays it, before and after `Schedule`: docs/lanes.svg.

Nothing is measured, and nothing runs: the step of a few blocks is captured on meta, rewritten for ranks that are not
there, and played on the cost model of a machine that need not be there either.

    python benchmarks/pictures.py [FILE.svg]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from zgraph.captures import Captures
from zgraph.config import Config
from zgraph.passes import Schedule, default_passes
from zgraph.pipeline import Pass, run
from zgraph.plans import show_s
from zgraph.program import Mesh, Phase, Program, phase_of
from zgraph.timeline import COMPUTE, Timeline, play
from zgraph.which_hardware import find_hardware

WORLD, BLOCKS, WIDTH, ROWS, HARDWARE = 8, 6, 4096, 4096, "h100"
LEFT, RIGHT, LANE, GAP = 90, 870, 26, 8
COLOURS = {Phase.FORWARD: "#4c78a8", Phase.BACKWARD: "#f58518", Phase.UPDATE: "#54a24b"}
WAIT = "#c0c0c0"


class Blocks(nn.Module):
    """Feed-forward layers, each added to what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(BLOCKS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of rows of shape (rows, WIDTH)."""
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def timelines() -> dict[str, Timeline]:
    """The step by the pass that it was played after: the one before Schedule, and Schedule."""
    hardware, config, mesh = find_hardware(HARDWARE), Config(zero=3, precision="bf16"), Mesh(WORLD)
    with torch.device("meta"):
        model = Blocks()
        batch = torch.empty(ROWS, WIDTH)
    captures = Captures(model, torch.optim.AdamW(model.parameters()), ((batch,), {}))
    captured = captures.captured(config, captures.num_blocks)
    found: dict[str, Timeline] = {}
    last: list[tuple[str, Program]] = []

    def watch(p: Pass | None, program: Program) -> None:
        if isinstance(p, Schedule):
            before, unscheduled = last[-1]
            found[f"after {before}"] = play(unscheduled, hardware)
            found["after Schedule"] = play(program, hardware)
        elif p is not None and not found:
            last[:] = [(p.name, program.clone())]

    run(default_passes(config, mesh, hardware=hardware), captured, prove=False, watch=watch)
    return found


def draw(found: dict[str, Timeline]) -> str:
    """Both timelines on one scale."""
    longest = max(timeline.step_s for timeline in found.values())
    height = len(found) * (2 * LANE + 2 * GAP + 26) + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {RIGHT + 20} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{RIGHT + 20}" height="{height}" fill="white"/>',
    ]
    top = 6.0
    for name, timeline in found.items():
        exposed = timeline.exposed_s / timeline.step_s
        title = f"{name}: {show_s(timeline.step_s)}, {exposed:.0%} of it waiting for links"
        title += f" (predicted, {WORLD} x {HARDWARE})"
        lines.append(f'<text x="{LEFT}" y="{top + 14:.0f}" font-weight="bold">{title}</text>')
        lanes = [COMPUTE, *sorted({event.lane for event in timeline.events} - {COMPUTE})]
        for index, lane in enumerate(lanes):
            y = top + 22 + index * (LANE + GAP)
            label = "computing" if lane == COMPUTE else "links"
            lines.append(f'<text x="6" y="{y + LANE / 2 + 4:.0f}">{label}</text>')
            lines += _bars(timeline, lane, y, (RIGHT - LEFT) / longest)
        top += 22 + len(lanes) * (LANE + GAP) + GAP
    legend = {**{phase.value: colour for phase, colour in COLOURS.items()}, "waiting": WAIT}
    for index, (name, colour) in enumerate(legend.items()):
        x = LEFT + 110 * index
        lines.append(f'<rect x="{x}" y="{top:.0f}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="{top + 11:.0f}">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bars(timeline: Timeline, lane: str, y: float, scale: float) -> Iterator[str]:
    for event in timeline.events:
        width = (event.end_s - event.start_s) * scale
        if event.lane == lane and width >= 0.05:
            phase = phase_of(event.node)
            is_wait = lane == COMPUTE and "wait" in str(event.node.target)
            colour = WAIT if is_wait or phase is None else COLOURS[phase]
            x = LEFT + event.start_s * scale
            place = f'x="{x:.2f}" y="{y:.0f}" width="{width:.2f}" height="{LANE}"'
            yield f'<rect {place} fill="{colour}" stroke="white" stroke-width="0.3"/>'


def main(path: Path) -> None:
    """Draw into a file."""
    path.write_text(draw(timelines()))
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "lanes.svg")
