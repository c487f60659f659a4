"""Characters as tokens, and batches of them in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 0.05  # of the text, at its end


@dataclass(frozen=True)
class Tokens:
    """A text as numbers.

    Attributes:
        alphabet: the distinct characters, sorted; a token is an index into it.
        train, held_out: int64 [characters].
    """

    alphabet: str
    train: Tensor
    held_out: Tensor

    @staticmethod
    def of(text: str) -> Tokens:
        """
        >>> Tokens.of("abba" * 10).train[:4]
        tensor([0, 1, 1, 0])
        """
        alphabet = "".join(sorted(set(text)))
        index = {character: n for n, character in enumerate(alphabet)}
        tokens = torch.tensor([index[character] for character in text])
        held_out = int(len(tokens) * HELD_OUT)
        return Tokens(alphabet, tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :])

    def encode(self, text: str) -> Tensor:
        """int64 [len(text)]; every character must be in the alphabet."""
        return torch.tensor([self.alphabet.index(character) for character in text])

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.alphabet[token] for token in tokens.tolist())


def batches(tokens: Tensor, batch: int, seqlen: int, seed: int) -> Iterator[Tensor]:
    """Endless int64 [batch, seqlen + 1] pieces at random places, which depend on the arguments alone.

    Raises:
        ValueError: fewer than seqlen + 1 tokens.
    """
    if len(tokens) <= seqlen:
        raise ValueError(f"tokens must be more than {seqlen}, got {len(tokens)}")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(seqlen + 1)
    while True:
        starts = torch.randint(len(tokens) - seqlen, (batch, 1), generator=generator)
        yield tokens[starts + offsets]
