"""HierarchicalAttention: words to sentences to a document, each by its most telling parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import leading
from fastattn.call import Call
from fastattn.checks import check_int
from fastattn.masks.space import is_integer
from fastattn.nn.layer import (
    AttentionLayer,
    ValidLens,
    as_tensor,
    check_bounds,
    check_lens,
    check_ranks,
    join_lens,
)
from fastattn.nn.recurrent import read_padded
from fastattn.nn.scores import check_dtype
from fastattn.spec import dtype_name
from fastattn.validation import check_tensor


class AttentionPooling(AttentionLayer):
    """y = Σ_t α_t x_t, α = softmax_t(u · tanh(W x_t + b)): a sequence as one vector, by a learned query u.

    >>> pool = AttentionPooling(8)
    >>> list(pool(torch.randn(2, 5, 8), valid_lens=[3, 5]).shape), list(pool.attention_weights.shape)
    ([2, 8], [2, 5])

    Args:
        input_size: features of x.
        attention_size: features of the query; input_size where None.
        device, dtype: of the weights; torch's defaults where None.
    Source: Yang et al. 2016, "Hierarchical Attention Networks for Document Classification", equations 5 to 7.
    """

    def __init__(
        self,
        input_size: int,
        attention_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = check_int("input_size", input_size, 1)
        size = input_size if attention_size is None else check_int("attention_size", attention_size, 1)
        self.project = nn.Linear(input_size, size, device=device, dtype=dtype)
        self.query = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights again; the query's are uniform in ±1 / sqrt(attention_size)."""
        self.project.reset_parameters()
        nn.init.uniform_(self.query, -(self.query.numel() ** -0.5), self.query.numel() ** -0.5)

    def forward(self, x: Tensor, valid_lens: ValidLens | None = None, mask: Tensor | None = None) -> Tensor:
        """One vector for each sequence.

        Args:
            x: [B, L, input_size].
            valid_lens: int [B], how many of the first vectors count; None for all.
            mask: bool [B, L], True = counts.
        Returns:
            [B, input_size]; 0 where nothing counts.
        """
        check_ranks((3,), f"[B, L, {self.input_size}]", x=x)
        if x.shape[-1] != self.input_size:
            raise ValueError(f"x must be [B, L, {self.input_size}], got shape {list(x.shape)}")
        check_dtype("x", x, self.project.weight)
        _check_mask(mask, x)
        k = torch.tanh(self.project(x))
        q = self.query.to(k.dtype).expand(x.shape[0], 1, -1)
        # A query for each sequence: the lengths are [B], not one for each of x.
        lens = None if valid_lens is None else check_lens(valid_lens, x.shape[0], 1, x.shape[1], x.device)
        visible = join_lens(None if mask is None else mask[:, None], lens, x)
        call = Call("attention", q, k, x, mask=visible, scale=1.0, names=_NAMES)
        self._remember(replace(call, q=q.detach().clone()))  # of the parameter, which optimizers change
        return leading.run(call).squeeze(1)

    @property
    def attention_weights(self) -> Tensor | None:
        """α of the last call, [B, L]; see `AttentionLayer`."""
        weights = super().attention_weights
        return None if weights is None else weights.squeeze(1)


_NAMES = {"q": "query", "k": "x", "v": "x", "mask": "mask"}


class HierarchicalAttention(nn.Module):
    """Sentences are attention pooled from words, the document from sentences, each read by a GRU first.

    s_i = Σ_t α_it h_it and d = Σ_i α_i h_i, with h_it, h_i the states of bidirectional GRUs over the words of
    sentence i and over the sentences. Documents are ragged: padding changes nothing.

    >>> layer = HierarchicalAttention(input_size=16, hidden_size=8)
    >>> documents = [[torch.randn(4, 16), torch.randn(7, 16)], [torch.randn(2, 16)]]
    >>> x, word_lens = pad_documents(documents)
    >>> list(layer(x, word_lens).shape)
    [2, 16]
    >>> words, sentences = layer.attention_weights
    >>> list(words.shape), list(sentences.shape)
    ([2, 2, 7], [2, 2])

    Args:
        input_size: features of a word's vector.
        hidden_size: of each direction of each GRU; sentences and documents have 2 hidden_size features.
        attention_size: features of the two queries; 2 hidden_size where None.
        device, dtype: of the weights; torch's defaults where None.
    Source: Yang et al. 2016, "Hierarchical Attention Networks for Document Classification", section 2.2.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 50,
        attention_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = check_int("input_size", input_size, 1)
        self.hidden_size = check_int("hidden_size", hidden_size, 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        both = 2 * hidden_size
        self.word_encoder = nn.GRU(input_size, hidden_size, batch_first=True, bidirectional=True, **factory)
        self.word_pooling = AttentionPooling(both, attention_size, **factory)
        self.sentence_encoder = nn.GRU(both, hidden_size, batch_first=True, bidirectional=True, **factory)
        self.sentence_pooling = AttentionPooling(both, attention_size, **factory)

    def forward(self, x: Tensor, valid_lens: ValidLens | None = None, mask: Tensor | None = None) -> Tensor:
        """One vector for each document.

        Args:
            x: [B, S, W, input_size], vectors of words, padded on the right; see `pad_documents`.
            valid_lens: int [B, S], words of each sentence (0 where there is none), or [B], sentences of each
                document, with all W words. None: nothing is padding.
            mask: bool [B, S, W], True = the word may be attended to. A sentence in which none may is not
                attended to either.
        Returns:
            [B, 2 hidden_size]; 0 for a document without words.
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        if isinstance(x, (list, tuple)):
            raise TypeError(
                f"x must be a tensor, got {type(x).__name__}: pad_documents makes one of documents"
            )
        check_ranks((4,), f"[B, S, W, {self.input_size}]", x=x)
        if x.shape[-1] != self.input_size:
            raise ValueError(f"x must be [B, S, W, {self.input_size}], got shape {list(x.shape)}")
        check_dtype("x", x, self.word_pooling.project.weight)
        lens = _word_lens(valid_lens, x)
        _check_mask(mask, x)
        words = read_padded(self.word_encoder, x.flatten(0, 1), lens.flatten())
        seen = None if mask is None else mask.flatten(0, 1)
        sentences = self.word_pooling(words, lens.flatten(), seen).unflatten(0, lens.shape)
        exists = lens > 0
        if mask is not None:
            exists = exists & (mask & (torch.arange(x.shape[2], device=x.device) < lens[..., None])).any(-1)
        last = (torch.arange(1, lens.shape[1] + 1, device=x.device) * exists).amax(1)
        states = read_padded(self.sentence_encoder, sentences, last)
        return self.sentence_pooling(states, None, exists)

    @property
    def attention_weights(self) -> tuple[Tensor, Tensor] | None:
        """(weights of words [B, S, W], weights of sentences [B, S]) of the last call, None before any."""
        words, sentences = self.word_pooling.attention_weights, self.sentence_pooling.attention_weights
        if words is None or sentences is None:
            return None
        return words.unflatten(0, sentences.shape), sentences


def pad_documents(documents: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Ragged documents as one tensor.

    >>> x, word_lens = pad_documents([[torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([4])]])
    >>> x.tolist(), word_lens.tolist()
    ([[[1, 2], [3, 0]], [[4, 0], [0, 0]]], [[2, 1], [1, 0]])

    Args:
        documents: of each its sentences, [words, ...]: vectors of words, or their indices.
    Returns:
        x [B, S, W, ...], 0 in the padding; valid_lens int64 [B, S], words of each sentence.
    Raises:
        TypeError: a document is no sequence of sentences, or a sentence no tensor.
        ValueError: no sentence at all; words of different shapes.
    """
    if isinstance(documents, Tensor | str) or not isinstance(documents, Sequence):
        raise TypeError(f"documents must be a sequence of documents, got {type(documents).__name__}")
    for b, document in enumerate(documents):
        if isinstance(document, Tensor | str) or not isinstance(document, Sequence):
            got = type(document).__name__
            raise TypeError(f"documents[{b}] must be a sequence of sentences, got {got}")
        for s, sentence in enumerate(document):
            if check_tensor(f"documents[{b}][{s}]", sentence).dim() == 0:
                raise ValueError(f"documents[{b}][{s}] must be [words, ...], got a number")
    sentences = [sentence for document in documents for sentence in document]
    if not sentences:
        raise ValueError("documents must hold at least one sentence, got none")
    for sentence in sentences:
        if sentence.shape[1:] != sentences[0].shape[1:]:
            first, got = list(sentences[0].shape[1:]), list(sentence.shape[1:])
            raise ValueError(f"documents must have words of one shape, got {first} and {got}")
    shape = len(documents), max(map(len, documents)), max(map(len, sentences))
    x = sentences[0].new_zeros(*shape, *sentences[0].shape[1:])
    lens = torch.zeros(shape[:2], dtype=torch.int64)
    for b, document in enumerate(documents):
        for s, sentence in enumerate(document):
            x[b, s, : len(sentence)] = sentence
            lens[b, s] = len(sentence)
    return x, lens.to(x.device)


def _check_mask(mask: Tensor | None, x: Tensor) -> None:
    """Raise unless mask is bool, of x's dimensions but the last."""
    if mask is None:
        return
    if check_tensor("mask", mask).dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = counts), got {dtype_name(mask.dtype)}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {list(x.shape[:-1])}, got shape {list(mask.shape)}")


def _word_lens(valid_lens: ValidLens | None, x: Tensor) -> Tensor:
    """Words of each sentence, int64 [B, S]."""
    batch, sentences, words = x.shape[:3]
    if valid_lens is None:
        return torch.full((batch, sentences), words, device=x.device)
    lens = as_tensor("valid_lens", valid_lens, x.device)
    if not is_integer(lens):
        raise TypeError(f"valid_lens must be integers, got {dtype_name(lens.dtype)}")
    if lens.shape not in ((batch,), (batch, sentences)):
        raise ValueError(f"valid_lens must be [{batch}] or [{batch}, {sentences}], got {list(lens.shape)}")
    if lens.dim() == 1:
        check_bounds("valid_lens", lens, sentences, "number of sentences")
        return (torch.arange(sentences, device=x.device) < lens[:, None]) * words
    check_bounds("valid_lens", lens, words, "number of words")
    return lens.long()
