"""What is trained and how: with the text, these numbers fix a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastattn.data.subwords import PAD
from fastattn.models import Transformer


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimizer steps.
        seed: of weights, of the order of batches, and of dropout.
        batch: sentence pairs a step.
        vocab_size: most tokens of the vocabulary that both languages share.
        dropout: on embeddings and on each sublayer's output; attention weights are not dropped, so that runs
            with other kernels draw the same random numbers.
        learning_rate: the highest, reached after `warmup` steps; then half a cosine down to nothing.
        smoothing: of labels.
    """

    steps: int = 1000
    seed: int = 0
    batch: int = 64
    vocab_size: int = 6000
    d_model: int = 192
    num_heads: int = 4
    num_layers: int = 3
    d_ff: int = 768
    dropout: float = 0.1
    learning_rate: float = 2e-3
    warmup: int = 150
    smoothing: float = 0.1

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def model(
        self, vocab_size: int, attention: str = "fastattn", attention_dropout: float = 0.0
    ) -> Transformer:
        """A new model, the same from the same seed whatever its attention; seeds the default generator."""
        torch.manual_seed(self.seed)
        return Transformer(
            vocab_size,
            vocab_size,
            self.d_model,
            self.num_layers,
            self.dropout,
            num_heads=self.num_heads,
            d_ff=self.d_ff,
            attention_dropout=attention_dropout,
            norm_first=True,
            share_embeddings=True,
            padding_idx=PAD,
            attention=attention,
        )
