"""Mistakes planted in the passes: the verifier refuses every one, before anything runs, and says where it is.

``pytest tests/test_mutants.py -rP`` prints how many there are, and how many of them numbers would have shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from unittest import mock

import pytest

from tests.mutants.catalogue import MACHINE, MUTANTS, Edit, Extra, Mutant
from tests.mutants.steps import TABLE_AND_HEAD, steps
from tests.programs import assert_same_step
from tests.reference import slow
from zgraph.config import Config
from zgraph.errors import VerifyError
from zgraph.passes import default_passes
from zgraph.pipeline import run
from zgraph.program import Mesh, Program
from zgraph.verify import Verifier

CONFIGS = [
    (Config(zero, bucket_bytes, prefetch), Mesh(world))
    for zero, bucket_bytes, prefetch, world in (
        (3, 1, 1, 2), (3, 10**6, 1, 3), (1, 1, 0, 2), (1, 200, 0, 2), (1, 10**6, 1, 3), (0, 1, 0, 2), (2, 200, 0, 3),
    )
]  # fmt: skip

SCHEDULED = [(Config(zero, 1), Mesh(2)) for zero in (3, 2)]
"""For mistakes in what the cost model schedules."""

IN_NODES = [(Config(zero, 200, shard_size=2), Mesh(4, shard=2)) for zero in (3, 1)]
"""For mistakes inside of nodes or between them."""

TILED = [(Config(3, 1, tile_bytes=4 * 16 * 8), Mesh(2))]
"""For mistakes in tiles: of a step that has large matrices."""

INEXACT = [(Config(zero, 200, reduce_precision="bf16", state_precision="int8"), Mesh(2)) for zero in (0, 1, 3)]
INEXACT += [
    (Config(3, 200, reduce_precision="int8", gather_precision="int8"), Mesh(2)),
    (Config(3, 200, gather_precision="bf16"), Mesh(2)),
]
"""For mistakes in what is rounded on request; numbers show nothing there."""

RECOMPUTING = [
    (Config(zero, 100, recompute=how), Mesh(2))
    for zero, how in ((3, ("blocks.*",)), (0, ("blocks.*",)), (3, ("blocks",)), (3, 1.0))
]
"""For mistakes in what is made again: of a step that has blocks."""

captured = lru_cache(maxsize=1)(steps)


def attempts(mutant: Mutant, *, exact: bool) -> Iterator[tuple[Program, Config, Mesh]]:
    """What to try a mistake on, first where the edited lines run."""
    edit = mutant if isinstance(mutant, Edit) else None
    configs = SCHEDULED if edit and edit.module == "schedule" else CONFIGS
    inexact = [] if exact else INEXACT
    ordered = IN_NODES if edit and edit.in_nodes else (*configs, *inexact)
    if edit and edit.on_request:
        ordered = (*(inexact if edit.module == "quantize" else inexact[::-1]), *configs)
    everything = ((program, *at) for at in ordered for program in captured().values())
    with_blocks = ((captured()["two blocks"], *at) for at in RECOMPUTING)
    if edit and edit.module == "tile":
        yield from ((captured()[TABLE_AND_HEAD], *at) for at in TILED)
        return
    in_blocks = ("again", "recompute", "recompute_activations")
    recomputes = edit.module in in_blocks if edit else isinstance(mutant, Extra) and mutant.recomputes
    yield from (*with_blocks, *everything) if recomputes else (*everything, *with_blocks)


def refusal(mutant: Mutant) -> VerifyError | None:
    """What the verifier says first, if it says anything."""
    for program, config, mesh in attempts(mutant, exact=False):
        with mutant.passes(config, mesh) as passes:
            try:
                run(passes, program)
            except VerifyError as error:
                return error
    return None


def is_shown_by_numbers(mutant: Mutant) -> bool:
    """Whether some step crashes or computes something else when nothing is verified."""
    for program, config, mesh in attempts(mutant, exact=True):
        with mutant.passes(config, mesh) as passes, mock.patch.object(Verifier, "check"):
            try:
                rewritten = run(passes, program).program
                for late in (False, True):
                    assert_same_step(rewritten, program, late=late)
            except Exception:  # noqa: BLE001 -- a crash shows the mistake, too
                return True
    return False


@pytest.mark.parametrize("step", ["two layers", *slow(*(name for name in captured() if name != "two layers"))])
def test_without_a_mistake_nothing_is_refused(step: str) -> None:
    others = {"two blocks": RECOMPUTING, TABLE_AND_HEAD: TILED}.get(step, [])
    for config, mesh in (*CONFIGS, *SCHEDULED, *IN_NODES, *others):
        program = run(default_passes(config, mesh, hardware=MACHINE), captured()[step]).program
        assert_same_step(program, captured()[step])


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_a_mistake_is_refused_for_what_it_is_with_its_pass_its_place_and_the_users_line(mutant: Mutant) -> None:
    error = refusal(mutant)
    assert error is not None, f"not refused: {mutant.name}"
    assert re.search(mutant.expects.value, error.what), error
    name = error.what.split(" ")[0].rstrip(":")
    assert name in {
        p.name
        for config, mesh in (*CONFIGS, *SCHEDULED, *IN_NODES, *INEXACT, *RECOMPUTING, *TILED)
        for p in default_passes(config, mesh, hardware=MACHINE)
    } | {type(getattr(mutant, "extra", None)).__name__}
    assert (error.where or "").startswith("model.py:"), error
    names = {re.escape(what.name) for program in captured().values() for _, what in program.placeholders()}
    place = rf"node: +\w+|rule: \w+ \(|^\w+: \w+ \(|\b({'|'.join(names)}|bucket\d)\b"
    assert re.search(place, error.what), error
    assert error.fix


@pytest.mark.slow
@pytest.mark.nightly
def test_the_catalogue_is_large_and_its_mistakes_are_real() -> None:
    """Races and lost conditions show in no number here, nor does what is rounded on request; all else does."""
    assert len(MUTANTS) >= 40
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    silent = [mutant.name for mutant in MUTANTS if not is_shown_by_numbers(mutant)]
    print(f"{len(MUTANTS)} mistakes; numbers alone show {len(MUTANTS) - len(silent)}, not: {'; '.join(silent)}")
    on_request = {mutant.name for mutant in MUTANTS if isinstance(mutant, Edit) and mutant.on_request}
    assert len(set(silent) - on_request) <= len(MUTANTS) // 5
