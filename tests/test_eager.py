"""``model(x)`` with divided parameters gives what the whole model gives, gathering little at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.layouts import layout_of
from zgraph import flat
from zgraph.eager import GatherOnUse
from zgraph.errors import StateError
from zgraph.state import TrainingState


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(23, 10, max_norm=None)
        self.norm = nn.LayerNorm(10)
        self.inner = nn.Linear(10, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(self.inner(self.wte(tokens))), self.wte.weight)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.PReLU(), nn.ConvTranspose2d(5, 4, 2), nn.GroupNorm(2, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Sequences(nn.Module):
    """Recurrent and attention layers, whose eval code takes short cuts of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10, 7, num_layers=2, bidirectional=True)
        self.gru = nn.GRUCell(14, 10)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        layer = nn.TransformerEncoderLayer(10, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.bag = nn.EmbeddingBag(11, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(x)
        x = torch.stack([self.gru(step) for step in y])
        x, _ = self.attention(x, x, x)
        return self.encoder(x) + self.bag(torch.arange(11).view(1, -1))


class Ways(nn.Module):
    """Every way to read a parameter other than to hand it to a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 4))
        self.b = nn.Parameter(torch.randn(5, 4))
        self.scalar = nn.Parameter(torch.randn(()))
        self.many = nn.ParameterList(torch.randn(4) for _ in range(3))
        self.named = nn.ParameterDict({"x": torch.randn(4)})

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        assert self.a.shape == (5, 4)
        assert self.a.size(0) == self.a.numel() // 4 == len(self.a) == 5
        assert self.a.dtype == torch.float32
        assert self.a.device == self.a.data.device == x.device
        assert not self.a.is_meta
        assert not self.a.is_cuda
        assert self.a.requires_grad
        assert self.a.is_contiguous()
        assert isinstance(self.a, nn.Parameter)
        self.a.grad = None
        return {
            "operators": x @ self.a.t() + (self.a * 2 - 1 / self.b).T[1] + self.scalar**2,
            "lists": torch.cat([self.a, self.b]),
            "stack": torch.stack(tuple(self.many)),
            "keywords": F.linear(input=x, weight=self.a, bias=self.b[:, 0]),
            "index": x[:, 0] * self.a[1, 2] + x[self.scalar.to(torch.long) * 0],
            "where": torch.where(self.a > 0, self.a, self.b),
            "data": self.a.data + self.b.detach(),
            "cast": self.a.to(torch.float64).sum() + self.b.double().mean(),
            "number": self.scalar.item() + float(self.scalar),
            "einsum": torch.einsum("ij,ij->i", self.a, self.b),
            "vector": torch.nn.utils.parameters_to_vector([self.a, self.named["x"]]),
            "clone": self.named["x"].clone().add_(self.many[0]),
            "numpy": self.a.detach().numpy().sum(),
            "norms": torch.stack(torch._foreach_norm([self.a, self.b])),
            "comprehension": sum(p.sum() for p in self.many),
            "list": self.many[0].tolist(),
            "bool": bool((self.a == self.a).all()),
        }


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "tied": (TiedHead, lambda: torch.arange(12).view(2, 6)),
    "images": (Images, lambda: torch.randn(2, 3, 8, 8)),
    "sequences": (Sequences, lambda: torch.randn(3, 4, 10)),
    "ways": (Ways, lambda: torch.randn(4, 4)),
}


def made(case: str) -> tuple[nn.Module, torch.Tensor]:
    make_model, make_input = CASES[case]
    torch.manual_seed(0)
    return make_model(), make_input()


def divided(model: nn.Module, **options: Any) -> TrainingState:
    state = TrainingState(model, None, dist.group.WORLD)
    state.commit(layout_of(model, dist.get_world_size(), 3, **options))
    return state


def forward(case: str, training: bool) -> None:
    model, x = made(case)
    model.train(training)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = model(x)
    model, x = made(case)
    model.train(training)
    state = divided(model)
    torch.manual_seed(1)
    with torch.no_grad(), GatherOnUse(state):
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_forward_equals_that_of_the_whole_model(ranks, case, training):
    ranks.run(forward, case, training, world=2)


def count_gathers(case: str, bucket_bytes: int) -> tuple[int, int, int]:
    """Number of gathers in two forwards, most full bytes alive at once, bytes of the model."""
    model, x = made(case)
    state = divided(model, bucket_bytes=bucket_bytes)
    num_gathers, most = 0, 0
    plain = flat.gather

    def counting(shard: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        nonlocal num_gathers, most
        num_gathers += 1
        most = max(most, sum(full.nbytes for full in mode._params._gathered.values()) + 2 * shard.nbytes)
        return plain(shard, group)

    mode = GatherOnUse(state)
    with mock.patch.object(flat, "gather", counting), torch.no_grad(), mode:
        model(x)
        model(x)
    assert len(state.layout.buckets) > 3
    return num_gathers, most, sum(bucket.num_bytes for bucket in state.layout.buckets)


def test_at_most_two_buckets_are_whole_at_a_time(ranks):
    num_gathers, most_bytes, model_bytes = ranks.run(count_gathers, "sequences", 2048, world=2)[0]
    assert num_gathers > 4
    assert most_bytes <= 2 * 4096  # the largest parameter fills a bucket of its own
    assert model_bytes > 3 * most_bytes


def metadata_only() -> int:
    model, _ = made("ways")
    state = divided(model)
    with mock.patch.object(flat, "gather") as gather, GatherOnUse(state):
        for p in model.parameters():
            assert (p.shape, p.dtype, p.device.type, p.requires_grad) == (p.size(), torch.float32, "cpu", True)
            p.requires_grad_(True)
    return gather.call_count


def test_reading_shapes_and_dtypes_gathers_nothing(ranks):
    assert ranks.run(metadata_only, world=2) == [0, 0]


def add_in_place(p: nn.Parameter) -> None:
    p.add_(1)


def augmented(p: nn.Parameter) -> None:
    p += 1


def assign_item(p: nn.Parameter) -> None:
    p[0] = 1


def initialise(p: nn.Parameter) -> None:
    nn.init.normal_(p)


def initialise_by_keyword(p: nn.Parameter) -> None:
    nn.init.zeros_(tensor=p)


def into_out(p: nn.Parameter) -> None:
    torch.add(torch.ones(5, 4), 1, out=p)


def write(ways: list[Callable[[nn.Parameter], None]]) -> None:
    model, _ = made("ways")
    state = divided(model)
    before = dict(state.full_params())
    for how in ways:
        with pytest.raises(StateError, match="would write to parameter 'a'"), torch.no_grad(), GatherOnUse(state):
            how(model.a)
        assert all(torch.equal(value, before[name]) for name, value in state.full_params())


def test_writing_to_a_divided_parameter_is_refused(ranks):
    ways = [add_in_place, augmented, assign_item, initialise, initialise_by_keyword, into_out]
    ranks.run(write, ways, world=2)


def test_whole_parameters_are_used_as_they_are():
    model, x = made("tied")
    expected = model(x)
    state = TrainingState(model, None, None)
    state.commit(layout_of(model, 1, 0))
    with GatherOnUse(state):
        assert torch.equal(model(x), expected)
        assert model(x).requires_grad
        with torch.no_grad():
            model.inner.weight.add_(1)
    assert not torch.equal(model(x), expected)


def generate() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=20, vocab_size=37, n_positions=32, bos_token_id=0, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(37, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    logits = model(tokens).logits
    state = divided(model, bucket_bytes=4096)
    with torch.no_grad(), GatherOnUse(state):
        assert torch.equal(model.generate(tokens, **options), expected)
        torch.testing.assert_close(model(tokens).logits, logits)


@pytest.mark.slow
def test_hugging_face_models_generate(ranks):
    ranks.run(generate, world=2)
