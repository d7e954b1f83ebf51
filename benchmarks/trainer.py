"""One rank of one peer: what runs in each forked process, commanded through ``ranks.Ranks``.

Every method is one command that all ranks of the peer do together. A step is timed from a barrier to when this rank
has read its loss; the barrier and everything that is measured besides stay outside of the timed part.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from cgroups import MemoryCap
from memory import Held, Meter
from models import SHAPES, Shape, build_batch, build_model
from peers import ADAMW, Collectives, OnDisk, Peer, Training, count_collectives


@dataclass(frozen=True)
class Job:
    """What the ranks of one peer do.

    Attributes:
        peer: how to train.
        shape: of the model and of one rank's batch.
        num_shares: ranks that the batch is cut for.
        threads: that an operator may use in each rank.
        store: a path that does not exist yet, for the ranks to find each other.
        caps: one for each rank, or none.
    """

    peer: Peer
    shape: Shape
    num_shares: int
    threads: int
    store: Path
    caps: tuple[MemoryCap, ...] = ()

    @property
    def num_ranks(self) -> int:
        """Processes to start."""
        return 1 if self.peer.whole_batch else self.num_shares


@dataclass(frozen=True)
class StepSample:
    """One rank's view of one step; the clock is the same in all processes of a machine."""

    start_s: float
    end_s: float
    cpu_s: float
    loss: float


class Trainer:
    """Joins the other ranks, then waits for commands."""

    def __init__(self, job: Job, rank: int) -> None:
        if job.caps:
            job.caps[rank].enter()
        self._job, self._rank = job, rank
        torch.set_num_threads(job.threads)
        # As torchrun sets it: DeepSpeed insists.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.num_ranks)}
        if not job.peer.whole_batch:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{job.store}",
                rank=rank,
                world_size=job.num_ranks,
                timeout=timedelta(minutes=30),
            )
            dist.barrier()
        _touch_code()
        gc.collect()
        self._meter = Meter()
        self._training: Training | None = None

    def build(self) -> float:
        """Build and wrap the model; seconds."""
        start_s = time.perf_counter()
        shares = range(self._job.num_shares) if self._job.peer.whole_batch else range(self._rank, self._rank + 1)
        batch = build_batch(self._job.shape, self._job.num_shares, shares)
        self._training = self._job.peer.build(build_model(self._job.shape, self._job.peer.device), batch)
        return time.perf_counter() - start_s

    def step(self) -> StepSample:
        """One training step, begun by all ranks together."""
        step = self._step
        if dist.is_initialized():
            dist.barrier()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        loss = step().item()
        return StepSample(start_s, time.perf_counter(), time.process_time() - start_cpu_s, loss)

    def restart_peaks(self) -> Held:
        """Forget the peaks until now; what they were."""
        gc.collect()
        held = self._meter.read()
        self._meter.restart_peaks()
        return held

    def read_memory(self) -> Held:
        """What is held between two steps, and the peaks."""
        gc.collect()
        return self._meter.read()

    def baseline_resident_bytes(self) -> int:
        """Imports and process group."""
        return self._meter.baseline_resident_bytes

    def count_collectives(self) -> Collectives:
        """Run one more step for what it moves."""
        step = self._step
        if self._training is not None and self._training.collectives is not None:
            step()
            return self._training.collectives()
        return count_collectives(step)

    def disk(self) -> OnDisk:
        """What the last step moved from and to a disk, and was predicted to take."""
        told = self._training.disk if self._training is not None else None
        return OnDisk() if told is None else told()

    @property
    def _step(self) -> Callable[[], torch.Tensor]:
        assert self._training is not None, "build comes first"
        return self._training.step


def _touch_code() -> None:
    """Train a tiny model, so that the pages of code and the scratch space of libraries are in the baseline."""
    shape = SHAPES["tiny"]
    model = build_model(shape)
    model(*build_batch(shape, 1, range(1))).backward()
    torch.optim.AdamW(model.parameters(), **ADAMW).step()
