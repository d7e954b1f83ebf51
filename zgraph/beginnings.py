"""What runs of passes begin with is kept, so that those which begin alike do not run the same passes over and over.

A pass is pure and compares by its options: from one program, equal passes lead to equal programs. And choices of
options have most passes in common, up to the first that an option alters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zgraph.pipeline import Pass, PipelineResult, check_order, run
from zgraph.program import Program

MOST_NODES = 50_000
"""Of all that is kept, which takes about 1 KB for each."""


@dataclass(eq=False)
class _Place:
    """Where runs have come by.

    Attributes:
        kept: what was made there, if it is kept.
        behind: passes that followed, and where these led.
    """

    kept: PipelineResult | None = None
    behind: list[tuple[Pass, _Place]] = field(default_factory=list)

    def find(self, passes: Sequence[Pass]) -> list[_Place]:
        """This place and those behind it, as far as a run has come that began with the same passes."""
        found = [self]
        for p in passes:
            place = next((place for known, place in found[-1].behind if _is_same(known, p)), None)
            if place is None:
                break
            found.append(place)
        return found

    def add(self, passes: Sequence[Pass]) -> None:
        """Note that a run has these passes next."""
        place = self
        for p in passes:
            place.behind.append((p, place := _Place()))


def _is_same(known: Pass, p: Pass) -> bool:
    """Whether two passes do the same; of options that cannot be compared, as tensors cannot, they are not known to."""
    try:
        return known is p or bool(known == p)
    except Exception:  # noqa: BLE001 -- whatever the options of a user's pass make of it
        return False


class Beginnings:
    """Runs passes from where another run has come to with the same ones, for programs that will not run themselves.

    Where a second run comes by and parts from the first, the program is kept: most places see a single run. What was
    asked for longest ago is given up first.

    Args:
        most_nodes: of all that is kept.
    """

    def __init__(self, most_nodes: int = MOST_NODES) -> None:
        self._most_nodes = most_nodes
        self._starts: dict[int, _Place] = {}
        self._derived: dict[tuple[Callable[[Program], Program], int], tuple[Program, Program]] = {}
        self._kept: list[_Place] = []  # the last one asked for is the last one

    def run(self, passes: Sequence[Pass], program: Program) -> PipelineResult:
        """What ``zgraph.pipeline.run`` gives without a proof; neither what is given nor what is made may be altered.

        Raises:
            ZgraphError: see there.
        """
        check_order(passes, program.stage)
        start = self._starts.setdefault(id(program), _Place(PipelineResult(program, ())))
        places = start.find(passes)
        common = len(places) - 1
        places[-1].add(passes[common:])
        known = max(index for index, place in enumerate(places) if place.kept is not None)
        begun = places[known].kept
        assert begun is not None
        if known < common:
            begun = places[common].kept = _further(begun, passes[known:common])
        if common:
            self._keep(places[common])
        return _further(begun, passes[common:])

    def derived(self, make: Callable[[Program], Program], program: Program) -> Program:
        """What a function makes of a program, made once, as runs begin with it."""
        key = make, id(program)
        if key not in self._derived:
            self._derived[key] = program, make(program)
        return self._derived[key][1]

    def _keep(self, place: _Place) -> None:
        """Keep what has just been asked for rather than all else."""
        self._kept = [*(other for other in self._kept if other is not place), place]
        while sum(_num_nodes(each) for each in self._kept) > self._most_nodes:
            self._kept.pop(0).kept = None


def _num_nodes(place: _Place) -> int:
    return 0 if place.kept is None else place.kept.program.num_nodes()


def _further(begun: PipelineResult, passes: Sequence[Pass]) -> PipelineResult:
    made = run(passes, begun.program, prove=False)
    return PipelineResult(made.program, (*begun.records, *made.records))
