"""What holds of every training step and every legal pipeline, on any number of ranks.

``make quick`` tries few of each, ``make test`` many, ``make nightly`` very many; see ``tests/conftest.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import event, given
from hypothesis import strategies as st

from tests.programs import assert_same_step, fewer_examples
from tests.recipes import Recipe, Reshuffle, build, recipes
from zgraph.config import Config
from zgraph.passes import FormBuckets, Tidy, default_passes
from zgraph.pipeline import Pass, run
from zgraph.program import Mesh
from zgraph.verify import verify


@dataclass(frozen=True)
class Pipeline:
    """A legal order of passes: the default ones of a configuration, some of them twice where that is allowed.

    Attributes:
        reshuffle: position of passes that put calls in a random legal order, and their seeds.
    """

    config: Config
    mesh: Mesh
    tidy: int
    rebucket: int | None
    reshuffle: tuple[tuple[int, int], ...]

    def passes(self) -> list[Pass]:
        tidied: list[Pass] = [Tidy()] * self.tidy
        passes = [*tidied, *default_passes(self.config, self.mesh)[1:]]
        for position, seed in self.reshuffle:
            at = position % (len(passes) + 1)
            stage = passes[at].takes if at < len(passes) else passes[-1].gives
            passes.insert(at, Reshuffle(stage, stage, seed))
        return passes


def pipelines() -> st.SearchStrategy[Pipeline]:
    return st.builds(
        Pipeline,
        st.builds(
            Config,
            st.integers(0, 3),
            st.sampled_from([1, 100, 200, 1000, 10**6]),
            st.integers(0, 3),
            offload=st.sampled_from([None, {"optimizer": "disk"}, {"optimizer": "disk", "parameters": "disk"}]),
        ),
        st.sampled_from([*map(Mesh, range(1, 9)), *(Mesh(4 + size, shard=size) for size in (1, 2, 4))]),
        st.integers(0, 2),
        st.none() | st.sampled_from([1, 200]),
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=2).map(tuple),
    )


@fewer_examples(0.5)
@given(recipes(), pipelines(), st.booleans())
def test_every_pipeline_is_proved_and_its_ranks_compute_the_step(recipe: Recipe, how: Pipeline, late: bool) -> None:
    """The verifier accepts what is right (it has no false alarms), and numbers agree with it."""
    captured = build(recipe)
    passes = how.passes()
    if how.rebucket is not None:  # as after a change of the model's training mode: buckets that exist are kept
        world = how.mesh.shard_size
        layout = FormBuckets(world, how.rebucket)(captured).layout
        passes = [FormBuckets(world, p.bucket_bytes, layout) if isinstance(p, FormBuckets) else p for p in passes]
    event(f"ZeRO {how.config.zero}")
    program = run(passes, captured).program
    verify(program, after="all passes", reference=captured)  # from nothing, as each pass was proved from the last
    assert_same_step(program, captured, late=late)


@fewer_examples(0.2)
@given(recipes())
def test_tidying_twice_is_tidying_once(recipe: Recipe) -> None:
    once = Tidy()(build(recipe))
    assert Tidy()(once).text() == once.text()
