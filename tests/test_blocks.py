"""Models of many equal blocks: what is repeated is what capturing all of them gives, or it is refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import GPT
from tests.reference import slow
from zgraph.blocks import Short, find_blocks, shorten
from zgraph.capture import capture
from zgraph.config import Config
from zgraph.errors import CaptureError
from zgraph.presets import Decoder, ModelConfig, find_model
from zgraph.program import Program
from zgraph.repetition import repeat_blocks
from zgraph.update import StateEntry

FEW, MANY = 4, 6

MakeModel = Callable[[int], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def in_groups(model: nn.Module) -> torch.optim.Optimizer:
    """With decay and without, as everybody does."""
    parts = [[p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False)]
    decays = [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "weight_decay": 0.0}]
    return torch.optim.SGD(decays, lr=0.1, momentum=0.9)


def captured(model: nn.Module, make_optimizer: MakeOptimizer = sgd, **options: Any) -> Program:
    with torch.device("meta"):
        x = torch.zeros(3, 6)
    return capture(model, make_optimizer(model), (x,), {}, config=Config(**options))


def captured_tokens(model: nn.Module, make_optimizer: MakeOptimizer = sgd, **options: Any) -> Program:
    tokens = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    return capture(model, make_optimizer(model), (tokens, tokens), {}, config=Config(**options))


def check(few: Program, many: Program, path: str = "layers", num_layers: int = MANY) -> None:
    """The whole claim."""
    repeated = repeat_blocks(few, path, num_layers)
    assert_same(repeated, many)
    repeated.graph.lint()


def assert_same(repeated: Program, many: Program) -> None:
    assert repeated.text(origins=True) == many.text(origins=True)
    assert repeated.digest() == many.digest()
    assert repeated.outputs == many.outputs
    assert list(repeated.init.items()) == list(many.init.items())
    assert list(repeated.given.items()) == list(many.given.items())
    assert list(repeated.given_shapes.items()) == list(many.given_shapes.items())
    assert [(guard.inputs, guard.text) for guard in repeated.guards] == [(g.inputs, g.text) for g in many.guards]
    assert list(repeated.constants) == list(many.constants)
    assert all(torch.equal(one, many.constants[name]) for name, one in repeated.constants.items())
    for one, other in zip(repeated.graph.nodes, many.graph.nodes, strict=True):
        val, expected = one.meta.get("val"), other.meta.get("val")
        if isinstance(val, Tensor):
            assert (val.stride(), val.device) == (expected.stride(), expected.device)


# Traits of models


class Layer(nn.Module):
    def __init__(self, index: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(6), nn.Linear(6, 6)
        self.index, self.dropout = index, dropout

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(torch.tanh(self.inner(self.norm(x))), self.dropout)


class Stack(nn.Module):
    """Enters, goes through layers, leaves."""

    def __init__(self, num_layers: int, make_layer: Callable[[int], nn.Module] = Layer) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.layers = nn.ModuleList(map(make_layer, range(num_layers)))
        self.leave = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x).mean()


class Between(Stack):
    """Computes between layers, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = torch.sin(0.5 * layer(x))
        return self.leave(x).mean()


class Around(Stack):
    """What it computes between layers reads what came before the layer, so the last of it reads the last but one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x) + torch.sin(x)
        return self.leave(x).mean()


class Summed(Stack):
    """Sums up something of all layers when it has gone through them."""

    def forward(self, x: Tensor) -> Tensor:
        x, every = self.enter(x), []
        for layer in self.layers:
            x = layer(x)
            every.append(x)
        return self.leave(x).mean() + 0.01 * sum(each.square().mean() for each in every)


class Concatenated(Stack):
    """Reads all layers at once; backward takes its gradient apart by their numbers."""

    def forward(self, x: Tensor) -> Tensor:
        x, every = self.enter(x), []
        for layer in self.layers:
            x = layer(x)
            every.append(x)
        return self.leave(torch.stack(every).mean(0)).mean()


class Twice(Stack):
    """Goes through all layers twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return self.leave(x).mean()


class Counting(Layer):
    """Has buffers, one of which it changes."""

    calls: Tensor
    scale: Tensor

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.ones(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * self.scale)


class Literal(Layer):
    """Has tensors that are neither parameters nor buffers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]))


class Shared(Stack):
    """All layers have one module of the model in common, and one parameter."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        common = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        for layer in self.layers:
            layer.norm = common


class TwoLists(nn.Module):
    """Layers of one list read what came out of the other."""

    def __init__(self, num_first: int, num_second: int) -> None:
        super().__init__()
        self.first = nn.ModuleList(Layer() for _ in range(num_first))
        self.second = nn.ModuleList(Layer() for _ in range(num_second))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.first:
            y = layer(y)
        for layer in self.second:
            x = layer(x * y)
        return x.mean()


class Rooted(nn.Module):
    """The list is not at the top."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.model = Stack(num_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Ordered(nn.Module):
    """A Sequential of layers."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def frozen(num_layers: int, where: str) -> nn.Module:
    """Without gradients for some parameters."""
    model = Stack(num_layers)
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(where, name) is None)
    return model


TRAITS: dict[str, MakeModel] = {
    "plain": Stack,
    "dropout": lambda n: Stack(n, lambda i: Layer(i, dropout=0.3)),
    "between": Between,
    "summed": Summed,
    "twice": Twice,
    "buffers": lambda n: Stack(n, Counting),
    "literals": lambda n: Stack(n, Literal),
    "shared": Shared,
    "sequential": Ordered,
    "frozen biases": lambda n: frozen(n, r"layers.*bias"),
    "frozen layers": lambda n: frozen(n, r"layers"),
}


@pytest.mark.parametrize("trait", ["plain", *slow(*(trait for trait in TRAITS if trait != "plain"))])
def test_repeating_is_capturing(trait: str) -> None:
    make = TRAITS[trait]
    check(captured(make(FEW)), captured(make(MANY)))


@pytest.mark.slow
def test_five_blocks_can_be_repeated_too() -> None:
    check(captured(Stack(5)), captured(Stack(MANY)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 1.0},
        {"clip_value": 1.0, "ema": 0.9},
        {"precision": "bf16", "accumulate": 3, "clip_norm": 1.0},
        {"precision": "fp16"},
        {"gradient_noise": 0.1},
    ],
    ids="+".join,
)
def test_options(options: dict[str, Any]) -> None:
    check(captured(Stack(FEW), **options), captured(Stack(MANY), **options))


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": adamw,
    "groups": in_groups,
    "no state": lambda model: torch.optim.SGD(model.parameters()),
    "shapes of its own": lambda model: torch.optim.Adafactor(model.parameters()),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind: str) -> None:
    make = OPTIMIZERS[kind]
    check(captured(Stack(FEW), make, clip_norm=1.0), captured(Stack(MANY), make, clip_norm=1.0))


def test_state_that_is_there() -> None:
    def with_state(num_layers: int) -> Program:
        model, x = Stack(num_layers), torch.zeros(3, 6)
        state = {
            name: {"momentum_buffer": StateEntry(tuple(p.shape), torch.float32)} for name, p in model.named_parameters()
        }
        return capture(model, sgd(model), (x,), {}, state=state)

    many = with_state(MANY)
    assert len(many.given) == 4 + 4 * MANY
    check(with_state(FEW), many)


@pytest.mark.slow
def test_lists_that_are_not_at_the_top() -> None:
    check(captured(Rooted(FEW)), captured(Rooted(MANY)), "model.layers")


@pytest.mark.slow
def test_two_lists() -> None:
    once = repeat_blocks(captured(TwoLists(4, 5)), "first", 6)
    assert_same(once, captured(TwoLists(6, 5)))
    assert_same(repeat_blocks(once, "second", 7), captured(TwoLists(6, 7)))


def test_as_many_as_there_are() -> None:
    program = captured(Stack(FEW))
    same = repeat_blocks(program, "layers", FEW)
    assert same is not program
    assert_same(same, program)


# Language models

TINY = ModelConfig("tiny", layers=2, hidden=24, heads=4, kv_heads=2, ffn=40, vocab=37, positions=16)
DECODERS = {
    "llama": TINY,
    "gpt2": replace(find_model("gpt2"), hidden=24, heads=4, kv_heads=4, ffn=96, vocab=37, positions=16),
    "qwen3": replace(TINY, qk_norm=True, tied=True),
    "mpt": replace(TINY, kv_heads=4, norm="layer", activation="gelu", position="alibi", fused_qkv=True, tied=True),
    "mixtral": replace(TINY, experts=4, experts_per_token=2),
}


def decoder(kind: str, num_layers: int) -> nn.Module:
    with torch.device("meta"):
        return Decoder(DECODERS[kind], num_layers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(kind: str) -> None:
    options = {"precision": "bf16", "accumulate": 2, "clip_norm": 1.0}
    few, many = (captured_tokens(decoder(kind, n), in_groups, **options) for n in (FEW, MANY))
    check(few, many)


@pytest.mark.slow
def test_a_model_that_ties_its_head_and_drops_out() -> None:
    few, many = (captured_tokens(GPT(depth=n, tied=True, dropout=0.1)) for n in (FEW, MANY))
    check(few, many, "blocks")


# Short models


def shortened(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Program:
    short = shorten(model, "layers")
    return captured(short.model, lambda _: short.optimizer(optimizer, model), **options)


@pytest.mark.slow
@pytest.mark.parametrize("make_optimizer", [sgd, in_groups])
def test_a_short_model_gives_the_whole_one(make_optimizer: MakeOptimizer) -> None:
    model = Stack(MANY)
    optimizer = make_optimizer(model)
    before = {name: (id(p), p.device.type) for name, p in model.named_parameters()}
    check(shortened(model, optimizer, clip_norm=1.0), captured(model, lambda _: optimizer, clip_norm=1.0))
    assert {name: (id(p), p.device.type) for name, p in model.named_parameters()} == before
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_what_a_short_model_has() -> None:
    model = Stack(10, Counting)
    model.layers[0].norm.bias.requires_grad_(False)
    short = shorten(model, "layers")
    assert isinstance(short, Short)
    assert (short.kept, short.num_layers, short.path) == ((0, 1, 8, 9), 10, "layers")
    assert [layer.index for layer in short.model.layers] == [0, 1, 8, 9]
    assert {t.device.type for t in [*short.model.parameters(), *short.model.buffers()]} == {"meta"}
    assert "layers.3.inner.weight" in dict(short.model.named_parameters())
    assert not short.model.layers[0].norm.bias.requires_grad
    assert len(model.layers) == 10
    assert shorten(Stack(9), "layers").kept == (0, 1, 6, 8)
    assert shorten(Stack(9), "layers", 6).kept == (0, 1, 2, 3, 7, 8)


def test_a_short_optimizer_has_the_hyperparameters() -> None:
    model = Stack(6)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "lr": 0.3, "betas": (0.8, 0.9)},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
    )
    short = shorten(model, "layers")
    made = short.optimizer(optimizer, model)
    assert type(made) is torch.optim.AdamW
    assert [group["lr"] for group in made.param_groups] == [0.3, 0.001]
    assert [group["betas"] for group in made.param_groups] == [(0.8, 0.9), (0.9, 0.999)]
    held = [p for group in made.param_groups for p in group["params"]]
    assert set(map(id, held)) == set(map(id, short.model.parameters()))


def odd_one_out(model: nn.Module) -> torch.optim.Optimizer:
    """One layer that would be left out has a group of its own."""
    odd = set(map(id, model.layers[3].parameters()))
    groups = [[p for p in model.parameters() if (id(p) in odd) is own] for own in (False, True)]
    return torch.optim.SGD([{"params": group} for group in groups])


def backwards(model: nn.Module) -> torch.optim.Optimizer:
    """Parameters of one layer are in another order."""
    params = list(model.parameters())
    own = [i for i, p in enumerate(params) if any(p is q for q in model.layers[3].parameters())]
    params[own[0]], params[own[1]] = params[own[1]], params[own[0]]
    return torch.optim.SGD(params)


def one_missing(model: nn.Module) -> torch.optim.Optimizer:
    """One parameter of one layer is not trained."""
    return torch.optim.SGD([p for p in model.parameters() if p is not model.layers[3].norm.weight])


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (odd_one_out, "group 0 of the optimizer has layers.4.norm.weight where other blocks of layers would have "),
        (backwards, "has layers.3.norm.bias where other blocks of layers would have layers.3.norm.weight"),
        (one_missing, "has layers.3.norm.bias where other blocks of layers would have layers.3.norm.weight"),
    ],
)
def test_groups_that_differ_between_blocks_are_refused(make_optimizer: MakeOptimizer, message: str) -> None:
    model = Stack(8)
    with pytest.raises(CaptureError, match=re.escape(message)):
        shorten(model, "layers").optimizer(make_optimizer(model), model)


def test_too_few_blocks_to_leave_some_out() -> None:
    with pytest.raises(CaptureError, match="layers has 4 blocks, of which 4 are to be kept"):
        shorten(Stack(4), "layers")


def test_what_cannot_be_copied_is_refused() -> None:
    model = Stack(6)
    model.generator = (each for each in ())  # type: ignore[assignment]
    with pytest.raises(CaptureError, match="the model cannot be copied: TypeError"):
        shorten(model, "layers")


# Blocks that differ


class Unlike(Layer):
    """Does something else if its number says so."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(index)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        odd = self.index % 2 == 1
        if self.what == "literal":
            return super().forward(x * (0.5 if odd else 0.25))
        if self.what == "operator":
            return super().forward(x.tanh() if odd else x.sigmoid())
        if self.what == "more":
            return super().forward(x.sin()) if odd else super().forward(x)
        if self.what == "constant":
            return super().forward(x * torch.tensor([1.0 + odd] * 6))
        return super().forward(x)


class Skipping(Stack):
    """Its end reads a layer from the middle."""

    def forward(self, x: Tensor) -> Tensor:
        x, every = self.enter(x), []
        for layer in self.layers:
            x = layer(x)
            every.append(x)
        return self.leave(x * every[1]).mean()


class Remembering(Stack):
    """Each layer reads the last but one."""

    def forward(self, x: Tensor) -> Tensor:
        every = [x, self.enter(x)]
        for layer in self.layers:
            every.append(layer(every[-1]) + every[-2])
        return self.leave(every[-1]).mean()


def one_by_one(model: nn.Module) -> torch.optim.Optimizer:
    """Every parameter has a learning rate of its own."""
    return torch.optim.SGD([{"params": [p]} for p in model.parameters()], 0.1)


DIFFERENT: dict[str, tuple[MakeModel, MakeOptimizer, str]] = {
    "literal": (lambda n: Stack(n, lambda i: Unlike(i, "literal")), sgd, "aten.mul.Tensor(%, 0.5) in one is"),
    "operator": (lambda n: Stack(n, lambda i: Unlike(i, "operator")), sgd, "aten.tanh.default(%) in one is aten.sig"),
    "more": (lambda n: Stack(n, lambda i: Unlike(i, "more")), sgd, "has no counterpart"),
    "constant": (lambda n: Stack(n, lambda i: Unlike(i, "constant")), sgd, "a constant f32[6] has other values"),
    "dropout": (
        lambda n: Stack(n, lambda i: Layer(i, dropout=0.1 * (i + 1))), sgd, "aten.bernoulli.p(%, 0.8) in one is"
    ),
    "width": (lambda n: Stack(n, lambda i: Wide(8 + i)), sgd, "f32[9, 6]"),
    "skip": (Skipping, sgd, "has no counterpart"),
    "remember": (Remembering, sgd, "blocks 1 and 2 of layers differ: what aten.add.Tensor reads in one"),
    "learning rates": (Stack, one_by_one, "reads in one"),
    "around": (Around, sgd, "has no counterpart"),
    "concatenated": (Concatenated, sgd, "reads in one is not what it reads in the other"),
    "frozen first layer": (lambda n: frozen(n, r"enter|layers.0"), sgd, "has no counterpart"),
    "frozen": (lambda n: frozen(n, r"layers.2.inner"), sgd, "has no counterpart"),
}  # fmt: skip


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


@pytest.mark.parametrize("what", DIFFERENT)
def test_blocks_that_differ_are_refused(what: str) -> None:
    make, make_optimizer, message = DIFFERENT[what]
    program = captured(make(FEW), make_optimizer)
    with pytest.raises(CaptureError, match=re.escape(message)) as refusal:
        repeat_blocks(program, "layers", MANY)
    assert "capture the whole model instead" in str(refusal.value)


def test_an_error_says_where() -> None:
    program = captured(Stack(FEW, lambda i: Unlike(i, "literal")))
    with pytest.raises(CaptureError, match=r"test_blocks\.py:\d+ \(forward\): return super\(\)\.forward\(x \* "):
        repeat_blocks(program, "layers", MANY)


@pytest.mark.parametrize(
    ("path", "before", "after", "message"),
    [
        ("blocks", 4, 7, "blocks has 0 blocks in what was captured"),
        ("layers", 3, 7, "layers has 3 blocks in what was captured"),
        ("layers", 6, 5, "6 blocks of layers were captured, of 5"),
    ],
)
def test_numbers_that_make_no_sense(path: str, before: int, after: int, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        repeat_blocks(captured(Stack(before)), path, after)


# Finding


class Odd(Layer):
    pass


def with_hook(layer: Layer) -> Layer:
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_frozen_bias(layer: Layer) -> Layer:
    layer.inner.bias.requires_grad_(False)
    return layer


def with_window(layer: Layer, window: tuple[int, int]) -> Layer:
    layer.window = window  # type: ignore[assignment]
    return layer


FOUND: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "equal": (Layer, True),
    "an index": (lambda i: Layer(10 + i), True),
    "an index that jumps": (lambda i: Layer(2 * i), False),
    "another class": (lambda i: Odd() if i == 2 else Layer(), False),
    "another size": (lambda i: nn.Linear(6, 7 if i == 2 else 6), False),
    "another dtype": (lambda i: nn.Linear(6, 6, dtype=torch.float64 if i == 2 else None), False),
    "another attribute": (lambda i: Layer(0, dropout=0.1 * (i == 2)), False),
    "a number for a flag": (lambda i: Layer(0, dropout=[0.0, 0.0, 0, 0.0][i]), False),
    "another window": (lambda i: with_window(Layer(), (4, 4 if i == 2 else 8)), False),
    "the same window": (lambda _: with_window(Layer(), (4, 8)), True),
    "frozen": (lambda i: with_frozen_bias(Layer()) if i == 2 else Layer(), False),
    "evaluated": (lambda i: Layer().train(i != 2), False),
    "a hook": (lambda i: with_hook(Layer()) if i == 2 else Layer(), False),
    "no bias": (lambda i: nn.Linear(6, 6, bias=i != 2), False),
}


@pytest.mark.parametrize("what", FOUND)
def test_finding_blocks(what: str) -> None:
    make, equal = FOUND[what]
    assert find_blocks(Stack(4, make)) == ([("layers", 4)] if equal else [])


def test_blocks_are_found_wherever_they_are() -> None:
    assert find_blocks(TwoLists(3, 5)) == [("first", 3), ("second", 5)]
    assert find_blocks(Rooted(3)) == [("model.layers", 3)]
    assert find_blocks(Ordered(3)) == [("layers", 3)]
    nested = Stack(3, lambda _: nn.Sequential(Layer(), Layer()))
    assert find_blocks(nested) == [("layers", 3)]
    assert find_blocks(nn.Linear(1, 1)) == []
    assert find_blocks(decoder("mixtral", 5)) == [("layers", 5)]


@pytest.mark.slow
def test_the_ends_of_a_long_list_may_differ() -> None:
    model = Stack(6, lambda i: Odd() if i in (0, 5) else Layer())
    assert find_blocks(model) == [("layers", 6)]
    assert find_blocks(Stack(6, lambda i: Odd() if i == 1 else Layer())) == []
    check(shortened(model, sgd(model)), captured(model))


# Hugging Face


def hugging_face(kind: str, num_layers: int) -> nn.Module:
    import transformers as hf

    sizes = {"vocab_size": 37, "num_hidden_layers": num_layers, "hidden_size": 16, "num_attention_heads": 4}
    if kind == "gpt2":
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=num_layers, n_head=4, **ends)
        )
    if kind == "t5":  # its first block has a parameter more, and there are two lists
        sizes = {"num_layers": num_layers, "num_decoder_layers": 2, "d_model": 16, "d_kv": 4, "d_ff": 24}
        return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=37, num_heads=4, decoder_start_token_id=0, **sizes))
    return hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=24, num_key_value_heads=2, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "path"), [("gpt2", "transformer.h"), ("llama", "model.layers"), ("t5", "encoder.block")]
)
def test_models_of_hugging_face(kind: str, path: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Program:
        return capture(model, optimizer, (), {"input_ids": tokens, "labels": tokens}, config=Config(clip_norm=1.0))

    tokens = torch.zeros(2, 8, dtype=torch.int64)
    model = hugging_face(kind, 6)
    optimizer = in_groups(model)
    assert (path, 6) in find_blocks(model)
    short = shorten(model, path)
    check(run(short.model, short.optimizer(optimizer, model)), run(model, optimizer), path)


# Size


@pytest.mark.slow
def test_eighty_blocks_take_seconds() -> None:
    config = find_model("llama3-70b")
    with torch.device("meta"):
        model = Decoder(config)
    optimizer = in_groups(model)
    short = shorten(model, "layers")
    tokens = torch.zeros(1, 8192, dtype=torch.int64, device="meta")
    few = capture(short.model, short.optimizer(optimizer, model), (tokens, tokens), {}, config=Config(precision="bf16"))
    start = time.perf_counter()
    program = repeat_blocks(few, "layers", config.layers)
    assert time.perf_counter() - start < 10  # 2 seconds on a machine that does nothing else
    assert len({what.name for _, what in program.placeholders() if what.name.startswith("layers.")}) == 9 * 80
