"""TokenEmbedding: token indices to vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.checks import check_int
from fastattn.execution import has_values
from fastattn.spec import dtype_name
from fastattn.validation import check_tensor


class TokenEmbedding(nn.Embedding):
    """sqrt(d_model) * weight[tokens].

    Weights are drawn from N(0, 1 / d_model): the vectors have unit variance, as positions about have, and so
    have the logits where an output projection shares the weights.

    >>> TokenEmbedding(vocab_size=10, d_model=4)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4])

    Args:
        vocab_size: number of tokens.
        d_model: width of the vectors.
        padding_idx: token whose vector starts as zeros and takes no gradient here; None for none.
        device, dtype: of the weights; torch's defaults where None.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.4.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("vocab_size", vocab_size, 1)
        check_int("d_model", d_model, 1)
        if padding_idx is not None and not 0 <= check_int("padding_idx", padding_idx) < vocab_size:
            raise ValueError(f"padding_idx must be from 0 to {vocab_size - 1} or None, got {padding_idx}")
        super().__init__(vocab_size, d_model, padding_idx, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weights again; the padding token's are zeros."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """The vectors of tokens.

        Args:
            input: int64 or int32, any shape; every value from 0 to vocab_size - 1.
        Returns:
            [..., d_model].
        Raises:
            TypeError: not int64 or int32.
            ValueError: a token outside of the vocabulary (on CPU).
        """
        check_tokens("tokens", input, self.num_embeddings)
        return super().forward(input) * math.sqrt(self.embedding_dim)


def check_tokens(name: str, tokens: Any, vocab_size: int) -> Tensor:
    """`tokens`, int64 or int32, which are from 0 to vocab_size - 1 as far as they can be read here.

    Raises:
        TypeError, ValueError: something else; `name` is the argument's.
    """
    check_tensor(name, tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {dtype_name(tokens.dtype)}")
    if tokens.numel() and has_values(tokens):
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must be from 0 to {vocab_size - 1}, got {low if low < 0 else high}")
    return tokens
