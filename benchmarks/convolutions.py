"""What a convolution works in on a CPU beside its operands and results, beside what is said of it.

    python benchmarks/convolutions.py

Bytes are those that a call allocated at most and had let go of when it returned (``benchmarks/memory.py``). The exit
status is 1 if one took more than ``zgraph.footprint.convolution_bytes`` says, and a page for the C library's own notes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from memory import Meter, load_malloc_counter

from zgraph.footprint import convolution_bytes
from zgraph.tiers import PAGE

aten = torch.ops.aten


class Case(NamedTuple):
    """Images of shape (batch, channels, size, size), and square weights."""

    batch: int
    channels: int
    made: int
    size: int
    kernel: int = 3
    groups: int = 1
    stride: int = 1
    is_transposed: bool = False


CASES = (
    Case(8, 64, 64, 32), Case(8, 3, 64, 32), Case(8, 64, 64, 32, kernel=1), Case(8, 64, 128, 32, stride=2),
    Case(8, 64, 64, 32, groups=64), Case(2, 256, 256, 56), Case(8, 32, 32, 32), Case(16, 48, 48, 24, kernel=5),
    Case(8, 17, 17, 32), Case(8, 1, 1, 28), Case(64, 1, 8, 28), Case(8, 64, 128, 32, kernel=1, stride=2),
    Case(8, 512, 2048, 7, kernel=1), Case(4, 64, 64, 16, kernel=4, stride=2, is_transposed=True),
    Case(4, 20, 12, 16, stride=2, is_transposed=True), Case(8, 24, 40, 20, kernel=5, groups=4), Case(8, 8, 8, 32),
)  # fmt: skip


def scratch_bytes(meter: Meter, call: Callable[[], Any]) -> int:
    """Of a call that has run before, what it allocates at most beside its results."""
    call()
    meter.restart_peaks()
    results = call()
    read = meter.read()
    del results
    return read.live_peak_bytes - read.live_bytes


def main() -> int:
    """Measure all cases."""
    load_malloc_counter({"OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    meter, above = Meter(), 0
    print("| images, kernel, groups, stride | channels | forward | said | backward | said |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(case.batch, case.channels, case.size, case.size).to(memory_format=layout)
            num = (case.channels, case.made) if case.is_transposed else (case.made, case.channels)
            w = torch.randn(num[0], num[1] // case.groups, case.kernel, case.kernel)
            w = w.to(memory_format=layout)
            how = ([case.stride] * 2, [case.kernel // 2] * 2, [1, 1], case.is_transposed, [0, 0], case.groups)
            y = aten.convolution.default(x, w, torch.randn(case.made), *how)
            gradient = torch.randn_like(y)
            calls = (
                lambda x=x, w=w, how=how: aten.convolution.default(x, w, None, *how),
                lambda x=x, w=w, g=gradient, how=how, made=case.made: aten.convolution_backward.default(
                    g, x, w, [made], *how, [True] * 3
                ),
            )
            said = convolution_bytes(x, w, y, case.stride, is_transposed=case.is_transposed)
            taken = [scratch_bytes(meter, call) for call in calls]
            above = max(above, *(found - times * said for times, found in enumerate(taken, 1)))
            figures = (
                f"{taken[0] / 1e6:.2f} MB | {said / 1e6:.2f} MB | {taken[1] / 1e6:.2f} MB | {2 * said / 1e6:.2f} MB"
            )
            lies = "last" if layout is torch.channels_last else "first"
            which = f"{list(x.shape)}, {case.kernel}, {case.groups}, {case.stride}"
            print(f"| {which}{' transposed' if case.is_transposed else ''} | {lies} | {figures} |")
    return 1 if above > PAGE else 0


if __name__ == "__main__":
    sys.exit(main())
