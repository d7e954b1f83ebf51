"""Decoder-only transformers by name or by a Hugging Face ``config.json``, whose steps cost what the real ones' do.

One ``Decoder`` has the shapes and operators of all of them: learned, rotary or ALiBi positions; LayerNorm or RMSNorm;
GELU, SwiGLU or a mixture of SwiGLU experts; grouped queries; norms of queries and keys. It is built at once on the meta
device, whatever its size, and trains for real where it fits.

Attention is ``scaled_dot_product_attention``. Captured for meta or the CPU it is the one operator
``aten._scaled_dot_product_flash_attention_for_cpu``, with keys and values as few as ``kv_heads`` has them, and keeps
the logarithms of sums for backward as flash attention on a GPU does. RMSNorm is six elementwise operators and sums
there, where a GPU has one kernel. What costs nothing is left out (scaling of rotary angles, initial values as
published), and so is dropout, which GPT-2 had.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zgraph.errors import OptionError

ALL_BIASES = ("qkv", "out", "ffn", "norm")
"""Everything in a block that may have a bias: queries, keys and values; attention's output; feed-forward; norms."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    Attributes:
        name: as in ``find_model``.
        layers: how many blocks.
        hidden: width of the residual stream.
        heads, kv_heads: of queries, and of keys and values, which divide them.
        ffn: inner width of the feed-forward network, or of each expert.
        vocab: tokens, padding included.
        positions: longest sequence, in tokens; where positions are learned, each has a row of its own.
        head_dim: width of a head; None for ``hidden / heads``.
        norm: ``"layer"`` or ``"rms"``.
        eps: what norms add to the variance.
        activation: ``"gelu"``, ``"gelu_tanh"`` (its approximation) or ``"swiglu"``, which has a third matrix.
        position: ``"learned"``, ``"rotary"`` or ``"alibi"`` (a bias of attention, which is an operand of its size).
        theta: base of rotary angles.
        tied: the head is the token embedding.
        biases: what has a bias, of ``ALL_BIASES``.
        fused_qkv: one matrix product gives queries, keys and values.
        qk_norm: every head of queries and keys has an RMSNorm.
        experts, experts_per_token: of a mixture, and how many of them each token meets; 0 for none.
        window: tokens that attention reaches back, where that is less than all; longer sequences are refused.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    positions: int
    head_dim: int | None = None
    norm: str = "rms"
    eps: float = 1e-5
    activation: str = "swiglu"
    position: str = "rotary"
    theta: float = 10000.0
    tied: bool = False
    biases: tuple[str, ...] = ()
    fused_qkv: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    window: int | None = None

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Elements of a token's queries, keys and values, all heads together."""
        return self.heads * self.head_width, self.kv_heads * self.head_width, self.kv_heads * self.head_width


def num_params(config: ModelConfig) -> int:
    """How many parameters a ``Decoder`` has, without building it; a tied head counts once."""
    hidden, ffn = config.hidden, config.ffn

    def bias(what: str, width: int) -> int:
        return width if what in config.biases else 0

    norm = hidden + bias("norm", hidden)
    qkv = sum(config.qkv_widths)
    attention = hidden * qkv + bias("qkv", qkv) + config.qkv_widths[0] * hidden + bias("out", hidden)
    attention += 2 * config.head_width if config.qk_norm else 0
    gated = config.activation == "swiglu"
    network = (3 if gated else 2) * hidden * ffn + bias("ffn", (2 if gated else 1) * ffn + hidden)
    if config.experts:
        network = config.experts * (3 * hidden * ffn) + config.experts * hidden
    embeddings = config.vocab * hidden * (1 if config.tied else 2)
    embeddings += config.positions * hidden if config.position == "learned" else 0
    return embeddings + config.layers * (attention + network + 2 * norm) + norm


# -- modules ----------------------------------------------------------------------------------------------


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden, config.eps)
    return nn.LayerNorm(config.hidden, config.eps, bias="norm" in config.biases)


class Attention(nn.Module):
    """Causal attention of B sequences of T tokens, with as many keys as the configuration has."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width, self.widths = config.head_width, config.qkv_widths
        self.grouped = config.kv_heads != config.heads
        bias = "qkv" in config.biases
        if config.fused_qkv:
            self.qkv = nn.Linear(config.hidden, sum(self.widths), bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(config.hidden, width, bias=bias) for width in self.widths)
        self.fused = config.fused_qkv
        self.out = nn.Linear(self.widths[0], config.hidden, bias="out" in config.biases)
        self.q_norm = nn.RMSNorm(self.width, config.eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.width, config.eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: ``[B, T, hidden]``.
            rotary: cosines and sines, each ``[T, width of a head]``.
            bias: of the scores, ``[1, heads, T, T]``, causal by itself.
        """
        B, T, _ = x.shape
        parts = self.qkv(x).split(self.widths, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(B, T, -1, self.width).transpose(1, 2) for part in parts)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = _rotated(q, *rotary), _rotated(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norms compute in float32 under autocast
        mask = None if bias is None else bias.to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.grouped)
        attended: Tensor = self.out(y.transpose(1, 2).reshape(B, T, -1))
        return attended


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every head's two halves as coordinates, turned by their position's angles."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)


class FeedForward(nn.Module):
    """GELU between two matrices, or SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = "ffn" in config.biases
        self.gated = config.activation == "swiglu"
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        if self.gated:
            self.gate = nn.Linear(config.hidden, config.ffn, bias=bias)
        self.up = nn.Linear(config.hidden, config.ffn, bias=bias)
        self.down = nn.Linear(config.ffn, config.hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        made: Tensor = self.down(F.silu(self.gate(x)) * up if self.gated else F.gelu(up, approximate=self.approximate))
        return made


class Experts(nn.Module):
    """A mixture of SwiGLU experts of which each token meets its ``k`` best, in shapes that depend on no value.

    Pairs of token and expert are sorted by expert, and the sorted list is cut into as many equal parts as there are
    experts, each of which is one expert's work. Under even load that is the mixture exactly. Otherwise pairs at the
    cuts are computed by a neighbour of their expert, so none is dropped and none padded. The matrix products have the
    shapes and flops of the real mixture under even load, ``tokens * k`` rows in all; sorting, reading rows in another
    order and adding them up again are there as well.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num, self.each = config.experts, config.experts_per_token
        self.router = nn.Linear(config.hidden, self.num, bias=False)
        self.gate, self.up = (nn.Parameter(torch.empty(self.num, config.hidden, config.ffn)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(self.num, config.ffn, config.hidden))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Mix.

        Raises:
            OptionError: the tokens of a batch cannot be dealt out evenly.
        """
        rows = x.flatten(0, -2)
        num_pairs = len(rows) * self.each
        if num_pairs % self.num:
            raise OptionError(
                f"{len(rows)} tokens that meet {self.each} experts each are not dealt out evenly to {self.num} experts",
                fix="choose a batch whose number of tokens is a multiple of the number of experts",
            )
        scores, chosen = self.router(rows).float().topk(self.each, -1)
        order = chosen.flatten().argsort(stable=True)
        token = order // self.each
        given = rows[token].view(self.num, num_pairs // self.num, -1)
        inner = F.silu(torch.bmm(given, self.gate)) * torch.bmm(given, self.up)
        made = torch.bmm(inner, self.down).flatten(0, 1) * scores.softmax(-1).flatten()[order, None]
        return torch.zeros_like(rows).index_add(0, token, made.to(rows.dtype)).view(x.shape)


class Block(nn.Module):
    """Attention and feed-forward network, each behind a norm and beside the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = _norm(config), Attention(config)
        self.ffn_norm = _norm(config)
        self.ffn = Experts(config) if config.experts else FeedForward(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, bias)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class Decoder(nn.Module):
    """A decoder-only transformer that returns its loss.

    Args:
        config: its shape.
        num_layers: how many blocks to build; as many as the configuration has if None.
    """

    def __init__(self, config: ModelConfig, num_layers: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        nn.init.normal_(self.embed.weight, std=0.02)
        if config.position == "learned":
            self.places = nn.Embedding(config.positions, config.hidden)
            nn.init.normal_(self.places.weight, std=0.02)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers if num_layers is None else num_layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy over all tokens, of float32 logits.

        Args:
            tokens, labels: ``[B, T]``, int64.

        Raises:
            OptionError: a sequence is longer than the model reaches.
        """
        config, T = self.config, tokens.shape[1]
        if config.position == "learned" and config.positions < T:
            raise OptionError(
                f"a sequence of {T} tokens, where {config.name} has {config.positions} positions",
                fix=f"choose a sequence of at most {config.positions} tokens, or set positions of the model",
            )
        if config.window is not None and config.window < T:
            raise OptionError(
                f"a sequence of {T} tokens, where attention of {config.name} reaches back {config.window}",
                fix=f"choose a sequence of at most {config.window} tokens: no shorter window is modelled",
            )
        x = self.embed(tokens)
        place = torch.arange(T, device=tokens.device)
        if config.position == "learned":
            x = x + self.places(place)
        rotary = _rotary(place, config) if config.position == "rotary" else None
        bias = _alibi(place, config.heads) if config.position == "alibi" else None
        for layer in self.layers:
            x = layer(x, rotary, bias)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _rotary(place: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary angles, each ``[T, width of a head]`` (Su et al., 2021)."""
    even = torch.arange(0, config.head_width, 2, device=place.device)
    angles = torch.outer(place.float(), config.theta ** (-even / config.head_width))
    both = torch.cat((angles, angles), -1)
    return both.cos(), both.sin()


def _alibi(place: Tensor, heads: int) -> Tensor:
    """Biases of scores by distance, ``[1, heads, T, T]``: minus infinity ahead of a token (Press et al., 2022)."""
    slopes = 2 ** (-8 / heads * torch.arange(1, heads + 1, device=place.device))
    distance = place[None, :] - place[:, None]
    bias = distance * slopes[:, None, None]
    return bias.masked_fill(distance > 0, -math.inf)[None]


# -- by name ----------------------------------------------------------------------------------------------


def _gpt2(name: str, layers: int, hidden: int, heads: int, vocab: int = 50257, positions: int = 1024) -> ModelConfig:
    return ModelConfig(
        name, layers, hidden, heads, heads, 4 * hidden, vocab, positions,
        norm="layer", activation="gelu_tanh", position="learned", tied=True, biases=ALL_BIASES, fused_qkv=True,
    )  # fmt: skip


def _mpt(name: str, layers: int, hidden: int, heads: int) -> ModelConfig:
    """As the throughput tables of llm-foundry have it, and their parameter counts show.

    It has biases and learned positions, as many as the sequence of a measurement is long: ``dataclasses.replace``
    them for other lengths than 2048. (``mosaicml/mpt-7b`` has ALiBi and no biases; its ``config.json`` says so.)
    """
    return ModelConfig(
        name, layers, hidden, heads, heads, 4 * hidden, 50368, 2048,
        norm="layer", activation="gelu", position="learned", tied=True, biases=ALL_BIASES, fused_qkv=True,
    )  # fmt: skip


def _llama2(name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    return ModelConfig(name, layers, hidden, heads, kv_heads, ffn, 32000, 4096)


def _llama3(
    name: str, layers: int, hidden: int, heads: int, ffn: int, positions: int = 8192, *, tied: bool = False
) -> ModelConfig:
    return ModelConfig(name, layers, hidden, heads, 8, ffn, 128256, positions, theta=500000.0, tied=tied)


def _qwen3(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, *, tied: bool = False,
    experts: int = 0, experts_per_token: int = 0,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        name, layers, hidden, heads, kv_heads, ffn, 151936, 40960, head_dim=128, eps=1e-6, theta=1e6,
        tied=tied, qk_norm=True, experts=experts, experts_per_token=experts_per_token,
    )  # fmt: skip


def _mixtral(name: str, layers: int, hidden: int, heads: int, ffn: int, vocab: int, positions: int) -> ModelConfig:
    return ModelConfig(
        name, layers, hidden, heads, 8, ffn, vocab, positions, theta=1e6, experts=8, experts_per_token=2
    )  # fmt: skip


_PRESETS = {
    config.name: config
    for config in (
        _gpt2("gpt2", 12, 768, 12),
        _gpt2("gpt2-medium", 24, 1024, 16),
        _gpt2("gpt2-large", 36, 1280, 20),
        _gpt2("gpt2-xl", 48, 1600, 25),
        _llama2("llama2-7b", 32, 4096, 32, 32, 11008),
        _llama2("llama2-13b", 40, 5120, 40, 40, 13824),
        _llama2("llama2-70b", 80, 8192, 64, 8, 28672),
        _llama3("llama3-8b", 32, 4096, 32, 14336),
        _llama3("llama3-70b", 80, 8192, 64, 28672),
        _llama3("llama3-405b", 126, 16384, 128, 53248, 131072),
        _llama3("llama3.2-1b", 16, 2048, 32, 8192, 131072, tied=True),
        _qwen3("qwen3-0.6b", 28, 1024, 16, 8, 3072, tied=True),
        _qwen3("qwen3-1.7b", 28, 2048, 16, 8, 6144, tied=True),
        _qwen3("qwen3-4b", 36, 2560, 32, 8, 9728, tied=True),
        _qwen3("qwen3-8b", 36, 4096, 32, 8, 12288),
        _qwen3("qwen3-14b", 40, 5120, 40, 8, 17408),
        _qwen3("qwen3-32b", 64, 5120, 64, 8, 25600),
        _qwen3("qwen3-30b-a3b", 48, 2048, 32, 4, 768, experts=128, experts_per_token=8),
        _mixtral("mixtral-8x7b", 32, 4096, 32, 14336, 32000, 32768),
        _mixtral("mixtral-8x22b", 56, 6144, 48, 16384, 32768, 65536),
        _mpt("mpt-125m", 12, 768, 12),
        _mpt("mpt-350m", 24, 1024, 16),
        _mpt("mpt-760m", 24, 1536, 12),
        _mpt("mpt-1b", 24, 2048, 16),
        _mpt("mpt-3b", 32, 2560, 20),
        _mpt("mpt-7b", 32, 4096, 32),
        _mpt("mpt-13b", 40, 5120, 40),
        _mpt("mpt-30b", 48, 7168, 56),
        _mpt("mpt-70b", 80, 8192, 64),
        # InternLM (2023): a Llama whose attention has biases.
        ModelConfig("internlm-7b", 32, 4096, 32, 32, 11008, 103168, 2048, eps=1e-6, biases=("qkv", "out")),
    )
}


def find_model(name: str) -> ModelConfig:
    """A model by name.

    Raises:
        OptionError: there is none of this name; those that there are.
    """
    if name not in _PRESETS:
        raise OptionError(f"no model is called {name!r}", fix=f"models are: {', '.join(_PRESETS)}")
    return _PRESETS[name]


# -- of Hugging Face --------------------------------------------------------------------------------------


class _Keys:
    """What a ``config.json`` says, by key."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def number(self, key: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises:
            OptionError: the key is missing, or is something else.
        """
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise OptionError(f"{self.where} has no {key!r}", fix="give the config.json of a whole model")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{self.where} has {key!r}: {value!r}", fix="it must be a positive whole number")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise OptionError(f"{self.where} has {key!r}: {value!r}", fix="it must be a number")
        return default if value is None else float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise OptionError(f"{self.where} has {key!r}: {value!r}", fix="it must be true or false")
        return default if value is None else value

    def one_of(self, key: str, known: dict[str, str], default: str) -> str:
        value = self.values.get(key) or default
        if value not in known:
            raise OptionError(f"{self.where} has {key!r}: {value!r}", fix=f"supported are: {', '.join(known)}")
        return known[value]

    def inside(self, key: str) -> _Keys:
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise OptionError(f"{self.where} has {key!r}: {value!r}", fix="it must be an object")
        return _Keys(value, f"{key!r} of {self.where}")


_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _from_gpt2(name: str, keys: _Keys) -> ModelConfig:
    hidden, heads = keys.number("n_embd"), keys.number("n_head")
    return ModelConfig(
        name, keys.number("n_layer"), hidden, heads, heads, keys.number("n_inner", 4 * hidden),
        keys.number("vocab_size"), keys.number("n_positions"),
        norm="layer", eps=keys.real("layer_norm_epsilon", 1e-5),
        activation=keys.one_of("activation_function", _GELUS, "gelu_new"),
        position="learned", tied=keys.flag("tie_word_embeddings", True), biases=ALL_BIASES, fused_qkv=True,
    )  # fmt: skip


def _from_mpt(name: str, keys: _Keys) -> ModelConfig:
    """Transformers' own class of it has ALiBi, no biases and a tied head where the file is silent."""
    hidden, heads, attention = keys.number("d_model"), keys.number("n_heads"), keys.inside("attn_config")
    for key in ("qk_ln", "rope"):
        if attention.flag(key, False):
            raise OptionError(f"{attention.where} has {key!r}: true", fix="MPT is supported without it")
    alibi = attention.flag("alibi", True)
    return ModelConfig(
        name, keys.number("n_layers"), hidden, heads, attention.number("kv_n_heads", heads),
        hidden * keys.number("expansion_ratio", 4), keys.number("vocab_size"), keys.number("max_seq_len"),
        norm="layer", activation="gelu", position="alibi" if alibi else "learned",
        tied=keys.flag("tie_word_embeddings", True),
        biases=() if keys.flag("no_bias", True) else ALL_BIASES, fused_qkv=True,
    )  # fmt: skip


def _like_llama(
    name: str, keys: _Keys, *, biases: tuple[str, ...] = (), qk_norm: bool = False, window: bool = False,
    experts: int = 0, experts_per_token: int = 0,
) -> ModelConfig:  # fmt: skip
    keys.one_of("hidden_act", {"silu": "silu"}, "silu")
    heads = keys.number("num_attention_heads")
    theta = keys.real("rope_theta", keys.inside("rope_parameters").real("rope_theta", 10000.0))
    reach = keys.values.get("sliding_window")
    return ModelConfig(
        name, keys.number("num_hidden_layers"), keys.number("hidden_size"), heads,
        keys.number("num_key_value_heads", heads), keys.number("intermediate_size"), keys.number("vocab_size"),
        keys.number("max_position_embeddings"),
        head_dim=None if keys.values.get("head_dim") is None else keys.number("head_dim"),
        eps=keys.real("rms_norm_eps", 1e-6), theta=theta, tied=keys.flag("tie_word_embeddings", False), biases=biases,
        qk_norm=qk_norm, experts=experts, experts_per_token=experts_per_token,
        window=keys.number("sliding_window") if window and reach is not None else None,
    )  # fmt: skip


def _from_llama(name: str, keys: _Keys) -> ModelConfig:
    attention = ("qkv", "out") if keys.flag("attention_bias", False) else ()
    network = ("ffn",) if keys.flag("mlp_bias", False) else ()
    return _like_llama(name, keys, biases=attention + network)


def _from_mistral(name: str, keys: _Keys) -> ModelConfig:
    return _like_llama(name, keys, window=True)


def _from_qwen2(name: str, keys: _Keys) -> ModelConfig:
    return _like_llama(name, keys, biases=("qkv",), window=keys.flag("use_sliding_window", False))


def _from_qwen3(name: str, keys: _Keys) -> ModelConfig:
    biases = ("qkv", "out") if keys.flag("attention_bias", False) else ()
    return _like_llama(name, keys, biases=biases, qk_norm=True, window=keys.flag("use_sliding_window", False))


def _from_mixtral(name: str, keys: _Keys) -> ModelConfig:
    experts, each = keys.number("num_local_experts", 8), keys.number("num_experts_per_tok", 2)
    return _like_llama(name, keys, window=True, experts=experts, experts_per_token=each)


_READERS: dict[str, Callable[[str, _Keys], ModelConfig]] = {
    "gpt2": _from_gpt2,
    "llama": _from_llama,
    "mistral": _from_mistral,
    "qwen2": _from_qwen2,
    "qwen3": _from_qwen3,
    "mixtral": _from_mixtral,
    "mpt": _from_mpt,
}


def from_hf(path: str | Path) -> ModelConfig:
    """The model of a Hugging Face ``config.json``, or of a folder that has one.

    Raises:
        OptionError: the file cannot be read, is of another kind of model, or lacks a key.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{file} cannot be read: {error}", fix="give the path of a model's config.json") from None
    if not isinstance(values, dict):
        raise OptionError(f"{file} holds a {type(values).__name__}", fix="give the path of a model's config.json")
    kind = values.get("model_type")
    if kind not in _READERS:
        raise OptionError(f"{file} has model_type {kind!r}", fix=f"supported are: {', '.join(_READERS)}")
    named = values.get("_name_or_path") or (file.parent.name if file.name == "config.json" else file.stem)
    config = _READERS[kind](str(named), _Keys(values, str(file)))
    if config.hidden % config.heads and config.head_dim is None:
        raise OptionError(f"{file} has {config.heads} heads in a width of {config.hidden}", fix="one must divide it")
    if config.heads % config.kv_heads:
        raise OptionError(f"{file} has {config.kv_heads} heads of keys for {config.heads}", fix="one must divide it")
    return config


__all__ = ["Decoder", "ModelConfig", "find_model", "from_hf", "num_params"]
