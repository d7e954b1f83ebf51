"""One block for a model's temporaries: shared by its programs, never by two models, and gone with it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import zgraph
from tests.models import CASES, Batch
from zgraph import placement
from zgraph.arena import Arena
from zgraph.codegen.emit import Step
from zgraph.offsets import ALIGNMENT
from zgraph.placement import Place

BF16, F64 = torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def _small_values_count() -> Iterator[None]:
    with mock.patch.object(placement, "SMALLEST_BYTES", 1):
        yield


def step_with(*places: Place) -> Step:
    return Step("", lambda *_: [], places, 0)


def test_each_place_is_a_tensor_of_its_form_with_a_storage_of_its_own() -> None:
    arena = Arena()
    arena.reserve(256)
    emitted = step_with(Place(64, (2, 3), (1, 2), F64), Place(128, (5,), (1,), BF16))
    turned, flat = arena.tensors(emitted)
    assert (turned.shape, turned.stride(), turned.dtype) == ((2, 3), (1, 2), F64)
    assert turned.storage_offset() == 0
    assert turned.untyped_storage().nbytes() == 48
    assert flat.data_ptr() - turned.data_ptr() == 64
    assert turned.data_ptr() % ALIGNMENT == 0
    assert arena.tensors(emitted)[0] is turned
    turned.copy_(torch.arange(6.0).view(2, 3))
    assert torch.as_strided(turned, (6,), (1,), 0).tolist() == [0, 3, 1, 4, 2, 5]


def test_programs_share_the_block_and_it_is_taken_anew_only_to_grow() -> None:
    arena = Arena()
    first, second = step_with(Place(0, (8,), (1,), F64)), step_with(Place(0, (16,), (1,), F64))
    arena.reserve(128)
    arena.reserve(64)
    assert arena.num_bytes == 128
    before = arena.tensors(first)[0]
    assert arena.tensors(second)[0].data_ptr() == before.data_ptr()
    arena.reserve(1024)
    assert arena.tensors(first)[0].data_ptr() == arena.tensors(second)[0].data_ptr()
    assert arena.tensors(first)[0] is not before


def test_the_memory_goes_with_the_last_that_needs_it() -> None:
    arena = Arena()
    arena.reserve(64)
    arena.tensors(step_with(Place(0, (8,), (1,), F64)))
    block = weakref.ref(arena._block)
    arena.reserve(128)
    gc.collect()
    assert block() is None, "no tensor keeps what has been outgrown"


def step(model: Any, batch: Batch) -> float:
    return float(model.train_step(*batch.args, **batch.kwargs))


def trained(name: str = "gpt", num_steps: int = 3, **options: Any) -> tuple[Any, list[float]]:
    case = CASES[name]
    model = case.model()
    model = zgraph.compile(model, torch.optim.AdamW(model.parameters()), loss=case.loss, **options)
    return model, [step(model, batch) for batch in case.batches(num_steps)]


@pytest.mark.slow
def test_models_have_arenas_of_their_own_and_so_have_copies_of_them() -> None:
    model, losses = trained()
    with mock.patch.object(placement, "SMALLEST_BYTES", 2**40):
        plain, expected = trained()
    assert losses == expected, "bit for bit what it is without an arena"
    assert plain.stats()["arena_bytes"] == 0 < model.stats()["arena_bytes"]
    copied = copy.deepcopy(model)
    batch = CASES["gpt"].batches(4)[3]
    assert step(copied, batch) == step(model, batch) == step(plain, batch)
    blocks = [each.__dict__["_zgraph"].arena._block for each in (model, copied)]
    assert blocks[0] is not blocks[1]


@pytest.mark.slow
def test_micro_batches_and_batches_of_other_shapes_share_one_arena() -> None:
    case = CASES["gpt"]
    model, _ = trained(accumulate=2)
    before = model.stats()["arena_bytes"]
    runtime = model.__dict__["_zgraph"]
    (compiled,) = {each for each in runtime.cache if each is runtime._last}
    block = runtime.arena._block
    for executable in (compiled.executable, compiled.micro):
        (tensor, *_) = runtime.arena.tensors(executable.step)
        low = block.ctypes.data
        assert low <= tensor.data_ptr() < low + before
    torch.manual_seed(0)
    step(model, case.make_batch(16))
    assert model.stats()["arena_bytes"] > before
    step(model, case.batches(1)[0])


@pytest.mark.slow
def test_gradients_of_matrices_are_made_where_their_bucket_has_them() -> None:
    model, _ = trained(bucket_bytes=2**12, num_steps=1)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    copied = model.stats()["copied_bytes"]
    assert 0 < copied < gradients / 4, "of norms, whose operator has no place to be given, and small tables"
