"""From a captured step to the programs that run: one for the last micro-batch, and one for those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from zgraph.accumulation import micro_step
from zgraph.beginnings import Beginnings
from zgraph.config import Config
from zgraph.errors import CaptureError
from zgraph.hardware import Hardware
from zgraph.layout import Layout
from zgraph.passes import Levels, default_passes
from zgraph.pipeline import Pass, PassRecord, Watch, run
from zgraph.program import Mesh, Program


@dataclass(frozen=True)
class Lowered:
    """Programs after all passes.

    Attributes:
        last: runs on the last micro-batch, and updates.
        micro: runs on each one before it; None if there is only one.
        records: of the passes.
    """

    last: Program
    micro: Program | None
    records: tuple[PassRecord, ...]

    @property
    def layout(self) -> Layout:
        """The buckets, which both programs have in common."""
        assert self.last.layout is not None
        return self.last.layout

    @property
    def programs(self) -> tuple[Program, ...]:
        """Those that there are."""
        return (self.last,) if self.micro is None else (self.micro, self.last)

    def digest(self) -> bytes:
        """Equal on ranks that will issue the same operations."""
        return b"".join(program.digest() for program in self.programs)


def lower(
    captured: Program,
    config: Config,
    mesh: Mesh,
    layout: Layout | None,
    own: Sequence[Pass],
    *,
    hardware: Hardware | None = None,
    prove: bool = True,
    watch: Watch | None = None,
    levels: Levels | None = None,
    beginnings: Beginnings | None = None,
) -> Lowered:
    """Run the passes.

    Args:
        captured: the step on the last micro-batch.
        config: options.
        mesh: the ranks.
        layout: buckets that exist already and are to be kept if the program allows it.
        own: a user's passes.
        hardware: the machine, as each of the ranks finds it; None where it is not known.
        prove: that each pass changed no meaning; a plan runs nothing, and leaves that to ``zgraph.compile``.
        watch: see ``zgraph.pipeline.run``; it is shown the last micro-batch's program first.
        levels: what recomputation was found to bring for the same model, which grows.
        beginnings: what passes on the same captured programs have begun with, which grows; then nothing is proved,
            and nobody looks on.

    Raises:
        ZgraphError: see ``zgraph.pipeline.run``.
    """
    passes = default_passes(config, mesh, layout, own=own, hardware=hardware, levels=levels)
    assert beginnings is None or (watch is None and not prove), "what is kept was not proved"
    run_all = partial(run, prove=prove, watch=watch) if beginnings is None else beginnings.run
    last = run_all(passes, captured)
    if config.accumulate == 1:
        return Lowered(last.program, None, last.records)
    layout = None if last.program.layout is None else last.program.layout.undivided()
    passes = default_passes(config, mesh, layout, own=own, hardware=hardware, levels=levels)
    micro = run_all(passes, micro_step(captured) if beginnings is None else beginnings.derived(micro_step, captured))
    check_same_buckets(last.program.layout, micro.program.layout)
    return Lowered(last.program, micro.program, (*last.records, *micro.records))


def check_same_buckets(layout: Layout | None, found: Layout | None) -> None:
    """All micro-batches of a step must keep parameters and gradients in the same buckets.

    Raises:
        CaptureError: with a parameter that only some of them train, if there is one.
    """
    if layout == found or layout is None or found is None:
        return
    trained = [{s.name for b in each.buckets if b.trainable for s in b.segments} for each in (layout, found)]
    odd = sorted(trained[0] ^ trained[1])
    what = f"{odd[0]} is trained by some of them only" if odd else "parameters are read in unlike dtypes"
    raise CaptureError(
        f"the micro-batches of a step do not fit together: {what}",
        fix="let forward use the same parameters in the same way for every micro-batch of a step",
    )
