"""Models by name and by ``config.json``: their sizes are the published ones, and they compute what they say."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zgraph
from zgraph.capture import capture
from zgraph.config import Config
from zgraph.errors import OptionError
from zgraph.presets import (
    Attention,
    Decoder,
    Experts,
    ModelConfig,
    _alibi,
    _rotary,
    _rotated,
    find_model,
    from_hf,
    num_params,
)

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
}
"""Of the checkpoints on Hugging Face."""

LLM_FOUNDRY = {
    ("mpt-125m", 512): 124_131_840,
    ("mpt-125m", 65536): 174_070_272,
    ("mpt-1b", 2048): 1_315_950_592,
    ("mpt-3b", 4096): 2_657_080_320,
    ("mpt-7b", 2048): 6_658_859_008,
    ("mpt-13b", 8192): 12_885_411_840,
    ("mpt-30b", 1024): 29_967_874_048,
    ("mpt-70b", 2048): 64_862_437_376,
}
"""Of llm-foundry's tables of throughput, by the tokens of a sequence."""

TINY = ModelConfig("tiny", layers=2, hidden=24, heads=4, kv_heads=2, ffn=40, vocab=37, positions=16)
KINDS = {
    "llama": TINY,
    "gpt2": replace(find_model("gpt2"), layers=2, hidden=24, heads=4, kv_heads=4, ffn=96, vocab=37, positions=16),
    "qwen3": replace(TINY, qk_norm=True, head_dim=8, tied=True),
    "qwen2": replace(TINY, biases=("qkv",)),
    "mpt": replace(TINY, kv_heads=4, norm="layer", activation="gelu", position="alibi", fused_qkv=True, tied=True),
    "mixtral": replace(TINY, experts=4, experts_per_token=2),
    "all biases": replace(TINY, norm="layer", biases=("qkv", "out", "ffn", "norm")),
}


def count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    config = find_model(name)
    assert num_params(config) == PUBLISHED[name]
    small = replace(config, layers=1)
    assert count(small) == num_params(small)


@pytest.mark.parametrize(("name", "length"), LLM_FOUNDRY)
def test_sizes_are_those_of_the_tables_of_llm_foundry(name: str, length: int) -> None:
    assert num_params(replace(find_model(name), positions=length)) == LLM_FOUNDRY[name, length]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_known_without_building(kind: str) -> None:
    assert count(KINDS[kind]) == num_params(KINDS[kind])


def test_the_largest_is_built_at_once() -> None:
    start = time.perf_counter()
    with torch.device("meta"):
        model = Decoder(find_model("llama3-405b"))
    assert time.perf_counter() - start < 5
    assert len(model.layers) == 126
    with torch.device("meta"):
        assert len(Decoder(find_model("llama3-405b"), num_layers=3).layers) == 3


def test_another_name_lists_those_there_are() -> None:
    with pytest.raises(OptionError, match=re.escape("no model is called 'llama4'")) as refusal:
        find_model("llama4")
    assert "llama3-70b, llama3-405b" in str(refusal.value)


# What it computes


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(37, (2, 12)), torch.randint(37, (2, 12))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind: str) -> None:
    torch.manual_seed(0)
    model = Decoder(KINDS[kind])
    step = zgraph.compile(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    losses = [float(step.train_step(*batch())) for _ in range(8)]
    assert all(map(math.isfinite, losses))
    assert abs(losses[0] - math.log(37)) < 0.7
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    "kind", sorted(KINDS.keys() - {"mixtral"})
)  # which expert computes a pair at a cut depends on all
def test_no_token_sees_a_later_one(kind: str) -> None:
    torch.manual_seed(0)
    model, seen = Decoder(KINDS[kind]), []
    model.head.register_forward_hook(lambda _module, _args, out: seen.append(out))
    tokens, labels = batch()
    model(tokens, labels)
    model(torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % 37], 1), labels)
    torch.testing.assert_close(seen[0][:, :-1], seen[1][:, :-1])
    assert not torch.allclose(seen[0][:, -1], seen[1][:, -1])


def test_grouped_queries_share_keys() -> None:
    torch.manual_seed(0)
    attention, x = Attention(TINY), torch.randn(2, 5, 24)
    q = attention.q(x).view(2, 5, 4, 6).transpose(1, 2)
    k, v = (part(x).view(2, 5, 2, 6).transpose(1, 2).repeat_interleave(2, 1) for part in (attention.k, attention.v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(6)).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, -1))
    torch.testing.assert_close(attention(x, None, None), expected)


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(6), torch.randn(6)
    cos, sin = _rotary(torch.arange(9), TINY)
    turned_q, turned_k = _rotated(q.expand(9, 6), cos, sin), _rotated(k.expand(9, 6), cos, sin)
    torch.testing.assert_close(turned_q[5] @ turned_k[2], turned_q[8] @ turned_k[5])
    torch.testing.assert_close(turned_q[0], q)


def test_alibi_is_minus_the_distance_by_slopes() -> None:
    bias = _alibi(torch.arange(3), 8)
    inf = math.inf
    assert bias[0, 0].tolist() == [[0, -inf, -inf], [-0.5, 0, -inf], [-1, -0.5, 0]]
    assert bias[0, 7, 2, 0] == -2 / 256


def test_experts_under_even_load_are_the_mixture() -> None:
    torch.manual_seed(0)
    experts, x = Experts(KINDS["mixtral"]), torch.randn(1, 8, 24)
    x[..., :4] = 5 * F.one_hot(torch.arange(8) % 4, 4) + 4 * F.one_hot((torch.arange(8) + 1) % 4, 4)
    with torch.no_grad():
        experts.router.weight.copy_(torch.eye(4, 24))  # every expert meets four of eight tokens
    scores, chosen = experts.router(x).topk(2, -1)
    assert chosen.flatten().bincount().tolist() == [4, 4, 4, 4]
    expected = torch.zeros_like(x)
    for token in range(8):
        for weight, e in zip(scores[0, token].softmax(-1), chosen[0, token], strict=True):
            row = x[0, token]
            expected[0, token] += weight * ((F.silu(row @ experts.gate[e]) * (row @ experts.up[e])) @ experts.down[e])
    torch.testing.assert_close(experts(x), expected)


def test_experts_cost_what_active_experts_do() -> None:
    config = KINDS["mixtral"]
    with torch.device("meta"):
        experts, x = Experts(config), torch.empty(4, 8, 24)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        experts(x)
    router = 2 * 32 * 24 * 4
    assert counter.get_total_flops() == 2 * 32 * 2 * 3 * 24 * 40 + router


def test_tokens_that_cannot_be_dealt_out_are_refused() -> None:
    with pytest.raises(OptionError, match="9 tokens that meet 2 experts each"):
        Experts(KINDS["mixtral"])(torch.randn(1, 9, 24))


def test_attention_is_one_operator_and_keys_are_not_repeated() -> None:
    with torch.device("meta"):
        model = Decoder(TINY, 1)
    tokens = torch.zeros(2, 12, dtype=torch.int64, device="meta")
    program = capture(
        model, torch.optim.AdamW(model.parameters()), (tokens, tokens), {}, config=Config(precision="bf16")
    )
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    (call,) = program.graph.find_nodes(op="call_function", target=attention)
    assert [tuple(arg.meta["val"].shape) for arg in call.args[:3]] == [(2, 4, 12, 6), (2, 2, 12, 6), (2, 2, 12, 6)]
    assert {arg.meta["val"].dtype for arg in call.args[:3]} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "what"),
    [(KINDS["gpt2"], "has 16 positions"), (replace(TINY, window=16), "reaches back 16")],
)
def test_a_sequence_beyond_reach_is_refused(config: ModelConfig, what: str) -> None:
    tokens = torch.zeros(1, 17, dtype=torch.int64)
    with pytest.raises(OptionError, match=what):
        Decoder(config)(tokens, tokens)


# Of Hugging Face

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
    "n_ctx": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip
MISTRAL = {
    **LLAMA, "model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "sliding_window": 4096,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 131072,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 2048, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "attention_bias": False,
    "tie_word_embeddings": True, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "model_type": "mixtral", "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
}  # fmt: skip
MPT = {
    "model_type": "mpt", "d_model": 4096, "n_layers": 32, "n_heads": 32, "expansion_ratio": 4, "max_seq_len": 2048,
    "vocab_size": 50432, "no_bias": True, "attn_config": {"alibi": True, "attn_impl": "torch", "qk_ln": False},
}  # fmt: skip


def written(folder: Path, values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("values", "size"),
    [
        (LLAMA, 8_030_261_248),
        (GPT2, 124_439_808),
        (MISTRAL, 7_241_732_096),
        (QWEN2, 7_615_616_512),
        (QWEN3, 1_720_574_976),
        (MIXTRAL, 46_702_792_704),
        (MPT, 6_649_286_656),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_models_of_hugging_face(values: dict[str, Any], size: int, tmp_path: Path) -> None:
    config = from_hf(written(tmp_path, values))
    assert num_params(config) == size
    assert config == from_hf(tmp_path)
    assert config.name == tmp_path.name


@pytest.mark.parametrize(
    ("values", "name"),
    [(LLAMA, "llama3-8b"), (GPT2, "gpt2"), (QWEN3, "qwen3-1.7b"), (MIXTRAL, "mixtral-8x7b")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_of_hugging_face_are_those_of_the_same_name(values: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert replace(from_hf(written(tmp_path, values)), name=name) == find_model(name)


def test_what_a_config_says_besides(tmp_path: Path) -> None:
    def read(**changed: Any) -> ModelConfig:
        return from_hf(written(tmp_path, {**LLAMA, **changed}))

    assert read(attention_bias=True, mlp_bias=True).biases == ("qkv", "out", "ffn")
    assert read(num_key_value_heads=None).kv_heads == 32
    assert read(rope_theta=None, rope_parameters={"rope_theta": 7.0}).theta == 7.0
    assert from_hf(written(tmp_path, MISTRAL)).window == 4096
    assert from_hf(written(tmp_path, QWEN2)).window is None
    assert from_hf(written(tmp_path, {**QWEN2, "use_sliding_window": True})).window == 131072
    assert from_hf(written(tmp_path, {**MPT, "no_bias": False, "attn_config": {"alibi": False}})).position == "learned"


REFUSED = {
    "no such kind": ({"model_type": "t5"}, "has model_type 't5'"),
    "no kind": ({}, "has model_type None"),
    "no layers": ({k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}, "has no 'num_hidden_layers'"),
    "layers in words": ({**LLAMA, "num_hidden_layers": "32"}, "has 'num_hidden_layers': '32'"),
    "no such activation": ({**LLAMA, "hidden_act": "relu"}, "has 'hidden_act': 'relu'"),
    "a flag that is none": ({**LLAMA, "attention_bias": 1}, "has 'attention_bias': 1"),
    "an angle in words": ({**LLAMA, "rope_theta": "much"}, "has 'rope_theta': 'much'"),
    "heads that do not divide": ({**LLAMA, "num_attention_heads": 30}, "has 30 heads in a width of 4096"),
    "keys that do not divide": ({**LLAMA, "num_key_value_heads": 5}, "has 5 heads of keys for 32"),
    "norms of queries": ({**MPT, "attn_config": {"qk_ln": True}}, "has 'qk_ln': true"),
    "no object": ({**MPT, "attn_config": "flash"}, "has 'attn_config': 'flash'"),
    "a list": ([1], "holds a list"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str, tmp_path: Path) -> None:
    values, message = REFUSED[what]
    with pytest.raises(OptionError, match=re.escape(message)):
        from_hf(written(tmp_path, values))


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OptionError, match="cannot be read"):
        from_hf(tmp_path)
    with pytest.raises(OptionError, match="cannot be read"):
        from_hf(tmp_path / "absent.json")
