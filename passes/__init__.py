"""The passes, and the order they run in."""

from __future__ import annotations

from collections.abc import Sequence

from zgraph.config import BUCKET_BYTES, BY_COST, Config, activations_on
from zgraph.errors import OptionError
from zgraph.hardware import Hardware
from zgraph.layout import ALIGN, Layout
from zgraph.packed import BLOCK
from zgraph.passes.bounds import Bounds
from zgraph.passes.bucket import FormBuckets
from zgraph.passes.fuse import FuseRegions
from zgraph.passes.inplace import UpdateInPlace
from zgraph.passes.join_loss import JoinLossBackward
from zgraph.passes.keep import ReadGathered
from zgraph.passes.offload import Offload
from zgraph.passes.offload_activations import OffloadActivations
from zgraph.passes.overlap import Overlap
from zgraph.passes.overwrite import OverwriteOperands
from zgraph.passes.precision import CastBeforeGather, GatherInLowPrecision, ReduceInLowPrecision
from zgraph.passes.quantize import QuantizeState
from zgraph.passes.quantize_communication import GatherQuantized, ReduceQuantized
from zgraph.passes.recompute import EXPENSIVE, RecomputeModules
from zgraph.passes.recompute_activations import Levels, RecomputeActivations
from zgraph.passes.reorder import OrderByMemory
from zgraph.passes.schedule import FAR, Schedule
from zgraph.passes.secondary import KeepSecondaryShards
from zgraph.passes.shard import AverageGradients, ReadParamsEarly, ShardGradients, ShardOptimizer, ShardParams
from zgraph.passes.share_memory import ShareMemory
from zgraph.passes.tidy import Tidy
from zgraph.passes.tile import TileProducts
from zgraph.passes.unshard import Unshard
from zgraph.pipeline import Pass
from zgraph.program import Mesh


def default_passes(
    config: Config,
    mesh: Mesh,
    layout: Layout | None = None,
    *,
    own: Sequence[Pass] = (),
    hardware: Hardware | None = None,
    levels: Levels | None = None,
) -> tuple[Pass, ...]:
    """The passes for a configuration, in order; ZeRO-n is the first n + 1 of its four steps.

    Args:
        config: options.
        mesh: the ranks.
        layout: buckets that exist already and are to be kept if the program allows it.
        own: a user's passes, each run right after the last pass that gives the stage it takes.
        hardware: the machine that passes ask what calls cost, as each rank finds it. All ranks must give the same.
        levels: see ``RecomputeActivations``.

    Raises:
        OptionError: an option weighs costs, and there is no machine.
    """
    sizes = _bucket_bytes(config, mesh, hardware)
    zero: tuple[tuple[Pass, ...], ...] = (
        (AverageGradients(mesh),),
        (ShardOptimizer(mesh),),
        (ShardGradients(mesh),),
        (
            ReadParamsEarly(),
            ShardParams(mesh),
            CastBeforeGather(),
            *((GatherInLowPrecision(),) if config.gather_precision == "bf16" and mesh.size > 1 else ()),
            *((GatherQuantized(),) if config.gather_precision == "int8" and mesh.size > 1 else ()),
            *((ReadGathered(),) if config.keep_gathered else ()),
            *((KeepSecondaryShards(mesh),) if config.secondary_size is not None else ()),
            *((TileProducts(mesh, config.tile_bytes),) if config.tile_bytes is not None else ()),
        ),
    )
    steps = (
        FormBuckets(
            mesh.shard_size,
            BUCKET_BYTES if sizes is None else sizes,
            layout,
            packed=config.state_precision == "int8",
            granule=_granule(config),
            bounds=_bounds(config, mesh, hardware) if sizes is None else None,
        ),
        *(p for stage in zero[: config.zero + 1] for p in stage),
        *((ReduceInLowPrecision(),) if config.reduce_precision == "bf16" and mesh.size > 1 else ()),
        *((ReduceQuantized(),) if config.reduce_precision == "int8" and mesh.size > 1 else ()),
        *((QuantizeState(),) if config.state_precision == "int8" else ()),
        _order(config, hardware, sizes),
        *((OrderByMemory(hardware),) if config.memory_first else ()),
    )
    in_place = UpdateInPlace(compiled=config.kernels != "eager")
    share = (ShareMemory(),) if shares_parameters(config, mesh, hardware) else ()
    last_steps: tuple[Pass, ...] = (in_place, *share, JoinLossBackward(), OverwriteOperands())
    # What is recomputed is chosen by what calls cost one by one.
    fuse = (_fuse(config, hardware, last_steps),) if config.kernels in ("auto", "zgraph", "inductor") else ()
    then = (*steps, *last_steps)
    # What stays gathered is decided last, where there is room beside all else; it is not in the way of what is dropped.
    unshard = (Unshard(config.unshard, hardware),) if config.zero == 3 and mesh.size > 1 else ()
    offload = _offload(config, hardware)
    recompute = _recompute(config, hardware, then, levels)
    passes = (Tidy(), *recompute, *steps, *fuse, *last_steps, *offload, *unshard)
    last = {p.gives: p for p in passes}
    return tuple(q for p in passes for q in (p, *(o for o in own if last.get(o.takes) is p)))


def _offload(config: Config, hardware: Hardware | None) -> tuple[Pass, ...]:
    if config.offload is None:
        return ()
    if not isinstance(config.offload, dict):
        raise OptionError(
            f"offload={config.offload!r} is chosen by a budget, and none was given", fix="say what lies where, or None"
        )
    state = tuple((what, tier) for what, tier in sorted(config.offload.items()) if what != "activations")
    passes: tuple[Pass, ...] = (Offload(state, hardware, config.load_ahead, config.host_updates),) if state else ()
    if "activations" not in config.offload:
        return passes
    tier, waits = activations_on(config.offload)
    known = _known(hardware, f"offload={config.offload!r} weighs seconds", "leave activations out")
    return (*passes, OffloadActivations(known, waits, tier=tier))


def _known(hardware: Hardware | None, what: str, instead: str) -> Hardware:
    """The machine, for an option that goes by its seconds.

    Raises:
        OptionError: it is not known; ``what`` needs it, and the user may do something ``instead``.
    """
    if hardware is None:
        raise OptionError(
            f"{what}, and this machine is not known", fix=f"run `zgraph calibrate` to measure it, or {instead}"
        )
    return hardware


def _granule(config: Config) -> int:
    """Of which a rank's part of a bucket has a multiple of elements."""
    is_in_blocks = "int8" in (config.state_precision, config.gather_precision, config.reduce_precision)
    return BLOCK if is_in_blocks else ALIGN


def _bucket_bytes(config: Config, mesh: Mesh, hardware: Hardware | None) -> int | None:
    """The size of buckets; None where the cost model says where each ends."""
    if isinstance(config.bucket_bytes, int):
        return config.bucket_bytes
    on_gpus = hardware is not None and hardware.device_type != "cpu" and config.prefetch is None
    by_cost = config.bucket_bytes == BY_COST or on_gpus
    return None if by_cost and mesh.size > 1 else BUCKET_BYTES


def shares_parameters(config: Config, mesh: Mesh, hardware: Hardware | None) -> bool:
    """Whether ranks have parameters, each its part, in memory that they share."""
    is_one_host = hardware is not None and hardware.device_type == "cpu" and hardware.reads_peers
    return is_one_host and config.zero == 3 and mesh.size > 1 and "parameters" not in (config.offload or ())


def _bounds(config: Config, mesh: Mesh, hardware: Hardware | None) -> Bounds:
    known = _known(hardware, f"bucket_bytes={config.bucket_bytes!r} weighs seconds", "give a number of bytes")
    return Bounds(known, mesh, config.zero)


def _order(config: Config, hardware: Hardware | None, sizes: int | None) -> Pass:
    """By cost, or at a fixed distance where that is asked for or no machine says what calls cost."""
    if hardware is None or config.prefetch is not None:
        limit = FAR if sizes is None else sizes
        return Overlap(1 if config.prefetch is None else config.prefetch, limit)
    return Schedule(hardware, config.in_flight)


def _fuse(config: Config, hardware: Hardware | None, then: tuple[Pass, ...]) -> Pass:
    if config.kernels != "auto":
        return FuseRegions(then, compilers=(config.kernels,))
    known = _known(hardware, "kernels='auto' weighs seconds", "give kernels='zgraph'")
    return FuseRegions(then, known, compilers=("zgraph", "inductor"))


def _recompute(
    config: Config, hardware: Hardware | None, then: tuple[Pass, ...], levels: Levels | None
) -> tuple[Pass, ...]:
    what = config.recompute
    if what is None or what == 0:
        return ()
    if isinstance(what, tuple):
        return (RecomputeModules(what),)
    if isinstance(what, str):
        return (RecomputeModules(keep=EXPENSIVE if what == "operators" else ()),)
    known = _known(hardware, f"recompute={what!r} weighs bytes against seconds", "give recompute='blocks'")
    return (RecomputeActivations(what, known, then, config.recompute_solver, levels),)


__all__ = [
    "AverageGradients",
    "CastBeforeGather",
    "FormBuckets",
    "FuseRegions",
    "GatherInLowPrecision",
    "GatherQuantized",
    "JoinLossBackward",
    "KeepSecondaryShards",
    "Levels",
    "Offload",
    "OffloadActivations",
    "OrderByMemory",
    "Overlap",
    "OverwriteOperands",
    "QuantizeState",
    "ReadGathered",
    "ReadParamsEarly",
    "RecomputeActivations",
    "RecomputeModules",
    "ReduceInLowPrecision",
    "ReduceQuantized",
    "Schedule",
    "ShardGradients",
    "ShardOptimizer",
    "ShardParams",
    "ShareMemory",
    "Tidy",
    "TileProducts",
    "Unshard",
    "UpdateInPlace",
    "default_passes",
]
