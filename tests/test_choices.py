"""The family of choices: everything that is open with everything else, in an order that says what is never faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zgraph.captures import Captures
from zgraph.choices import _LESS, SEARCHED, VARIED, divisors, family, offloads
from zgraph.config import BUCKET_BYTES, Config
from zgraph.decision import config_of
from zgraph.errors import OptionError


def test_a_family_is_every_stage_and_recomputation_with_one_variation_or_all_that_save_memory() -> None:
    told = [choice.options for choice in family(1, 2, {"recompute": None})]
    mebi = 2**20
    assert told == [
        {"zero": zero, **varied, "recompute": None}
        for zero in range(4)
        for varied in (
            {},
            *({"bucket_bytes": size} for size in (4 * mebi, 64 * mebi, 256 * mebi, "auto")),
            *([{"in_flight": 0}, {"in_flight": None}, {"unshard": 0.5}, {"unshard": 1.0}] if zero == 3 else []),
            *([{"tile_bytes": 8 * mebi}] if zero == 3 else []),
            *([{"bucket_bytes": 4 * mebi, "in_flight": 0, "tile_bytes": 8 * mebi}] if zero == 3 else []),
        )
    ]


def test_all_members_can_be_and_differ() -> None:
    members = family(12, 8, {"precision": "bf16"})
    configs = [choice.config for choice in members]
    assert len(set(configs)) == len(members)
    assert all(Config.from_options(choice.options) == choice.config for choice in members)
    assert {config.accumulate for config in configs} == {1, 2, 3, 4, 6, 12}
    assert {config.keep_gathered for config in configs} == {False, True}


def test_one_rank_has_nothing_to_shard_or_to_send() -> None:
    assert [choice.options for choice in family(1, 1, {})] == [
        {"zero": 0},
        {"zero": 0, "recompute": "operators"},
        {"zero": 0, "recompute": "blocks"},
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_state_alone_on_a_host_may_be_loaded_ahead_on_any_number_of_ranks(world: int) -> None:
    fixed = {"recompute": None, "zero": 0, "offload": "auto"}
    state = {"optimizer": "host"}
    members = {tier: family(1, world, fixed, tier=tier) for tier in ("host", "disk")}
    ahead = [choice.options["offload"] for choice in members["host"] if choice.config.load_ahead]
    assert ahead == [state, {**state, "parameters": "host"}]
    assert not any(choice.config.load_ahead for choice in members["disk"])


def test_more_goes_to_a_disk_one_after_the_other_if_that_is_open() -> None:
    given = {"recompute": None, "offload_path": "/var/tmp"}
    members = family(1, 1, {**given, "offload": "auto"})
    hidden, state = {"activations": "disk"}, {"optimizer": "disk"}
    everything = {**state, "parameters": "disk"}
    offloads = (hidden, state, {**state, **hidden}, everything, {**everything, **hidden})
    assert [choice.options for choice in members] == [
        {"zero": 0, "recompute": None},
        *({"zero": 0, **given, "offload": offload} for offload in offloads),
        {"zero": 0, **given, "offload": {**everything, "activations": "disk, waited for"}},
    ]
    milder = [[members.index(each) for each in choice.milder] for choice in members]
    assert milder == [[], [0], [0], [2], [2], [4], [5]]
    assert [choice.depth for choice in members] == [0, 1, 1, 2, 2, 3, 4]


def test_what_is_fixed_is_in_every_member() -> None:
    fixed = {"zero": 1, "accumulate": 2, "recompute": ("blocks.*",), "clip_norm": 1.0}
    members = family(8, 2, fixed)
    assert members
    assert all(choice.options.items() >= fixed.items() for choice in members)
    fixed = {name: getattr(Config, name) for name in SEARCHED}
    assert [choice.options for choice in family(8, 2, fixed)] == [fixed]


def test_milder_members_differ_in_one_step_and_come_first() -> None:
    members = family(4, 2, {})
    place = {choice: i for i, choice in enumerate(members)}
    for choice in members:
        for milder in choice.milder:
            assert place[milder] < place[choice]
            assert milder.depth == choice.depth - 1
            differing = {n for n in SEARCHED if getattr(milder.config, n) != getattr(choice.config, n)}
            assert len(differing - {"zero", "keep_gathered"}) == 1
    mildest = [choice for choice in members if not choice.milder]
    assert all((choice.config.accumulate, choice.config.recompute) == (1, None) for choice in mildest)


@pytest.mark.parametrize("bucket_bytes", [None, BUCKET_BYTES])
def test_a_choice_of_the_user_that_cannot_be_is_refused_whatever_buckets_are_tried(bucket_bytes: int | None) -> None:
    offload = {"optimizer": "host", "gradients": "host"}
    with pytest.raises(OptionError, match="offload of gradients with accumulate=1"):
        family(1, 8, {"offload": offload, "accumulate": 1}, tier="host", bucket_bytes=bucket_bytes)


def test_what_is_never_slower_lies_as_near_or_nearer() -> None:
    near = {"host": 1, "host, waited for": 1, "disk": 2, "disk, waited for": 2}
    for tier in ("host", "disk"):
        values = offloads(tier)
        for what, less in zip(values, _LESS, strict=False):
            nearer = {} if less is None else values[less] or {}
            assert all(near[there] <= near[(what or {}).get(kind, "")] for kind, there in nearer.items())
    assert len(offloads("host")) == len(_LESS)


def test_a_choice_of_the_user_that_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="keep_gathered"):
        family(4, 2, {"keep_gathered": True, "zero": 3, "accumulate": 1})


def test_what_needs_micro_batches_is_checked_with_some_where_they_are_open() -> None:
    assert config_of({"keep_gathered": True}).keep_gathered
    with pytest.raises(OptionError, match="tile_bytes=1048576 with keep_gathered"):
        config_of({"keep_gathered": True, "tile_bytes": 2**20})


def test_every_variation_is_of_an_option_and_not_its_default() -> None:
    for name, variation in VARIED.items():
        assert getattr(Config, name) not in variation.values


@pytest.mark.parametrize(("number", "expected"), [(1, (1,)), (12, (1, 2, 3, 4, 6, 12)), (16, (1, 2, 4, 8, 16))])
def test_divisors_come_in_order(number: int, expected: tuple[int, ...]) -> None:
    assert divisors(number) == expected


def test_where_ranks_fill_several_nodes_they_may_have_copies() -> None:
    found = {(choice.config.zero, choice.config.shard_size) for choice in family(2, 16, {}, 8)}
    assert found == {(0, None), (1, None), (2, None), (2, 8), (3, None), (3, 8)}
    for world, per_node in ((8, 8), (12, 8), (16, 1)):
        assert {choice.config.shard_size for choice in family(2, world, {}, per_node)} == {None}
    given = family(2, 16, {"shard_size": 4}, 8)
    assert {(choice.config.zero, choice.config.shard_size) for choice in given} == {(1, 4), (2, 4), (3, 4)}


def test_tiles_are_tried_where_a_matrix_is_larger_than_one() -> None:
    with_tiles, without = (family(1, 2, {"recompute": None}, tile_bytes=size) for size in (9 * 2**20, None))
    tiled = [choice.options for choice in with_tiles if "tile_bytes" in choice.options]
    size = {"tile_bytes": 9 * 2**20}
    lean = {"bucket_bytes": 4 * 2**20, "in_flight": 0}
    assert tiled == [{"zero": 3, **size, "recompute": None}, {"zero": 3, **lean, **size, "recompute": None}]
    without = [choice for choice in without if not choice.options.keys() >= lean.keys()]
    assert [c.options for c in without] == [c.options for c in with_tiles if c.options not in tiled]


class Headed(nn.Module):
    """Blocks of one width, and a head that has as many rows as is said."""

    def __init__(self, width: int, rows: int, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.head = nn.Linear(width, rows, bias=False)


@pytest.mark.parametrize(
    ("width", "rows", "size"),
    [(64, 64, None), (64, 40_000, 8 * 2**20), (2048, 2048, None), (2048, 4096, 16 * 2**20)],
)
def test_tiles_are_as_large_as_matrices_of_blocks_and_of_what_is_larger(
    width: int, rows: int, size: int | None
) -> None:
    with torch.device("meta"):
        model, x = Headed(width, rows), torch.empty(2, width)
    assert Captures(model, torch.optim.SGD(model.parameters()), ((x,), {})).tile_bytes == size


@pytest.mark.parametrize(
    "fixed", [{"tile_bytes": 2**23}, {"unshard": 0.5}, {"gather_precision": "bf16"}, {"reduce_precision": "int8"}]
)
def test_of_one_rank_what_needs_a_stage_may_be_asked_for(fixed: dict[str, Any]) -> None:
    found = family(2, 1, fixed)
    assert found
    assert all(choice.config.zero == Config.zero for choice in found)
    assert all(getattr(choice.config, name) == value for choice in found for name, value in fixed.items())


@pytest.mark.parametrize(("num_blocks", "sizes"), [(6, (6,)), (16, (16,)), (17, (4, 6))])
def test_models_of_up_to_sixteen_blocks_are_estimated_whole(num_blocks: int, sizes: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model, x = Headed(64, 64, num_blocks), torch.empty(2, 64)
    assert Captures(model, torch.optim.SGD(model.parameters()), ((x,), {})).sizes == sizes
