"""SentenceEncoder: words to one vector, and a table of which word looked at which."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn.attention import Attention
from fastattn.nn.layer import ValidLens, as_tensor, check_lens, check_ranks


class SentenceEncoder(nn.Module):
    """mean_i y_i with y = self-attention of the words' vectors: a sentence of any length as one vector.

    >>> vectors = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    >>> vector, weights = SentenceEncoder().encode(["a", "b", "a"], vectors)
          a     b     a
    a 0.401 0.198 0.401
    b 0.248 0.503 0.248
    a 0.401 0.198 0.401
    >>> vector
    tensor([0.7003, 0.2997])

    Args:
        attention: a layer with attention(x, valid_lens=...) -> output or (output, weights), and
            `attention_weights`, such as `SingleHeadAttention(d_model, d_k)`; None for
            softmax(x xᵀ / sqrt(d)) x, which has nothing to learn.
    Raises:
        TypeError: attention is no layer.
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1; Lin et al. 2017, "A Structured
    Self-attentive Sentence Embedding" (arXiv 1703.03130).
    """

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        attention = Attention("scaled_dot") if attention is None else attention
        if not isinstance(attention, nn.Module):
            raise TypeError(f"attention must be a layer or None, got {type(attention).__name__}")
        self.attention = attention

    def forward(self, x: Tensor, valid_lens: ValidLens | None = None, mask: Any = None) -> Tensor:
        """One vector for each sentence.

        Args:
            x: [B, L, d], vectors of words.
            valid_lens: int [B], words of each sentence, from 0 to L; the rest is padding. None for all.
            mask: of which word sees which, as the attention layer takes it (lesson layers: 1 = blocked).
        Returns:
            [B, d]; 0 for a sentence without words.
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        check_ranks((3,), "[B, L, d]", x=x)
        if valid_lens is not None:
            valid_lens = check_lens(valid_lens, len(x), x.shape[1], x.shape[1], x.device)
            if valid_lens.dim() != 1:
                raise ValueError(f"valid_lens must be [{len(x)}], got shape {list(valid_lens.shape)}")
        y = self.attention(x, valid_lens=valid_lens, **({} if mask is None else {"mask": mask}))
        y = y[0] if isinstance(y, tuple) else y
        if valid_lens is None:
            return y.mean(1) if y.shape[1] else y.new_zeros(y.shape[0], y.shape[2])
        lens = valid_lens[:, None]
        words = torch.arange(y.shape[1], device=y.device) < lens
        return torch.where(words[..., None], y, 0).sum(1) / lens.clamp(min=1)

    @property
    def attention_weights(self) -> Tensor | None:
        """The weights of the last call, [B, L, L]; None before any, or if the layer does not tell them."""
        return getattr(self.attention, "attention_weights", None)

    def encode(
        self, words: Sequence[str], word_vectors: Mapping[str, Any], *, show: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(vector [d], weights [L, L]) of one sentence; prints the weights, labelled by the words.

        With heads the weights are [H, L, L], and their mean is printed.

        Args:
            words: at least one.
            word_vectors: the vector of each word, tensors or sequences of one length d.
            show: whether to print.
        Raises:
            KeyError: a word without a vector, which is named.
            TypeError, ValueError: no words; no vectors; vectors of different lengths.
        """
        if isinstance(words, str):
            raise TypeError(f"words must be a sequence of words, got the string {words!r}: split it first")
        if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
            raise TypeError(f"words must be a sequence of strings, got {words!r}")
        if isinstance(word_vectors, Tensor) or not hasattr(word_vectors, "__contains__"):
            kind = type(word_vectors).__name__
            raise TypeError(f"word_vectors must map words to vectors, as a dict does, got {kind}")
        if not words:
            raise ValueError("words must hold at least one word, got none")
        unknown = list(dict.fromkeys(word for word in words if word not in word_vectors))
        if unknown:
            raise KeyError(f"word_vectors must have every word, got none for {', '.join(map(repr, unknown))}")
        vectors = [as_tensor(f"word_vectors[{word!r}]", word_vectors[word]) for word in words]
        for word, vector in zip(words, vectors, strict=True):
            if vector.dim() != 1 or vector.shape != vectors[0].shape:
                want, shape = vectors[0].numel(), list(vector.shape)
                raise ValueError(
                    f"word_vectors must have one length, here {want}, got shape {shape} for {word!r}"
                )
        x = torch.stack(vectors)[None]
        vector = self(x if x.is_floating_point() else x.float())[0]
        found = self.attention_weights
        if found is None:
            kind = type(self.attention).__name__
            raise TypeError(
                f"attention must have attention_weights, as nn.SingleHeadAttention has, to encode, got {kind}"
            )
        weights = found[0].to(vector.dtype)
        if show:
            print(weight_table(words, weights if weights.dim() == 2 else weights.mean(0)))
        return vector, weights


def weight_table(words: Sequence[str], weights: Tensor) -> str:
    """Weights [L, L] as text: one line for each word, one column for each word that it looks at.

    >>> print(weight_table(["to", "be"], torch.tensor([[0.25, 0.75], [0.5, 0.5]])))
          to    be
    to 0.250 0.750
    be 0.500 0.500
    """
    first = max(map(_columns, words))
    widths = [max(5, _columns(word)) for word in words]
    header = (" " * (width - _columns(word)) + word for word, width in zip(words, widths, strict=True))
    lines = [" ".join([" " * first, *header])]
    for word, row in zip(words, weights.tolist(), strict=True):
        cells = (f"{value:>{width}.3f}" for value, width in zip(row, widths, strict=True))
        lines.append(" ".join([word + " " * (first - _columns(word)), *cells]))
    return "\n".join(lines)


def _columns(text: str) -> int:
    """How wide a terminal draws it: Chinese and its like take two columns a character."""
    return sum(2 if unicodedata.east_asian_width(character) in "FW" else 1 for character in text)
