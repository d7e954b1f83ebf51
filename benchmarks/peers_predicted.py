"""Published training steps as zgraph sees them: which model, which passes, which machine, and what is left out and why.

A row of the collection says what was trained, by which software, on what. ``case_of`` turns it into a ``Case``; a row
that zgraph has no model of is refused with the reason. What is said of a software here is how it works, from its own
sources, and holds for all of its rows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from zgraph.hardware import Hardware
from zgraph.presets import ALL_BIASES, ModelConfig, num_params
from zgraph.which_hardware import find_hardware


class NotUsedError(Exception):
    """Why a row is not predicted."""


@dataclass(frozen=True)
class Software:
    """How a trainer runs a step, as far as it differs from zgraph.

    Attributes:
        name: of the class that errors are told for.
        fused: a compiler fuses pointwise operators: of ``all`` the step, of ``blocks`` alone, or of nothing.
        clip: gradients are clipped by their norm.
        reduce: the dtype in which gradients are averaged.
        copies_out: what is gathered is copied from the flat buffer to each parameter (FSDP2, per-parameter sharding).
        every_second: selective recomputation keeps every second matrix product only (torchtitan).
        optimizer_passes: reads and writes of an element's state by the optimizer beside those of one fused kernel.
        gathers_half: what ZeRO-1 gathers after the update is bfloat16.
        flash_1: attention is FlashAttention's first version.
        broadcasts: each rank sends what it has updated to all others, one rank after the other.
        keeps_last: backward of the last block reads what forward has gathered (torchtitan).
        keeps_root: what belongs to no block stays gathered until backward ends, as in FSDP1's and FSDP2's root module.
        ahead: gathers that the host issues before memory that another stream has used, and that was freed, may be used
            again: FSDP1 frees by ``record_stream``, limits itself to two (``limit_all_gathers``), and gathers the next
            block in advance. FSDP2 waits for events instead.
        reduces_last: gradients are averaged over the ranks with the last micro-batch only.
    """

    name: str
    fused: str = ""
    clip: bool = True
    reduce: str = "float32"
    copies_out: bool = False
    every_second: bool = False
    optimizer_passes: float = 1.0
    gathers_half: bool = False
    reduces_last: bool = False
    flash_1: bool = False
    broadcasts: bool = False
    keeps_last: bool = False
    keeps_root: bool = False
    ahead: int = 0


@dataclass(frozen=True)
class Case:
    """What is predicted of a row.

    Attributes:
        id, source: of the row.
        model: its shape.
        batch: sequences of a micro-batch.
        seq: tokens of a sequence.
        accumulate: micro-batches of a step.
        zero: stage.
        world: ranks that share the state; ``ranks``, all of them.
        recompute: None, ``blocks`` or ``operators``.
        software: how the step is run.
        machine: preset; with devices of a node, and the rate of its network if it is stated.
        devices, nic: of a node; bytes per second of one device, None for the usual.
        tokens_s: measured, of one device; None if it was not.
        peak_gib: measured; None if it was not, or not in a way that can be predicted.
        peak_kind: ``reserved`` or ``allocated``.
        is_complete: the network between nodes is stated, or there is one node.
        dtype: that the model computes in.
        keeps_gathered: parameters stay whole from forward to backward (SHARD_GRAD_OP).
    """

    id: str
    source: str
    trust: str
    model: ModelConfig
    batch: int
    seq: int
    accumulate: int
    zero: int
    world: int
    ranks: int
    recompute: str | None
    software: Software
    machine: str
    devices: int
    nic: float | None
    tokens_s: float | None
    peak_gib: float | None
    peak_kind: str
    is_complete: bool = True
    keeps_gathered: bool = False
    dtype: str = "bfloat16"

    def hardware(self) -> Hardware:
        """The machine."""
        return find_hardware(self.machine, devices_per_node=self.devices, nic_bytes_per_s=self.nic)


Row = Mapping[str, str]

COLUMNS = (
    "id", "category", "model", "params", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq_len",
    "micro_batch", "global_batch", "grad_accum", "precision", "activation_ckpt", "parallelism", "shard_degree",
    "offload", "gpu", "n_gpus", "n_nodes", "interconnect", "software", "step_time_s", "tokens_s_gpu", "peak_mem",
    "peak_mem_unit", "peak_mem_kind", "trust", "source",
)  # fmt: skip
"""What is read of a row; others are ignored, and one that is missing is as if it were blank."""


def complete(row: Mapping[str | None, str | None]) -> Row:
    """A row with all columns, none of them None, and no blanks around values."""
    return {name: (row.get(name) or "").strip() for name in COLUMNS}


_MACHINES = (
    (r"H100-96GB", "H100-96"),
    (r"H100", "H100"),
    (r"H200", "H200"),
    (r"A100-40", "A100-40"),
    (r"A100-80|A800-80|A100 SXM 80", "A100-80"),
    (r"^B200", "B200"),
    (r"MI300X", "MI300X"),
    (r"V100-32", "V100-32"),
    (r"L40S", "L40S"),
    (r"^L4\b", "L4"),
)


def case_of(row: Row) -> Case:
    """What to predict of a row.

    Raises:
        NotUsedError: zgraph has no model of it, or it does not say enough.
    """
    if row["category"] != "train":
        raise NotUsedError("not a training step")
    tokens_s, peak_gib, peak_kind = _measured(row)
    _check_kind(row)
    count = {name: _integer(row, name) for name in ("layers", "hidden", "heads", "vocab", "seq_len", "micro_batch")}
    missing = [name for name, value in count.items() if value is None]
    ffn = row["ffn"]
    if "exp" in ffn:
        raise NotUsedError("mixture of experts")
    if missing or not ffn.isdigit():
        raise NotUsedError("incomplete configuration")
    ranks, batch, seq = _integer(row, "n_gpus"), count["micro_batch"] or 0, count["seq_len"] or 0
    if ranks is None:
        raise NotUsedError("incomplete configuration")
    accumulate = _integer(row, "grad_accum")
    whole = _integer(row, "global_batch")
    if accumulate is None:
        if whole is None or whole % (batch * ranks):
            raise NotUsedError("incomplete configuration")
        accumulate = whole // (batch * ranks)
    machine = next((name for pattern, name in _MACHINES if re.search(pattern, row["gpu"])), None)
    if machine is None:
        raise NotUsedError("unknown GPU")
    software = _software(row)
    zero, world = _sharding(row, ranks)
    nodes = _integer(row, "n_nodes") or -(-ranks // 8)
    devices = max(ranks // nodes, 1)
    nic, is_stated = _nic(row["interconnect"], devices)
    return Case(
        row["id"], row["source"], row["trust"], _model(row, seq), batch, seq, accumulate, zero, world, ranks,
        _recompute(row, software), software, machine, devices, nic, tokens_s, peak_gib, peak_kind,
        is_complete=is_stated or nodes == 1,
        dtype="bfloat16" if "bf16" in row["precision"] and machine != "V100-32" else "float16",
        keeps_gathered=zero == 3 and ("SHARD_GRAD_OP" in row["parallelism"] or "reshard=never" in row["software"]),
    )  # fmt: skip


def _integer(row: Row, name: str) -> int | None:
    return int(row[name]) if row[name].isdigit() and int(row[name]) > 0 else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _measured(row: Row) -> tuple[float | None, float | None, str]:
    """Tokens per second and device; GiB of peak memory, and what they count."""
    tokens_s = _number(row["tokens_s_gpu"])
    if tokens_s is None and (step_s := _number(row["step_time_s"])) is not None:
        per_step = [_integer(row, name) for name in ("micro_batch", "grad_accum", "seq_len")]
        if all(per_step):
            tokens_s = per_step[0] * per_step[1] * per_step[2] / step_s  # type: ignore[operator]
    kind = row["peak_mem_kind"]
    peak = _number(row["peak_mem"])
    name = "reserved" if "reserved" in kind else "allocated" if "allocated" in kind else ""
    if not name:
        peak = None
    if peak is not None and row["peak_mem_unit"].startswith("GB") and "2^30" not in row["peak_mem_unit"]:
        # torch's own counters are told in GiB, whatever the unit is called, unless the row says 1e9.
        peak = peak * 1e9 / 2**30 if "1e9" in row["peak_mem_unit"] else peak
    if tokens_s is None and peak is None:
        raise NotUsedError("neither throughput nor allocator's peak is given")
    return tokens_s, peak, name


def _check_kind(row: Row) -> None:
    """Refuse what zgraph does not do."""
    text, precision = row["parallelism"].lower(), row["precision"].lower()
    if re.search(r"\b(tp|pp|ep|cp|sp|dp\d+ x )[2-9]|\b(tp|pp|cp)\d\d|ulysses|async", text):
        raise NotUsedError("tensor, context, pipeline or expert parallel")
    if re.search(r"\btp1\b", text) is None and re.search(r"cp[1-9]|\btp ", text):
        raise NotUsedError("tensor, context, pipeline or expert parallel")
    if re.search(r"fp8|float8|mxfp|nvfp", precision):
        raise NotUsedError("float8 or narrower")
    if not re.search("bf16|fp16|float16", precision):
        raise NotUsedError("precision is neither bfloat16 nor float16, or not stated")
    if "bf16 master" in precision:
        raise NotUsedError("bfloat16 master weights")
    if row["offload"] not in ("", "none") or "offload" in text:
        raise NotUsedError("offload")
    if row["activation_ckpt"] in ("ILP", "see doc", "on", "none/unstated") or "offload" in row["activation_ckpt"]:
        raise NotUsedError("recomputation is not stated")


def _sharding(row: Row, ranks: int) -> tuple[int, int]:
    """Stage of ZeRO, and ranks that share the state."""
    text = row["parallelism"]
    shared = _integer(row, "shard_degree") or ranks
    if ranks == 1 or "single GPU" in text:
        return 0, 1
    found = re.search(r"ZeRO-([0-3])", text)
    stage = int(found[1]) if found and "FSDP" not in text else 3 if re.search(r"FSDP|DeepCompile", text) else None
    if stage is None:
        raise NotUsedError("unknown way to share state")
    if "HYBRID" in text or "HSDP" in text or (shared != ranks and stage != 1):
        raise NotUsedError("hybrid sharding")
    return stage, shared


def _software(row: Row) -> Software:
    """How the row's software works."""
    name, text = row["software"].lower(), row["parallelism"].lower()
    compiled = "compile" in name or "inductor" in name
    if "torchtitan" in name:
        # Of graph_trainer, only rows that say so ran inductor. FSDP1 keeps parameters as views of the flat buffer.
        is_fsdp1 = "fsdp1" in text
        copies = not is_fsdp1 and "single" not in text
        keeps_last = "fsdp2" in text and "reshard=always" not in name
        # Each block is compiled; embedding, head and loss are not.
        kind = "graph_trainer" if "graph_trainer" in name else "compile" if compiled else "eager"
        return Software(f"torchtitan {kind}", "blocks" if compiled else "", copies_out=copies,
                        every_second=True, keeps_last=keeps_last, keeps_root=True, ahead=3 * is_fsdp1)  # fmt: skip
    if "llm-foundry" in name:
        # Its optimizer is a loop over parameters in Python, an operator at a time; its attention, FlashAttention 1.
        return Software("llm-foundry", reduce="bfloat16" if "PURE" in row["precision"] else "float32",
                        optimizer_passes=2.5, flash_1=True)  # fmt: skip
    if "internevo" in name:
        return Software("InternEvo", reduce="bfloat16", gathers_half=True, reduces_last=True, broadcasts=True)
    if "deepspeed" in name:
        if "fsdp" in text:
            return Software("FSDP of accelerate", reduce="bfloat16")
        if "deepcompile" in text:
            return Software("DeepCompile", "all", reduce="bfloat16")
        # ZeRO-3's hooks break the graph at every module, so that torch.compile finds nothing to fuse.
        return Software("DeepSpeed", reduce="bfloat16")
    if "fsdp1+compile" in name:
        return Software("fms-fsdp", "blocks", reduce="bfloat16")
    raise NotUsedError(f"unknown software ({row['software'] or 'not stated'})")


def _recompute(row: Row, software: Software) -> str | None:
    """What is computed again in backward. A compiler's own choice is to make pointwise operators again."""
    text = row["activation_ckpt"]
    if text == "full":
        return "blocks"
    if text.startswith("selective"):
        if software.name == "fms-fsdp":
            raise NotUsedError("recomputation is not stated")  # of some blocks, it does not say of how many
        return "operators"
    if text.startswith("none"):
        return "compiler" if software.fused else None
    raise NotUsedError("recomputation is not stated")


def _nic(text: str, devices: int) -> tuple[float | None, bool]:
    """Bytes per second of a device's share of the network, and whether it is stated."""
    found = re.search(r"(?:(\d+)x)?(\d+)\s*Gb/s[^;]*?per (node|GPU)", text)
    if found is None:
        return None, False
    rate = int(found[1] or 1) * int(found[2]) * 1e9 / 8
    return (rate / devices if found[3] == "node" else rate), True


def _model(row: Row, seq: int) -> ModelConfig:
    """The shape, from the columns; what they leave open is what gives the stated number of parameters.

    Raises:
        NotUsedError: nothing gives it within 2 %.
    """
    name = row["model"]
    layers, hidden, heads, vocab = (int(row[key]) for key in ("layers", "hidden", "heads", "vocab"))
    base = ModelConfig(
        name, layers, hidden, heads, _integer(row, "kv_heads") or heads, int(row["ffn"]), vocab, max(seq, 1)
    )
    if "qwen3" in name:
        base = replace(base, qk_norm=True, head_dim=128)
    if re.search("gpt|mpt", name):
        base = replace(base, norm="layer", activation="gelu", position="learned", fused_qkv=True)
        open_ = [
            replace(base, tied=tied, biases=biases, position=position)
            for tied in (True, False)
            for biases in (ALL_BIASES, ())
            for position in ("learned", "rotary")
        ]
    else:
        biases = ("qkv", "out") if "internlm" in name else ()
        open_ = [replace(base, tied=tied, biases=biases) for tied in (False, True)]
    stated = _integer(row, "params")
    if stated is None:
        return open_[0]
    best = min(open_, key=lambda config: abs(num_params(config) - stated))
    if abs(num_params(best) / stated - 1) > 0.02:
        raise NotUsedError("shape and number of parameters do not agree")
    return best


SEED = 0


def is_fitted(case: Case) -> bool:
    """Whether constants are fitted to a row: to half of the configurations, drawn by a fixed seed."""
    key = (case.source, case.model.name, case.machine, case.seq, case.recompute)
    return random.Random(f"{SEED} {key}").random() < 0.5
