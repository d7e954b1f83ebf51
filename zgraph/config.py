"""Every option of ``zgraph.compile``, once: name, default, unit, meaning, range."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from zgraph.errors import OptionError
from zgraph.hardware import LOWER_TIERS
from zgraph.program import Mesh

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(value: int | str, option: str) -> int:
    """Bytes as an integer, from an integer or a string such as ``"16MiB"`` or ``"2GB"``.

    Raises:
        OptionError: the value is not a positive number of bytes.
    """
    num_bytes: Any = value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if match and match[2].upper() in _UNITS:
        num_bytes = round(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes <= 0:
        raise OptionError(
            f"{option}={value!r} is not a positive number of bytes",
            fix=f"write an integer or a string such as {option}='16MiB'; units are KiB, MiB, GiB, TiB, KB, MB, GB, TB",
        )
    return num_bytes


PRECISIONS: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

RECOMPUTE = ("blocks", "operators")
"""What ``recompute`` may be besides a number and a list of modules."""


ARGUMENTS = ("loss", "memory", "metrics", "weight")
"""What ``zgraph.compile`` and ``zgraph.plan`` both take by name besides options."""

_TINY = 2.0**-100
"""A loss scale that is far enough from what float32 has no normal numbers for."""

_RANGES = (("zero", 0, 3), ("prefetch", 0, 64), ("accumulate", 1, 2**20), ("loss_scale_interval", 1, 2**62))


BUCKET_BYTES = 16 * 2**20
"""Of a bucket, where the cost model does not say where it ends."""

BY_COST = "auto"
"""What ``bucket_bytes`` may be besides a number of bytes, and ``offload`` besides what lies where."""

KERNELS = ("update", "auto", "zgraph", "inductor", "eager")
"""What ``kernels`` may be."""

IN_FLIGHT = (0, 1, 2, 4, 8, None)
"""How many buckets may be in flight beyond the peak, fewest first; None is any number."""

_NUMBERS = {"ema": 1.0, "gradient_noise": sys.float_info.max}
"""Options that are inputs of the step: how large each may be. None may be less than 0."""


def check_numbers(numbers: Mapping[str, Any], config: Config) -> None:
    """Refuse numbers that a step cannot be given.

    Args:
        numbers: of a step, by option.
        config: what the step was compiled with.

    Raises:
        OptionError: one is out of range, missing, or for what the step does not do.
    """
    if numbers.keys() != config.numbers().keys():
        odd = sorted(numbers.keys() ^ config.numbers().keys())[0]
        known = odd in config.numbers()
        raise OptionError(
            f"the recipe has {'no ' if known else ''}{odd!r}",
            fix=f"set it to a number; its keys are {sorted(config.numbers()) or 'none'}"
            if known
            else f"give the option {odd} to zgraph.compile, or leave it out",
        )
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= _NUMBERS[name]:
            raise OptionError(f"{name}={value!r} is out of range", fix=f"give a number from 0 to {_NUMBERS[name]}")


WAITED_FOR = {tier: f"{tier}, waited for" for tier in LOWER_TIERS}
"""Where ``offload`` may keep activations even if computing waits for them then, by tier."""

_TIERS = tuple(LOWER_TIERS)
OFFLOADED = {
    "optimizer": _TIERS,
    "parameters": _TIERS,
    "gradients": _TIERS,
    "activations": (*_TIERS, *WAITED_FOR.values()),
}
"""What may lie elsewhere than in the memory that is computed in, and where."""


def activations_on(offload: Mapping[str, str]) -> tuple[str, bool]:
    """The tier that activations go to, and whether computing may wait for them."""
    given = offload["activations"]
    return given.split(",")[0], given in WAITED_FOR.values()


def _check_offload(config: Config) -> None:
    fix = "give offload={'optimizer': 'disk', 'parameters': 'disk'}, or one of them, or None"
    given: Any = config.offload
    if given is not None and given != BY_COST:
        if not isinstance(given, dict) or not given:
            raise OptionError(f"offload={given!r} does not say what lies where", fix=fix)
        for what, tier in given.items():
            if what not in OFFLOADED:
                known = ", ".join(map(repr, OFFLOADED))
                raise OptionError(
                    f"offload={given!r}: {what!r} is none of what can be moved: {known}",
                    fix=_nearest(what, OFFLOADED, fix),
                )
            if tier not in OFFLOADED[what]:
                known = " or ".join(map(repr, OFFLOADED[what]))
                raise OptionError(
                    f"offload={given!r}: {what!r} can lie on {known}, not on {tier!r}",
                    fix=_nearest(tier, OFFLOADED[what], f"say one of them for {what!r}: 'disk' on a CPU"),
                )
    if isinstance(given, dict) and "gradients" in given and not keeps_gradients(config):
        raise OptionError(
            "offload of gradients with accumulate=1 and without clip_norm, where each dies in the update of its bucket",
            fix="leave gradients out, or give accumulate=2 or more, clip_norm, or precision='fp16'",
        )
    path: Any = config.offload_path
    if path is not None and (not isinstance(path, str) or not path or "\0" in path):
        raise OptionError(f"offload_path={path!r} is no path", fix="give the directory as a string")
    if path is not None and given is None:
        raise OptionError("offload_path without offload", fix=fix)
    if path is not None and isinstance(given, dict) and not uses_disk(given):
        raise OptionError(f"offload_path, and with offload={given!r} nothing lies on a disk", fix="leave it out")
    if config.host_updates and given != BY_COST and not may_update_on_host(config):
        raise OptionError(
            f"host_updates with offload={given!r}: it is for parameters and optimizer state on the host, and nothing "
            "on a disk",
            fix="say offload={'parameters': 'host', 'optimizer': 'host'}, or leave it out",
        )
    if config.load_ahead and given != BY_COST and not may_load_ahead(config):
        raise OptionError(
            f"load_ahead with offload={given!r}: it is for optimizer state on the host, where no activations go there",
            fix="say offload={'optimizer': 'host'}, or leave it out",
        )


def _nearest(given: Any, known: Iterable[str], otherwise: str) -> str:
    """A way out for what may be misspelt."""
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"say {near[0]!r}" if near else otherwise


def keeps_gradients(config: Config) -> bool:
    """Whether gradients live longer than to the update of their bucket: for their sum, or until all are known."""
    return config.accumulate > 1 or config.clip_norm is not None or config.scales_loss


def may_update_on_host(config: Config) -> bool:
    """Whether parameters and all that is theirs may lie on the host, and what is spilled as well."""
    given = config.offload
    if not isinstance(given, dict) or uses_disk(given):
        return False
    return given.get("optimizer") == given.get("parameters") == "host"


def uses_disk(offload: Mapping[str, str] | str | None) -> bool:
    """Whether something is said to lie on a disk."""
    return isinstance(offload, Mapping) and any(tier.startswith("disk") for tier in offload.values())


def may_load_ahead(config: Config) -> bool:
    """Whether optimizer state lies on the host, and no activations go to a lower tier, by which the peak changes."""
    given = config.offload
    return isinstance(given, dict) and given.get("optimizer") == "host" and "activations" not in given


def _check_tiles(config: Config) -> None:
    if config.tile_bytes is None:
        return
    if config.zero < 3:
        raise OptionError(
            f"tile_bytes={config.tile_bytes} with zero={config.zero}, where parameters are whole in any case",
            fix="give zero=3, or leave it out",
        )
    for name in ("keep_gathered", "secondary_size", "gather_precision", "reduce_precision"):
        given = getattr(config, name)
        if given:
            raise OptionError(
                f"tile_bytes={config.tile_bytes} with {name}={given!r}, which is for whole buckets",
                fix="leave one of them out",
            )


def _names(value: Any, option: str, example: str) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise OptionError(f"{option}={value!r} is not a list of names", fix=f"give {option}={example}")
    return names


def _patterns(value: Any) -> tuple[str, ...]:
    known = f"a number from 0 to 1, {', '.join(map(repr, RECOMPUTE))}, a list of module paths, or None"
    if isinstance(value, str):
        raise OptionError(f"recompute={value!r} is not known", fix=f"give {known}")
    patterns = _names(value, "recompute", "['encoder', 'decoder.layers.*']")
    if not patterns or "" in patterns:
        raise OptionError(f"recompute={value!r} names no module", fix=f"give {known}")
    return patterns


def _recompute(value: Any) -> str | tuple[str, ...] | float | None:
    if value is None or (isinstance(value, str) and value in RECOMPUTE):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _patterns(value)
    if not 0 <= value <= 1:
        raise OptionError(f"recompute={value!r} is out of range", fix="give a number from 0 to 1")
    return float(value)


@dataclass(frozen=True)
class Config:
    """Options of ``zgraph.compile``.

    With ``memory=``, those that ``zgraph.choices`` lists are chosen by it where they are not given; the defaults below
    are for a step without.

    Attributes:
        zero: ZeRO stage (Rajbhandari et al., 2020): 0 averages gradients; 1 also shards optimizer
            state; 2 also shards gradients; 3 also shards parameters.
        bucket_bytes: parameters that are used near each other share one flat buffer of about this many
            bytes, and travel together. A parameter larger than this has a bucket of its own. ``"auto"``: the cost model
            says where each bucket ends (``zgraph.passes.bounds``): larger ones where links would wait for each other's
            latency, smaller ones where nothing hides them, and not larger where that saves less than a thousandth of a
            step. By default that is so on several GPUs that are known (``zgraph doctor`` says). It is 16 MiB on CPUs,
            whose cores move what travels and hide nothing, on a single rank, with ``prefetch``, which counts buckets,
            and where no machine is known. With ``memory=`` both are tried, and other sizes.
        prefetch: how many buckets ahead of their first use parameters are gathered (ZeRO-3). By default the cost model
            says when what travels is sent and when it is waited for (``zgraph.passes.Schedule``); on a GPU that is not
            known, and has not been calibrated, that is one bucket ahead.
        in_flight: how many buckets, of the average size of those that travel, may be in flight on top of the most that
            a step holds if none is; where other memory is free, some are in any case. 0, 1, 2, 4, 8, or None for any
            number. More are taken only where the step is predicted to be faster by them.
        shard_size: so many ranks that follow each other, those of a node, divide state among them, and every node has a
            copy of all of it: only means of gradients, a ``shard_size``-th of them for each rank, travel between nodes
            (hybrid sharding: FSDP's HSDP; MiCS, Zhang et al., 2022). It must divide the number of ranks. By default all
            ranks divide state.
        secondary_size: with ZeRO-3 over all ranks: so many ranks that follow each other, those of a node, keep what
            forward has gathered of parameters, divided among them, and gather it from each other for backward: half as
            much of them travels between nodes, for the memory of a ``secondary_size``-th of them in the dtype in which
            they travel (ZeRO++'s hpZ: Wang et al., 2023). It must divide the number of ranks; where it is all of them,
            there is one node, and nothing to keep.
        precision: None computes in the dtypes that the model has. ``"bf16"`` computes forward and backward in bfloat16
            as ``torch.autocast`` does: matrix products, convolutions and attention in bfloat16, losses and other sums
            in float32. Parameters, their gradients' means and optimizer state stay float32; what travels of a parameter
            is what is read of it. ``"fp16"`` does so in float16, with a loss scale as ``torch.amp.GradScaler`` has it:
            a step with a gradient that is not finite changes nothing on any rank, and is counted.
        loss_scale: for float16: what the loss is multiplied by in the first step. A step that is skipped halves it.
        loss_scale_interval: for float16: so many steps in a row that are not skipped double it.
        keep_float32: names of modules, or of parameters, whose modules compute in float32 all the same.
        reduce_precision: ``"bf16"`` averages gradients over the ranks in bfloat16: half the bytes travel, and the mean
            is off by at most ``(ranks + 1) / 256`` of the mean magnitude of an element, to first order. ``"int8"``,
            with ZeRO-2 and 3, sends float32 gradients in 8 bits an element and a scale for each 256 of them, and adds
            them up in float32: each is off by at most 1/254 of the largest magnitude among its 256. By default they
            travel as they are: in float32 for parameters in float32.
        gather_precision: with ZeRO-3: how float32 parameters travel to forward and backward, which compute with what
            arrives. ``"bf16"``: half the bytes travel of what is read in float32, and each element is off by at most
            2^-8 of it. ``"int8"``: 8 bits an element and a scale for each 256 of them, also of what is read in 16 bits;
            an element is off by at most 1/254 of the largest magnitude among its 256. What is updated, saved and
            evaluated keeps its precision. By default all travels in the dtype in which it is read.
        state_precision: ``"int8"`` keeps float32 optimizer state in 8 bits an element and a scale for each 256 of them,
            where the update treats every element alike; ``optimizer.state_dict()`` has it in float32.
            ``zgraph.packed`` bounds the error. It is for moments: an optimizer that keeps weights in its state (ASGD's
            average, a wide copy) would have them in 8 bits, too. By default state is as the optimizer makes it.
        recompute: what backward computes again instead of keeping it since forward. A number from 0 to 1: how far to go
            from the peak with all kept, which is 0, to the lowest that computing again can reach, which is 1, by
            dropping single tensors: those that lower the peak most for the seconds that they cost on the machine. It
            needs no blocks. A higher number never has less to compute, nor a higher peak than a quarter (0.25, 0.5,
            0.75) below it. ``"blocks"``: all that lies within a block, of which only what goes in is kept; blocks are
            the members of lists (``nn.ModuleList``, ``nn.Sequential``) of which two or more compute alike.
            ``"operators"``: the same, but for the results of matrix products, convolutions and attention, which are
            kept, too, as they take most of the time. A list of patterns of module paths, such as
            ``["encoder", "decoder.layers.*"]``: each of these modules is a block.
            What draws random numbers, as dropout and attention with dropout do, never runs again: its results are kept.
            By default all is kept.
        recompute_solver: for a number as ``recompute``: ``"milp"`` finds the fastest choice that goes as far, by SciPy,
            for steps with up to 64 activations. By default a search finds one that is near it, for any step.
        accumulate: how many micro-batches a step has. Their gradients add up, and the update reads the mean.
        keep_gathered: with ZeRO-3 and several micro-batches: gather parameters once for all micro-batches of a step and
            keep them whole until its update, instead of twice for each micro-batch. It takes the memory of all
            parameters, in the dtype in which they are read.
        unshard: with ZeRO-3: of the bytes that are gathered for forward and again for backward, the share, from 0 to
            1, that may stay whole in between: 1 is ``reshard_after_forward=False`` of FSDP. Those stay whose second
            gathers hold backward up the longest. By default only what stays without a higher peak does.
        tile_bytes: with ZeRO-3 on several ranks: how many bytes are gathered at a time of a matrix that is larger, has
            a bucket of its own and is read by products of matrices alone, as the head of a language model is; its
            gradient is made and reduced a tile at a time, and so is that of an embedding's table (memory-centric
            tiling: ZeRO-Infinity, Rajbhandari et al., 2021, section 5.1.3). Every element is the same sum as in the
            whole product, up to the order in which a library adds up for another width. By default a matrix is whole
            where it is read.
        offload: where what a step does not need all the time lies instead of in memory: on a CPU ``"disk"``, as here,
            and on a GPU ``"host"``, the memory of its host, or ``"disk"``, each as large as it is: ``{"parameters":
            "host", "optimizer": "disk"}``. ``{"optimizer": "disk"}``
            keeps vectors of optimizer state on a disk: each bucket's come from there for its update, and go back, while
            others are computed. ``"parameters": "disk"`` does so with what each rank stores of parameters, which come
            for forward, for backward and for their update. ``"gradients": "disk"`` does so with
            their sums over micro-batches (``accumulate``), and with gradients that wait until all are known
            (``clip_norm``, and float16). ``"activations": "disk"`` spills what forward leaves for
            backward, as much as the disk is predicted to take and give back while other calls compute; ``"disk, waited
            for"`` spills all that lowers the peak, and lets them wait. With ``memory=``, ``"auto"`` keeps
            there what the budget has no room for, where that is faster than other ways to take less memory.
        offload_path: the directory, on a local disk, for files without names that are gone when the process ends; by
            default ``/var/tmp``.
        load_ahead: load optimizer state that lies on the host as far ahead of its update as adds nothing to what is
            live at the peak, and wait for its way back as late, instead of one bucket ahead. The link rests less;
            PyTorch's allocator may take more, as buckets of unlike sizes come and go in another order.
        host_updates: let the processors of a GPU's host update parameters that lie on the host with all their state,
            where they lie: a gradient goes there, and nothing comes but parameters for forward and backward. The host
            has room for a few gradients on their way. What is not elementwise is updated on the GPU in any case.
            Rounding may differ from a GPU's in the last bit.
        memory_first: compute in another order where that lowers the peak (``zgraph.passes.OrderByMemory``): values are
            made later, or read for the last time earlier, as what depends on what allows. Results stay the same, bit
            for bit. By default a step computes in the order of the model and of autograd.
        clip_norm: scale all gradients down by one factor where the norm of all of them together is larger than this
            (``torch.nn.utils.clip_grad_norm_``); None does not. A step whose norm is infinite or NaN changes nothing
            on any rank, and is counted.
        clip_value: move each element of a gradient to the nearest number between ``-clip_value`` and ``clip_value``
            (``torch.nn.utils.clip_grad_value_``); None does not.
        gradient_noise: the standard deviation of normal noise in the gradients that are clipped and updated with, all
            ranks and micro-batches together, where each rank draws from a seed of its own;
            ``recipe["gradient_noise"]`` may change from step to step. Not for float16, whose gradients are scaled, nor
            with a ``weight`` of batches.
        ema: keep an average of the trained weights, of which a step keeps this much: between 0 and 1. It starts as the
            weights are; a step that is skipped leaves it. See ``CompiledModule.ema_state_dict``; ``recipe["ema"]`` of
            a compiled model may change from step to step.
        kernels: ``"update"`` runs the update of a bucket as one kernel, where its operators and dtypes allow it: in
            Triton on a GPU, in C++ on a CPU with a compiler (``zgraph.codegen``); all else is ATen's, so a step rounds
            as PyTorch does. ``"auto"`` makes kernels of forward and backward, too, where that is predicted to be
            faster on this machine: of elementwise calls, norms, softmax, losses and sums that feed each other
            (``zgraph.passes.FuseRegions``). They round otherwise than ATen does, no worse. ``"zgraph"`` makes every
            one that there can be, and ``"inductor"`` leaves them to TorchInductor. ``"eager"`` runs all of it operator
            by operator.
        check_collectives: before each collective of a step all ranks compare which one they are about to start, and
            stop with both names if they differ. For finding out why ranks part: it makes steps slower.
        check_memory: after each call of a step, count the bytes of the tensors that it holds, and stop at the first
            call where they are more than was predicted by over ``zgraph.memory_check.TOLERANCE``, with the line of the
            model. For finding out why a step takes more than its plan: it makes steps slower.
    """

    zero: int = 3
    bucket_bytes: int | str | None = None
    prefetch: int | None = None
    in_flight: int | None = 2
    shard_size: int | None = None
    secondary_size: int | None = None
    precision: str | None = None
    loss_scale: float = 2.0**16
    loss_scale_interval: int = 2000
    keep_float32: tuple[str, ...] = ()
    reduce_precision: str | None = None
    gather_precision: str | None = None
    state_precision: str | None = None
    recompute: str | tuple[str, ...] | float | None = None
    recompute_solver: str | None = None
    accumulate: int = 1
    keep_gathered: bool = False
    unshard: float = 0.0
    tile_bytes: int | None = None
    offload: dict[str, str] | str | None = field(default=None, hash=False)
    offload_path: str | None = None
    load_ahead: bool = False
    host_updates: bool = False
    memory_first: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None
    gradient_noise: float | None = None
    ema: float | None = None
    kernels: str = "update"
    check_collectives: bool = False
    check_memory: bool = False

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Config:
        """Build from keyword options, refusing unknown names and values out of range.

        Raises:
            OptionError: naming the option, what was given, and what is allowed.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                known += [each for each in ARGUMENTS if each != name]  # which not every function takes
                near = difflib.get_close_matches(name, known, n=1)
                raise OptionError(
                    f"unknown option {name!r}",
                    fix=(f"did you mean {near[0]!r}? " if near else "") + f"options are: {', '.join(known)}",
                )
        values = dict(options)
        if "keep_float32" in values:
            values["keep_float32"] = _names(values["keep_float32"], "keep_float32", "['head', 'norm']")
        if "recompute" in values:
            values["recompute"] = _recompute(values["recompute"])
        if values.get("bucket_bytes") not in (None, BY_COST):
            values["bucket_bytes"] = parse_bytes(values["bucket_bytes"], "bucket_bytes")
        if values.get("tile_bytes") is not None:
            values["tile_bytes"] = parse_bytes(values["tile_bytes"], "tile_bytes")
        if isinstance(values.get("offload_path"), (str, os.PathLike)):
            values["offload_path"] = os.path.expanduser(values["offload_path"])
        config = cls(**values)
        for name, low, high in _RANGES:
            value = getattr(config, name)
            if value is None and name == "prefetch":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                or_none = ", or None" if name == "prefetch" else ""
                raise OptionError(
                    f"{name}={value!r} is out of range", fix=f"give an integer from {low} to {high}{or_none}"
                )
        if isinstance(config.in_flight, bool) or config.in_flight not in IN_FLIGHT:
            raise OptionError(
                f"in_flight={config.in_flight!r} is none of {', '.join(map(str, IN_FLIGHT))}", fix="choose one of them"
            )
        if "in_flight" in options and config.prefetch is not None:
            raise OptionError(
                f"in_flight with prefetch={config.prefetch}, which says how far ahead gathers are",
                fix="leave one of them out",
            )
        for name, least in (("shard_size", 1), ("secondary_size", 2)):
            ranks: Any = getattr(config, name)
            if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < least):
                raise OptionError(f"{name}={ranks!r} is no number of ranks", fix=f"give {least} or more, or None")
        if config.secondary_size is not None and (config.zero < 3 or config.shard_size is not None):
            given = f"zero={config.zero}" if config.zero < 3 else f"shard_size={config.shard_size}"
            raise OptionError(
                f"secondary_size with {given}: backward gathers nothing from other nodes",
                fix="give zero=3 alone, or leave it out",
            )
        if config.secondary_size is not None and config.keep_gathered:
            raise OptionError(
                "secondary_size with keep_gathered, which gathers nothing for backward", fix="leave one of them out"
            )
        if config.secondary_size is not None and (config.gather_precision == "int8" or config.unshard):
            given = f"unshard={config.unshard}" if config.unshard else "gather_precision='int8'"
            raise OptionError(
                f"secondary_size with {given}, which is for what is gathered from all ranks twice",
                fix="leave one of them out",
            )
        if config.shard_size is not None and config.zero == 0:
            raise OptionError("shard_size with zero=0, which divides nothing", fix="give zero=1, 2 or 3, or omit it")
        if config.precision is not None and config.precision not in tuple(PRECISIONS):
            known_ones = " or ".join(map(repr, PRECISIONS))
            raise OptionError(f"precision={config.precision!r} is not known", fix=f"give {known_ones}, or None")
        if config.gradient_noise is not None and config.precision == "fp16":
            raise OptionError(
                "gradient_noise with precision='fp16', whose gradients are scaled", fix="use bf16, or leave it out"
            )
        for name in ("reduce_precision", "gather_precision"):
            if getattr(config, name) not in (None, "bf16", "int8"):
                raise OptionError(
                    f"{name}={getattr(config, name)!r} is not known", fix="give 'bf16' or 'int8', or None"
                )
        if config.reduce_precision == "int8" and config.zero < 2:
            raise OptionError(
                f"reduce_precision='int8' with zero={config.zero}, where every rank needs the whole mean",
                fix="give zero=2 or 3, or reduce_precision='bf16'",
            )
        if config.reduce_precision == "int8" and config.shard_size is not None:
            raise OptionError(
                f"reduce_precision='int8' with shard_size={config.shard_size}: means of nodes would be rounded again",
                fix="give reduce_precision='bf16', or leave one of them out",
            )
        if config.gather_precision is not None and config.zero < 3:
            raise OptionError(
                f"gather_precision={config.gather_precision!r} with zero={config.zero}, where what the ranks share is "
                "what they keep",
                fix="give zero=3, or leave it out",
            )
        if config.gather_precision == "int8" and config.keep_gathered:
            raise OptionError(
                "gather_precision='int8' with keep_gathered, which keeps what is read", fix="give 'bf16', or None"
            )
        if config.kernels not in KERNELS:
            known_ones = ", ".join(map(repr, KERNELS))
            raise OptionError(f"kernels={config.kernels!r} is not known", fix=f"give one of {known_ones}")
        if config.state_precision not in (None, "int8"):
            raise OptionError(f"state_precision={config.state_precision!r} is not known", fix="give 'int8', or None")
        if config.recompute_solver not in (None, "milp"):
            raise OptionError(f"recompute_solver={config.recompute_solver!r} is not known", fix="give 'milp', or None")
        if config.recompute_solver is not None and not isinstance(config.recompute, float):
            raise OptionError(
                f"recompute_solver with recompute={config.recompute!r}", fix="give a number from 0 to 1 as recompute"
            )
        _check_offload(config)
        for name in ("loss_scale", "loss_scale_interval"):
            if name in options and config.precision != "fp16":
                raise OptionError(f"{name} is for precision='fp16'", fix="leave it out")
        scale: float | None = config.loss_scale
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not is_number or scale is None or not _TINY <= scale <= 1 / _TINY:
            raise OptionError(f"loss_scale={scale!r} is out of range", fix="give a number such as 65536.0")
        if config.keep_float32 and config.precision is None:
            raise OptionError("keep_float32 without a precision", fix="give precision='bf16', too, or leave it out")
        for name in ("clip_norm", "clip_value", "loss_scale"):
            value = getattr(config, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
                raise OptionError(
                    f"{name}={value!r} is not a positive number", fix="give a number such as 1.0, or None"
                )
        if config.clip_norm is not None and config.clip_value is not None:
            raise OptionError(
                "clip_norm and clip_value are both given", fix="choose one: clipping twice is not what either says"
            )
        check_numbers(config.numbers(), config)
        for name in (
            "check_collectives",
            "check_memory",
            "host_updates",
            "keep_gathered",
            "load_ahead",
            "memory_first",
        ):
            if not isinstance(getattr(config, name), bool):
                raise OptionError(f"{name}={getattr(config, name)!r} is not a bool", fix="give True or False")
        if config.keep_gathered and (config.zero < 3 or config.accumulate == 1):
            raise OptionError(
                f"keep_gathered with zero={config.zero} and accumulate={config.accumulate}",
                fix="give zero=3 and accumulate=2 or more: otherwise nothing is gathered more often than it must be",
            )
        share: Any = config.unshard
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise OptionError(f"unshard={share!r} is not a share", fix="give a number from 0 to 1")
        if share and (config.zero < 3 or config.keep_gathered):
            why = "keep_gathered" if config.keep_gathered else f"zero={config.zero}"
            raise OptionError(
                f"unshard={share} with {why}, where no backward gathers what its forward has gathered",
                fix="leave one of them out",
            )
        _check_tiles(config)
        return config

    def given(self) -> dict[str, Any]:
        """Options that differ from their defaults; the stage in any case."""
        return {name: value for name, value in vars(self).items() if name == "zero" or value != getattr(Config, name)}

    def mesh(self, world: int) -> Mesh:
        """The mesh of so many ranks.

        Raises:
            OptionError: ``shard_size`` or ``secondary_size`` does not fit it.
        """
        for name in ("shard_size", "secondary_size"):
            size: int | None = getattr(self, name)
            if size is not None and world == 1:
                raise OptionError(f"{name}={size} on a single rank", fix="run on several ranks, or leave it out")
            if size is not None and world % size:
                first = 1 if name == "shard_size" else 2
                fitting = ", ".join(str(n) for n in range(first, world + 1) if world % n == 0)
                raise OptionError(f"{name}={size} does not divide the {world} ranks", fix=f"give one of {fitting}")
        return Mesh(world, shard=self.shard_size, secondary=self.secondary_size)

    def inputs(self, numbers: Mapping[str, float], world: int) -> dict[str, float]:
        """What a step on ``world`` ranks is given for the ``numbers`` of its recipe.

        The mean of n independent noises has a standard deviation of theirs by the root of n.
        """
        inputs = {name: float(number) for name, number in numbers.items()}
        if "gradient_noise" in inputs:
            inputs["gradient_noise"] *= math.sqrt(world * self.accumulate)
        return inputs

    def numbers(self) -> dict[str, float]:
        """Options that are given and may change from step to step, by name."""
        return {name: getattr(self, name) for name in _NUMBERS if getattr(self, name) is not None}

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled for backward."""
        return self.precision == "fp16"
