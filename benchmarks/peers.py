"""The peers: each wraps the same model for the ranks of a job and gives back one training step.

All use float32 and the same fused AdamW. A peer is one function; adding one is adding it to ``PEERS``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from models import GPT, build_model, shape_of
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import zgraph

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}

_DECIMAL = re.compile(r"\d+\.\d+")

Collectives = dict[str, dict[str, int]]
"""``{operation: {"count": how often, "bytes": payload, of gathers and scatters the whole side}}`` in one step."""


@dataclass(frozen=True)
class Training:
    """A model ready to train.

    Attributes:
        step: forward, backward, communication and update; the loss, of this rank or of all.
        collectives: what the last step moved, where the peer keeps count itself.
        disk: what the last step moved from and to a disk, and what it was predicted to take, where the peer tells.
    """

    step: Callable[[], Tensor]
    collectives: Callable[[], Collectives] | None = None
    disk: Callable[[], OnDisk] | None = None


@dataclass(frozen=True)
class OnDisk:
    """Bytes of one rank's last step, and seconds that it was predicted to take."""

    read_bytes: int = 0
    written_bytes: int = 0
    predicted_s: float = 0.0


Batch = tuple[Tensor, Tensor]
Build = Callable[[GPT, Batch], Training]


@dataclass(frozen=True)
class Peer:
    """How to train the model on several ranks.

    Attributes:
        build: wraps a model that all ranks built alike, for this rank's batch.
        what: one line for the table's reader.
        whole_batch: one process trains on the batch of all ranks.
        synchronous: the ranks train one model, so its losses are comparable.
        optional_package: what it needs besides torch and zgraph.
        has_options: ``build`` takes options after its name.
        device: where the model is built: ``meta`` for peers that give it memory themselves.
        compiles_long: its first step takes a minute, so that it takes part by default only where time is the question.
    """

    build: Build
    what: str
    whole_batch: bool = False
    synchronous: bool = True
    optional_package: str | None = None
    has_options: bool = False
    compiles_long: bool = False
    device: str = "cpu"

    @property
    def missing(self) -> str | None:
        """Why this peer cannot run here, if it cannot."""
        if self.optional_package is not None and importlib.util.find_spec(self.optional_package) is None:
            return f"{self.optional_package} is not installed"
        return None


def _torch_step(model: torch.nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> Training:
    def step() -> Tensor:
        loss: Tensor = model(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Training(step)


def _eager(model: GPT, batch: Batch) -> Training:
    return _torch_step(model, batch, torch.optim.AdamW(model.parameters(), **ADAMW))


def _ddp(model: GPT, batch: Batch) -> Training:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _torch_step(wrapped, batch, torch.optim.AdamW(model.parameters(), **ADAMW))


def _zero_redundancy(model: GPT, batch: Batch) -> Training:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, **ADAMW)
    return _torch_step(wrapped, batch, optimizer)


def _fsdp2(model: GPT, batch: Batch, *, compiled: bool = False, checkpointed: bool = False) -> Training:
    for index, block in enumerate(model.blocks):
        if checkpointed:
            block = model.blocks[index] = checkpoint_wrapper(block)
        if compiled:
            block.compile()
        fully_shard(block)
    # Beside the blocks, the two largest parameters: gathered apart, they are never whole at the same time.
    fully_shard(model.token_embedding)
    fully_shard(model.head)
    fully_shard(model)
    return _torch_step(model, batch, torch.optim.AdamW(model.parameters(), **ADAMW))


def _fsdp2_from_meta(model: GPT, batch: Batch) -> Training:
    training = _fsdp2(model, batch)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return training


def _tuned(model: GPT, batch: Batch, build: Build, **options: Any) -> Training:
    # glibc raises these thresholds as large blocks are freed, and then keeps what is freed; set, they stay.
    m_trim_threshold, m_mmap_threshold = -1, -3
    for parameter in (m_trim_threshold, m_mmap_threshold):
        if ctypes.CDLL(None).mallopt(parameter, 128 * 1024) != 1:
            raise RuntimeError(f"mallopt({parameter}, 128 KiB) was refused")
    return build(model, batch, **options)


def _zgraph(model: GPT, batch: Batch, **options: Any) -> Training:
    # On meta torch refuses fused=True; that only says which of torch's kernels plain PyTorch would run.
    fused = not any(parameter.is_meta for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), **{**ADAMW, "fused": fused})
    compiled: Any = zgraph.compile(model, optimizer=optimizer, **options)

    def disk() -> OnDisk:
        stats = compiled.stats()
        return OnDisk(stats["disk_read_bytes"], stats["disk_written_bytes"], compiled.plan.chosen.step_s)

    return Training(lambda: compiled.train_step(*batch), lambda: compiled.stats()["collectives"], disk)


def _deepspeed(
    model: GPT, batch: Batch, stage: int, path: str = "", on_disk: tuple[str, ...] = (), ahead: bool = True
) -> Training:
    import deepspeed  # type: ignore[import-not-found]

    # Sized from the model's width, as the Hugging Face integration does: the defaults are made for far larger models.
    # Clipping is off because no peer clips; DeepSpeed's own default is 1.0.
    width = model.head.in_features
    bucket = max(width * width, 500_000)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": int(0.9 * bucket) if ahead else 0,
            "stage3_param_persistence_threshold": 10 * width,
            "stage3_max_live_parameters": bucket,
            "stage3_max_reuse_distance": bucket,
            "sub_group_size": 10_000_000,
        }
    largest = max(parameter.numel() for parameter in model.parameters())
    buffers = {
        "optimizer": {"buffer_count": 4, "pipeline_read": ahead, "pipeline_write": ahead},
        # What is put on a disk is kept in memory, too, unless it is told to keep nothing.
        "parameters": {"buffer_count": 5, "buffer_size": largest, "max_in_cpu": 0},
    }
    for what in on_disk:
        where = {"device": "nvme", "nvme_path": path, "pin_memory": False, **buffers[what]}
        zero["offload_param" if what == "parameters" else "offload_optimizer"] = where
    config = {
        "train_micro_batch_size_per_gpu": batch[0].shape[0],
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if any(parameter.is_meta for parameter in model.parameters()):  # it divides each module as soon as it is made
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = build_model(shape_of(model, batch))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step() -> Tensor:
        loss: Tensor = engine(*batch)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Training(step)


def deepspeed_on_disk(path: str, *what: str, ahead: bool = True) -> Peer:
    """DeepSpeed ZeRO-3 with ``"optimizer"`` state, or ``"parameters"``, too, in files below ``path`` that stay.

    Args:
        ahead: it gathers parameters ahead, and reads and writes state beside its update. DeepSpeed 0.19 fails with
            either, by assertions on its buffers, where layers are wide and few.
    """
    return Peer(
        partial(_deepspeed, stage=3, path=path, on_disk=what, ahead=ahead),
        f"DeepSpeed ZeRO-3, built in parts, with {' and '.join(what)} on a disk",
        optional_package="deepspeed",
        device="meta",
    )


PEERS = {
    "single": Peer(_eager, "plain PyTorch, one process, the whole batch: the losses to equal", whole_batch=True),
    "local": Peer(_eager, "plain PyTorch, each rank alone on its share: no communication", synchronous=False),
    "ddp": Peer(_ddp, "DistributedDataParallel"),
    "zero-redundancy": Peer(_zero_redundancy, "DistributedDataParallel with ZeroRedundancyOptimizer"),
    "fsdp2": Peer(_fsdp2, "fully_shard of each block"),
    "fsdp2-compiled": Peer(
        partial(_fsdp2, compiled=True), "fsdp2 with torch.compile of each block", compiles_long=True
    ),
    "fsdp2-checkpointed": Peer(partial(_fsdp2, checkpointed=True), "fsdp2 that computes each block again in backward"),
    "fsdp2-tuned": Peer(partial(_tuned, build=_fsdp2), "fsdp2 with glibc's mmap and trim thresholds at 128 KiB"),
    **{
        f"zgraph-{stage}": Peer(partial(_zgraph, zero=stage), f"zgraph.compile(zero={stage})", has_options=True)
        for stage in range(4)
    },
    "fsdp2-meta-tuned": Peer(
        partial(_tuned, build=_fsdp2_from_meta), "fsdp2-tuned, built on meta and initialised in parts", device="meta"
    ),
    "zgraph-disk": Peer(
        partial(_zgraph, zero=3, offload={"optimizer": "disk", "parameters": "disk"}),
        "zgraph-3, built on meta, with parameters and optimizer state on a disk",
        has_options=True,
        device="meta",
    ),
    "zgraph-3-tuned": Peer(
        partial(_tuned, build=partial(_zgraph, zero=3)), "zgraph-3 with the same thresholds", has_options=True
    ),
    **{
        f"deepspeed-{stage}": Peer(
            partial(_deepspeed, stage=stage), f"DeepSpeed ZeRO-{stage}", optional_package="deepspeed"
        )
        for stage in (1, 2, 3)
    },
}


def parse_peer(text: str) -> Peer:
    """A name from ``PEERS``, with options after it as in ``zgraph-3:prefetch=2:bucket_bytes=4MiB``.

    Raises:
        ValueError: naming what is unknown.
    """
    name, *settings = text.split(":")
    if name not in PEERS:
        raise ValueError(f"no peer is called {name!r}; there are {', '.join(PEERS)}")
    peer = PEERS[name]
    if settings and not peer.has_options:
        raise ValueError(f"{name} takes no options, but {text!r} has {', '.join(settings)}")
    options: dict[str, float | str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} in {text!r} is not option=value")
        options[key] = int(value) if value.isdecimal() else float(value) if _DECIMAL.fullmatch(value) else value
    return replace(peer, build=partial(peer.build, **options))


def count_collectives(step: Callable[[], object]) -> Collectives:
    """Run ``step`` and count what it gives ``torch.distributed`` to move."""
    counter = _CollectiveCounter()
    with counter:
        step()
    return counter.collectives


class _CollectiveCounter(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: Collectives = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("barrier", "wait_tensor"):
            entry = self.collectives.setdefault(name, {"count": 0, "bytes": 0})
            entry["count"] += 1
            entry["bytes"] += max(_tensor_bytes(arg) for arg in args)
        return func(*args, **(kwargs or {}))


def _tensor_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(item) for item in value)
    return 0
