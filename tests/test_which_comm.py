"""What serves a process group: the backend of its devices decides, and whether its ranks share a host."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from tests.ranks import Ranks
from tests.test_comm import CONFIGS, group
from zgraph import peer_memory
from zgraph.agreement import Agreement, CheckedComm
from zgraph.comm import FunctionalComm, PointToPointComm, SingleComm
from zgraph.direct import DirectComm
from zgraph.groups import open_axes
from zgraph.program import REPLICA, SHARD, Mesh
from zgraph.which_comm import make_comm


def choose() -> None:
    for config, served in CONFIGS.items():
        with mock.patch.object(dist, "get_backend_config", lambda _, config=config: config):
            expected = DirectComm if served.get("cpu") == "gloo" else FunctionalComm
            assert type(make_comm(group(), {"cpu"})) is expected, config
            assert type(make_comm(group(), {"cuda"})) is FunctionalComm, config
            assert type(make_comm(group(), {"cpu", "cuda"})) is FunctionalComm, config


def test_the_backend_of_the_buckets_device_decides_how_data_travels(ranks: Ranks) -> None:
    ranks.run(choose)
    assert isinstance(make_comm(None, {"cpu"}), SingleComm)


def name_no_backend(rendezvous: str) -> tuple[str, str, bool]:
    dist.init_process_group(init_method=f"file://{rendezvous}", rank=0, world_size=1)
    agreement = Agreement(group())
    agreement.check("anything")
    same = agreement._group is group()
    return dist.get_backend(), type(make_comm(group(), {"cpu"})).__name__, same


def test_a_group_made_without_naming_a_backend_is_used_as_it_is(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.run(name_no_backend, str(tmp_path / "rendezvous"), world=1)
    assert found == [("undefined", DirectComm.__name__, True)]


def refuse_on(rank: int) -> list[str]:
    """What is chosen twice when one rank cannot read another's memory."""
    refused = "not permitted" if dist.get_rank() == rank else None
    with mock.patch.object(peer_memory, "_refusal", return_value=refused):
        first = make_comm(group(), {"cpu"})
    return [type(comm).__name__ for comm in (first, make_comm(group(), {"cpu"}))]


def test_all_ranks_send_messages_if_one_cannot_read_anothers_memory(ranks: Ranks) -> None:
    assert ranks.run(refuse_on, 1, world=3) == [[PointToPointComm.__name__] * 2] * 3
    assert ranks.run(refuse_on, -1, world=3) == [[DirectComm.__name__] * 2] * 3


def test_only_messages_need_a_place_for_what_a_reduction_receives(ranks: Ranks) -> None:
    assert ranks.run(stage) == [(False, True, False, True)] * 2


def stage() -> tuple[bool, ...]:
    direct, pairs = make_comm(group(), {"cpu"}), PointToPointComm(group())
    checked = CheckedComm(pairs, Agreement(group()))
    return direct.is_staged, pairs.is_staged, FunctionalComm(group()).is_staged, checked.is_staged


def test_a_group_is_tried_once(ranks: Ranks) -> None:
    assert ranks.run(count_tries) == [1, 1]


def count_tries() -> int:
    with mock.patch.object(peer_memory, "_try", wraps=peer_memory._try) as tried:
        for _ in range(3):
            make_comm(group(), {"cpu"})
    return tried.call_count


def choose_in_nodes() -> list[str]:
    """What is chosen for all ranks, inside of a node and between nodes, where memory of another one cannot be read."""
    pids: list[int] = [0] * 4
    dist.all_gather_object(pids, os.getpid())
    mine = pids[dist.get_rank() // 2 * 2 :][:2]
    mesh = Mesh(4, shard=2)
    open_axes(group(), mesh)
    with mock.patch.object(peer_memory, "_refusal", lambda pid, *_: None if pid in mine else "elsewhere"):
        comm = make_comm(group(), {"cpu"}, mesh)
    return [type(each).__name__ for each in (comm, comm.axes[SHARD], comm.axes[REPLICA])]


def test_ranks_of_a_node_read_each_others_memory_where_nodes_cannot(ranks: Ranks) -> None:
    messages = PointToPointComm.__name__
    assert ranks.run(choose_in_nodes, world=4) == [[messages, DirectComm.__name__, messages]] * 4
