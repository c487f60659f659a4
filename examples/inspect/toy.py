"""What the recipes share: a small Transformer that labels each token, and its training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.masks import causal
from fastattn.models import Encoder
from fastattn.nn import LearnedPositionalEncoding, TokenEmbedding

Batch = tuple[Tensor, Tensor]  # tokens [B, L]; labels [B, L], -100 where there is none


class Labeller(nn.Module):
    """Logits [B, L, num_labels] of tokens [B, L]."""

    def __init__(self, vocab_size: int, num_labels: int, num_layers: int = 2, is_causal: bool = True):
        super().__init__()
        self.embedding = TokenEmbedding(vocab_size, 32)
        self.positions = LearnedPositionalEncoding(32, 32)
        self.encoder = Encoder(32, num_layers, 0.0, num_heads=4, d_ff=128, norm_first=True)
        self.output = nn.Linear(32, num_labels)
        self.mask = causal() if is_causal else None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.positions(self.embedding(tokens))
        return self.output(self.encoder(x, mask=self.mask))


def train(
    model: nn.Module,
    batch: Callable[[], Batch],
    steps: int,
    penalty: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Adam on the mean cross entropy of new batches.

    Args:
        penalty: runs the model on tokens and returns its logits and what to add to the loss.
    """
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        tokens, labels = batch()
        logits, extra = (model(tokens), 0.0) if penalty is None else penalty(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """Share of labels that the model finds."""
    tokens, labels = batch
    right = model(tokens).argmax(-1) == labels
    return right[labels >= 0].float().mean().item()


def sum_with(back: int, length: int = 14, size: int = 256) -> Batch:
    """Digits 0 to 7; the label of each is its sum with the digit `back` places before it, mod 8."""
    tokens = torch.randint(8, (size, length))
    labels = torch.full_like(tokens, -100)
    labels[:, back:] = (tokens[:, back:] + tokens[:, :-back]) % 8
    return tokens, labels


def looks_back(weights: Tensor, back: int) -> Tensor:
    """Mean weight [...] that queries give the key `back` places before them; weights [..., L, L]."""
    return weights.diagonal(-back, -2, -1).mean(-1)


def path_for(name: str) -> Path:
    """Where a recipe saves its picture: the folder given on the command line, else the current one."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
