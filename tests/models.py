"""Small models for tests: every trait a training step can have, with sizes that divide by nothing.

``CASES`` names them. Each gives a model, a batch of any number of samples, and how its loss is found. Where forward
draws random numbers or normalises over the batch (``per_rank``), N ranks are not one process on the concatenated
batch, and the reference is ``DistributedDataParallel``; everywhere else it is one process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Batch(NamedTuple):
    """What the model is called with; dimension 0 of every tensor is the sample."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def part(self, rank: int, world: int) -> Batch:
        """The ``rank``-th of ``world`` equal parts."""
        return pytree.tree_map_only(Tensor, lambda t: t.chunk(world)[rank].clone(), self)

    def to(self, place: torch.dtype | str) -> Batch:
        """The same batch on a device, or with its floating-point tensors in a dtype."""
        return pytree.tree_map_only(
            Tensor, lambda t: t.to(place) if isinstance(place, str) or t.is_floating_point() else t, self
        )


@dataclass(frozen=True)
class Case:
    """A model to train.

    Attributes:
        make_model: the model, initialised from the global generator.
        make_batch: a batch of so many samples from the global generator.
        loss: as in ``zgraph.compile``.
        per_rank: on N ranks it equals ``DistributedDataParallel``, not one process on the concatenated batch.
        vanishing: parameters with this in their name have a gradient that is zero in exact arithmetic, so that all
            they hold is rounding.
    """

    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], Batch]
    loss: Callable[..., Tensor] | None = None
    per_rank: bool = False
    vanishing: str | None = None

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A fresh model; equal seeds give equal models."""
        torch.manual_seed(seed)
        return self.make_model().to(dtype)

    def batches(self, num_steps: int, num_samples: int = 6, dtype: torch.dtype = torch.float32) -> list[Batch]:
        """One global batch for each step, the same on every rank."""
        torch.manual_seed(1234)
        return [self.make_batch(num_samples).to(dtype) for _ in range(num_steps)]


# Language models


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # Without a bias: a key's bias has no gradient but rounding, which Adam would turn into updates of full size.
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + F.dropout(self.proj(a.transpose(1, 2).reshape(B, T, D)), p)
        return x + F.dropout(self.out(F.gelu(self.fc(self.norm2(x)))), p)


class GPT(nn.Module):
    """A decoder-only transformer; ``forward`` returns the loss when it is given targets."""

    def __init__(
        self, width: int = 20, depth: int = 2, vocab: int = 37, *, tied: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width, 4, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class MixtureOfExperts(nn.Module):
    """Top-2 of 5 experts, dispatched densely: every token meets every expert, weighted by the gate, often by zero."""

    def __init__(self, width: int = 12, num_experts: int = 5, top: int = 2, vocab: int = 37) -> None:
        super().__init__()
        self.top = top
        self.tokens, self.norm, self.head = nn.Embedding(vocab, width), nn.LayerNorm(width), nn.Linear(width, vocab)
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(num_experts, width, 3 * width) / math.sqrt(width))
        self.w2 = nn.Parameter(torch.randn(num_experts, 3 * width, width) / math.sqrt(3 * width))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.norm(self.tokens(tokens))
        scores, chosen = self.gate(x).softmax(-1).topk(self.top, -1)
        scores = scores / scores.sum(-1, keepdim=True)
        weight = torch.einsum("btk,btke->bte", scores, F.one_hot(chosen, len(self.w1)).to(x))
        hidden = F.silu(torch.einsum("btd,edf->btef", x, self.w1))
        x = x + torch.einsum("btef,efd,bte->btd", hidden, self.w2, weight)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def tokens_and_targets(num_samples: int) -> Batch:
    return Batch((torch.randint(37, (num_samples, 7)), torch.randint(37, (num_samples, 7))), {})


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers; its operator on CPU, in float32, gives backward a workspace of its own."""

    def __init__(self, width: int = 6, vocab: int = 37) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocab, width), nn.Linear(2 * width, vocab)
        self.layers = nn.LSTM(width, width, 2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.layers(self.tokens(tokens))[0]).flatten(0, 1), targets.flatten())


# Awkward parameters and buffers


class Awkward(nn.Module):
    """Parameters of one element, no element and no dimension, prime sizes, a module used twice; logits come out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.full((1,), 0.13))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.cube = nn.Parameter(torch.randn(3, 1, 7))
        self.enter, self.middle, self.leave = nn.Linear(7, 13), nn.Linear(13, 13), nn.Linear(13, 3)
        self.again = self.middle

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.enter(x * self.cube.sum((0, 1))) * self.scale + self.shift
        x = self.again(torch.tanh(self.middle(x)))
        return self.leave(torch.cat([x.tanh(), x.new_zeros(len(x), 3) @ self.empty.t()], 1))


class Partial(nn.Module):
    """Frozen and unused parameters beside the trained ones; no sample's gradient reaches ``unused``."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained, self.unused = nn.Linear(7, 11), nn.Linear(11, 3), nn.Linear(5, 5)
        self.half_frozen = nn.Linear(11, 11)
        self.frozen.requires_grad_(False)
        self.half_frozen.bias.requires_grad_(False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.trained(F.relu(self.half_frozen(F.relu(self.frozen(x)))))


class Counting(nn.Module):
    """Buffers that forward writes in place (``steps``), assigns anew (``warmth``) or only reads (``offsets``)."""

    steps: Tensor
    warmth: Tensor
    offsets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(7, 5), nn.Linear(5, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("warmth", torch.ones(1))
        self.register_buffer("offsets", torch.linspace(-1, 1, 5), persistent=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.warmth = 0.9 * self.warmth + 0.01 * self.enter.weight.detach().norm()
        return self.leave(torch.tanh(self.enter(x) * self.warmth + self.offsets / self.steps))


class InPlace(nn.Module):
    """Operators that write where they read, through views and indices too."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.relu = nn.Linear(7, 9), nn.Linear(9, 3), nn.ReLU(inplace=True)
        self.gate = nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.enter(x)
        x += self.gate
        x[:, 0] = self.gate[1] + x[:, 1].tanh()
        x[:, 5:].mul_(2).sub_(x[:, :4].detach())
        x = self.relu(x.masked_fill_(x > 1.5, 0.25))
        out = torch.empty_like(x).copy_(x).clamp_(max=3)
        return self.leave(out.sigmoid_())


def features_and_classes(num_samples: int) -> Batch:
    return Batch((torch.randn(num_samples, 7), torch.randint(3, (num_samples,))), {})


def class_loss(logits: Tensor, _: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


# Images


class ResNet(nn.Module):
    """Two residual stages with BatchNorm and a strided projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList([self._stage(5, 5, 1), self._stage(5, 9, 2)])
        self.skips = nn.ModuleList([nn.Identity(), nn.Conv2d(5, 9, 1, stride=2, bias=False)])
        self.head = nn.Linear(9, 3)

    @staticmethod
    def _stage(num_in: int, num_out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_out, momentum=0.3),
        )

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.stem(x)
        for stage, skip in zip(self.stages, self.skips, strict=True):
            x = F.relu(stage(x) + skip(x), inplace=True)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Denoising diffusion: noise and time steps are drawn inside forward, and the loss is the noise's error."""

    signal: Tensor

    def __init__(self, width: int = 6, num_steps: int = 50) -> None:
        super().__init__()
        self.register_buffer("signal", torch.cos(torch.linspace(0, 1.5, num_steps)) ** 2)
        self.time = nn.Sequential(nn.Linear(2 * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 2 * width))
        self.enter, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, padding=1)
        self.norm, self.middle = nn.GroupNorm(3, 2 * width), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up, self.leave = nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        t = torch.randint(len(self.signal), images.shape[:1], device=images.device)
        signal = self.signal[t].view(-1, 1, 1, 1)
        frequencies = torch.exp(-torch.arange(6, device=images.device, dtype=images.dtype))
        angles = t[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None]
        high = F.silu(self.enter(signal.sqrt() * images + (1 - signal).sqrt() * noise))
        low = self.down(high)
        low = low + self.middle(F.silu(self.norm(low) + time))
        up = self.up(F.interpolate(low, scale_factor=2.0, mode="nearest"))
        return F.mse_loss(self.leave(torch.cat([up, high], 1)), noise)


def images_and_classes(num_samples: int) -> Batch:
    return Batch((torch.randn(num_samples, 3, 8, 8), torch.randint(3, (num_samples,))), {})


def images_only(num_samples: int) -> Batch:
    return Batch((torch.randn(num_samples, 3, 8, 8),), {})


# Recommendation


class Recommender(nn.Module):
    """DLRM: embedding tables far larger than the rest, pairwise dot products, two perceptrons; logits come out."""

    TABLES = (211, 7, 53)

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for rows in self.TABLES)
        self.user = nn.Embedding(97, width)
        self.bottom = nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 10, 11), nn.ReLU(), nn.Linear(11, 1))

    def forward(self, dense: Tensor, bags: Tensor, user: Tensor, clicked: Tensor) -> Tensor:
        dense = self.bottom(dense)
        sparse = [
            table(bags[:, i] % rows) for i, (table, rows) in enumerate(zip(self.tables, self.TABLES, strict=True))
        ]
        vectors = torch.stack([dense, self.user(user), *sparse], 1)
        rows, columns = torch.tril_indices(5, 5, -1)
        pairs = torch.bmm(vectors, vectors.transpose(1, 2))[:, rows, columns]
        return self.top(torch.cat([dense, pairs], 1)).squeeze(1)


def clicks(num_samples: int) -> Batch:
    n = num_samples
    dense, bags = torch.randn(n, 5), torch.randint(211, (n, 3, 4))
    return Batch((), {"dense": dense, "bags": bags, "user": torch.randint(97, (n,)), "clicked": torch.rand(n).round()})


def click_loss(logits: Tensor, *, clicked: Tensor, **_: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, clicked)


# Hugging Face, unmodified; imported only when used, since that takes seconds

_TINY = {
    "initializer_range": 0.2,
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 41,
}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=43, n_positions=16, n_embd=24, n_layer=2, n_head=4, initializer_range=0.2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=43, num_key_value_heads=2, max_position_embeddings=16, **_TINY))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    more = {"num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 16, "tie_word_embeddings": True}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=43, **more, **_TINY))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=12, patch_size=4, num_labels=5, **_TINY))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=43, d_model=24, d_kv=6, d_ff=41, num_layers=2, num_heads=4, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def causal_text(num_samples: int) -> Batch:
    tokens = torch.randint(43, (num_samples, 9))
    return Batch((), {"input_ids": tokens, "labels": tokens.clone()})


def translations(num_samples: int) -> Batch:
    source, target = torch.randint(43, (num_samples, 9)), torch.randint(43, (num_samples, 7))
    return Batch((), {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": target})


def labelled_images(num_samples: int) -> Batch:
    return Batch((), {"pixel_values": torch.randn(num_samples, 3, 12, 12), "labels": torch.randint(5, (num_samples,))})


CASES = {
    "gpt": Case(GPT, tokens_and_targets),
    "gpt_tied": Case(functools.partial(GPT, tied=True), tokens_and_targets),
    "gpt_dropout": Case(functools.partial(GPT, dropout=0.2), tokens_and_targets, per_rank=True),
    "awkward": Case(Awkward, features_and_classes, class_loss),
    "partial": Case(Partial, features_and_classes, class_loss),
    "counting": Case(Counting, features_and_classes, class_loss),
    "in_place": Case(InPlace, features_and_classes, class_loss),
    "recurrent": Case(Recurrent, tokens_and_targets),
    "experts": Case(MixtureOfExperts, tokens_and_targets),
    "recommender": Case(Recommender, clicks, click_loss),
    "resnet": Case(ResNet, images_and_classes, class_loss, per_rank=True),
    "unet": Case(UNet, images_only, per_rank=True),
    "gpt2": Case(gpt2, causal_text),
    "llama": Case(llama, causal_text),
    "qwen3": Case(qwen3, causal_text),
    "vit": Case(vit, labelled_images, vanishing="k_proj.bias"),
    "t5": Case(t5, translations),
}
