"""Run a function on several ranks of this machine with torchrun's own machinery."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from zgraph.errors import RankError

Result = TypeVar("Result")


def launch_ranks(function: Callable[..., Result], ranks: int, *args: Any) -> dict[int, Result]:
    """Call a top-level function on every rank, over this machine's loopback; what each returned, by rank.

    Raises:
        RankError: a rank failed; names it and says why.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        results: dict[int, Result] = elastic_launch(config, function)(*args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        record: Any = failure.message  # annotated as text, but a dictionary where a function failed
        message = record["message"] if isinstance(record, dict) else record
        raise RankError(f"rank {rank} of {ranks} failed: {message}") from error
    return results
