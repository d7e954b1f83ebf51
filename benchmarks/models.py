"""The model that every peer trains: a plain GPT, its sizes by name, and its data.

Nothing here knows about ranks, sharding or compilers: peers differ only in what wraps this model. A seed fixes the
parameters and another the tokens, so all peers start from the same place and see the same batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT and of one rank's share of the batch."""

    width: int
    layers: int
    heads: int
    tokens: int
    vocabulary: int
    sequences: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A name from ``SHAPES``, or six integers ``width,layers,heads,tokens,vocabulary,sequences``.

        Raises:
            ValueError: saying what is wrong with ``text``.
        """
        if text in SHAPES:
            return SHAPES[text]
        names = [field.name for field in fields(cls)]
        parts = text.split(",")
        if len(parts) != len(names) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"{text!r} is neither {', '.join(SHAPES)} nor {len(names)} integers {','.join(names)}")
        shape = cls(*map(int, parts))
        if shape.width % shape.heads:
            raise ValueError(f"width {shape.width} is not a multiple of heads {shape.heads}")
        return shape

    def __str__(self) -> str:
        return ",".join(str(getattr(self, field.name)) for field in fields(self))

    @property
    def num_parameters(self) -> int:
        """Counted on the meta device, so any size costs nothing."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in GPT(self).parameters())


SHAPES = {
    "tiny": Shape(width=64, layers=2, heads=2, tokens=32, vocabulary=256, sequences=2),  # 0.13M: --quick
    "small": Shape(width=256, layers=8, heads=4, tokens=256, vocabulary=8192, sequences=4),  # 10.6M
    "medium": Shape(width=768, layers=12, heads=12, tokens=256, vocabulary=32768, sequences=2),  # 135.6M
    # Few tokens make activations negligible: what grows with the layers is the state of the parameters.
    "narrow": Shape(width=512, layers=4, heads=8, tokens=16, vocabulary=512, sequences=1),  # 13.1M: --slope, --cap
}


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised first and added to its input."""

    def __init__(self, width: int, heads: int, *, is_causal: bool = True) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states of shape (batch, tokens, width) to the same shape."""
        batch, tokens, width = hidden.shape
        packed = self.query_key_value(self.attention_norm(hidden))
        query, key, value = packed.view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        hidden = hidden + self.projection(attended.transpose(1, 2).reshape(batch, tokens, width))
        fed: Tensor = self.down(F.gelu(self.up(self.feed_forward_norm(hidden))))
        return hidden + fed


class GPT(nn.Module):
    """Token and position embeddings, blocks, and an untied output layer; called with targets, it returns the loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position_embedding = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of ``targets`` after each of ``tokens``, both (batch, tokens)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class VisionTransformer(nn.Module):
    """Patches of 16 x 16 pixels of 224 x 224, blocks, and scores of 1,000 classes from the mean over patches."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=16, stride=16)
        self.places = nn.Parameter(torch.zeros(14 * 14, width))
        self.blocks = nn.ModuleList(Block(width, heads, is_causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """The mean cross-entropy of ``classes`` (batch) for ``images`` (batch, 3, 224, 224)."""
        hidden = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(self.norm(hidden).mean(1)), classes)


def build_model(shape: Shape, device: str = "cpu") -> GPT:
    """The model with the parameters that every peer starts from; on ``meta``, with those that it will be given."""
    torch.manual_seed(0)
    with torch.device(device):
        return GPT(shape)


def shape_of(model: GPT, batch: tuple[Tensor, ...]) -> Shape:
    """What such a model and one rank's batch were built by."""
    return Shape(
        width=model.head.in_features,
        layers=len(model.blocks),
        heads=cast("Block", model.blocks[0]).heads,
        tokens=model.position_embedding.num_embeddings,
        vocabulary=model.head.out_features,
        sequences=len(batch[0]),
    )


def build_batch(shape: Shape, num_shares: int, shares: range) -> tuple[Tensor, Tensor]:
    """Tokens and targets of some of the ``num_shares`` shares of the batch, one share being one rank's."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(0, shape.vocabulary, (num_shares, shape.sequences, shape.tokens + 1), generator=generator)
    rows = rows[shares.start : shares.stop].flatten(0, 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
