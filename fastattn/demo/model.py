"""The demo's language model: plain PyTorch, with no word of fastattn in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; `dropout` is the probability with which an attention weight is dropped."""

    vocab_size: int
    num_layers: int = 4
    num_heads: int = 4
    width: int = 128
    dropout: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


def rotation(seqlen: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [seqlen, head_dim / 2] each, of position * 10000^(-2 i / head_dim)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(seqlen)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding: turns the pairs (x_i, x_{i + head_dim / 2}) of [B, H, L, head_dim]."""
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)); [B, L, width] in and out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.proj.weight)  # with these two the block starts as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).transpose(1, -2)
        q, k, v = heads.unbind(2)  # [B, H, L, head_dim] each
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, None, dropout_p, True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Logits of each next token: [B, L] int64 to [B, L, vocab_size], each row from the tokens up to it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        turn = rotation(tokens.shape[1], self.config.head_dim)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, turn)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood, in nats, of tokens[:, 1:] given those before; tokens [B, L + 1]."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def new_model(config: ModelConfig, seed: int) -> LanguageModel:
    """A model whose weights depend on `config` and `seed` alone, with the default generator seeded too."""
    torch.manual_seed(seed)
    return LanguageModel(config)
