"""Target sentences from a trained Transformer: greedy and beam search, with caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.checks import check_int
from fastattn.models.transformer import Transformer

EXTRA_TOKENS = 50  # Vaswani et al. 2017, section 6.1: outputs of at most the input's length + 50


class Generated(NamedTuple):
    """What a search found.

    Args:
        tokens: int64 [B, T], each row up to and with its end token, then padding (the end token where the
            model has no padding_idx). A row that reached max_len has no end token.
        lengths: int64 [B], number of generated tokens, the end token counted.
        scores: float [B]; of greedy the natural log of the sequence's probability, of beam_search that
            divided by the length penalty.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


def greedy(
    model: Transformer,
    src: Tensor,
    *,
    bos_index: int,
    eos_index: int,
    max_len: int | None = None,
    src_lengths: Tensor | None = None,
) -> Generated:
    """The most probable token at every step.

    The model runs in eval mode without gradients, one new token a step, and is left in the mode it had.

    Args:
        model: a Transformer.
        src: int [B, Ls], padded on the right.
        bos_index: target token that every sentence starts with; not part of the result.
        eos_index: target token that ends a sentence.
        max_len: most tokens to generate, the end token counted; None for Ls + 50, or the model's own limit.
        src_lengths: int [B]; None to find them by the model's padding_idx.
    Returns:
        Generated; padding_idx is never generated.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    """
    max_len = _checked(model, src, bos_index, eos_index, max_len)
    with _evaluating(model):
        steps = _Steps(model, src, src_lengths)
        token = src.new_full((src.shape[0],), bos_index, dtype=torch.int64)
        scores = steps.zeros(src.shape[0])
        lengths = torch.zeros_like(token)
        open_rows = torch.ones_like(token, dtype=torch.bool)
        found: list[Tensor] = []
        while len(found) < max_len and open_rows.any():
            best, token = steps(token).max(-1)
            token = torch.where(open_rows, token, _filler(model, eos_index))
            scores = torch.where(open_rows, scores + best, scores)
            lengths += open_rows
            open_rows &= token != eos_index
            found.append(token)
    return Generated(_stack(found, src), lengths, scores)


def beam_search(
    model: Transformer,
    src: Tensor,
    *,
    bos_index: int,
    eos_index: int,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    max_len: int | None = None,
    src_lengths: Tensor | None = None,
) -> Generated:
    """argmax over sentences Y of log P(Y | X) / ((5 + |Y|) / 6)^length_penalty, among those a beam finds.

    Every step extends the beam_size most probable open sentences. One that ends among the beam_size best
    extensions is finished. A search ends when beam_size sentences are finished, or no open one can become
    better than the best finished one, or at max_len, where open ones count as they are. With beam_size=1 it
    finds what `greedy` finds.

    Args:
        beam_size: open sentences kept at every step.
        length_penalty: 0 for none; larger values favour longer sentences.
        model, src, bos_index, eos_index, max_len, src_lengths: as in `greedy`.
    Returns:
        Generated, the best sentence of each entry.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Wu et al. 2016, "Google's Neural Machine Translation System", equation 14 (length penalty).
    """
    max_len = _checked(model, src, bos_index, eos_index, max_len)
    check_int("beam_size", beam_size, 1)
    with _evaluating(model):
        steps = _Steps(model, src, src_lengths)
        beams = _Beams(steps, src, max_len, beam_size, float(length_penalty), eos_index)
        token = src.new_full((src.shape[0],), bos_index, dtype=torch.int64)
        while beams.length < max_len and not bool(beams.done.all()):
            token = beams.extend(steps(token))
    return beams.best(_filler(model, eos_index))


class _Steps:
    """log P(next token) for rows of unfinished sentences, one token a call."""

    def __init__(self, model: Transformer, src: Tensor, src_lengths: Tensor | None) -> None:
        self.model = model
        self.lengths = model.source_lengths(src) if src_lengths is None else src_lengths
        self.memory: Tensor | None = model.encode(src, src_lengths=self.lengths)
        self.cache = model.new_cache()

    def zeros(self, *shape: int) -> Tensor:
        """Scores to start from, in the dtype of log-probabilities."""
        weight = self.model.output.weight
        return torch.zeros(shape, dtype=_score_dtype(weight.dtype), device=weight.device)

    def __call__(self, token: Tensor) -> Tensor:
        """token: int64 [rows], the last of each; returns [rows, V]."""
        logits = self.model.decode(token[:, None], self.memory, src_lengths=self.lengths, cache=self.cache)[
            :, -1
        ]
        self.memory = None  # the cache holds it now, in every layer's projection
        result = logits.log_softmax(-1, dtype=_score_dtype(logits.dtype))
        if self.model.padding_idx is not None:
            result[:, self.model.padding_idx] = -torch.inf
        return result

    def reorder(self, rows: Tensor, *, same_source: bool) -> None:
        """Go on with other rows; same_source: each with a sentence of the same source as before."""
        self.cache.reorder(rows, memory=not same_source)
        if self.lengths is not None and not same_source:
            self.lengths = self.lengths[rows]


class _Beams:
    """Open and finished sentences of every batch entry.

    `open` [B, W, length] and `open_scores` [B, W] are log-probabilities, W <= beam_size growing from 1;
    `ended` [B, K, max_len], `ended_lengths` and `ended_scores` [B, K] are finished ones, best first, their
    scores penalised and -inf where there is none.
    """

    def __init__(
        self, steps: _Steps, src: Tensor, max_len: int, beam_size: int, penalty: float, eos_index: int
    ) -> None:
        batch = src.shape[0]
        self.steps, self.max_len, self.beam_size = steps, max_len, beam_size
        self.penalty, self.eos_index = penalty, eos_index
        self.length = 0
        self.open = torch.empty(batch, 1, 0, dtype=torch.int64, device=src.device)
        self.open_scores = steps.zeros(batch, 1)
        self.ended = torch.empty(batch, beam_size, max_len, dtype=torch.int64, device=src.device).fill_(-1)
        self.ended_lengths = torch.zeros(batch, beam_size, dtype=torch.int64, device=src.device)
        self.ended_scores = steps.zeros(batch, beam_size) - torch.inf
        self.num_ended = torch.zeros(batch, dtype=torch.int64, device=src.device)
        self.done = torch.zeros(batch, dtype=torch.bool, device=src.device)

    def extend(self, log_probs: Tensor) -> Tensor:
        """Take one more token each; returns the last tokens [B * W] of the new open sentences."""
        batch, width = self.open.shape[:2]
        vocab = log_probs.shape[-1]
        scores = (self.open_scores[:, :, None] + log_probs.view(batch, width, vocab)).flatten(1)
        # Each open sentence has one ending, so twice as many extensions leave enough that go on.
        scores, index = scores.topk(min(2 * self.beam_size, width * vocab))
        parent, token = index // vocab, index % vocab
        tokens = torch.cat((_take(self.open, parent), token[:, :, None]), 2)
        self.length += 1
        ends = token == self.eos_index
        self._finish(tokens, scores.masked_fill(~ends, -torch.inf)[:, : self.beam_size])

        self.open_scores, chosen = scores.masked_fill(ends, -torch.inf).topk(
            min(self.beam_size, scores.shape[1])
        )
        self.open = _take(tokens, chosen)
        if self.length == self.max_len:
            self._finish(self.open, self.open_scores)
        self._settle()
        parent = parent.gather(1, chosen)
        rows = (parent + torch.arange(batch, device=parent.device)[:, None] * width).flatten()
        self.steps.reorder(rows, same_source=parent.shape[1] == width)
        return self.open[:, :, -1].flatten()

    def best(self, filler: int) -> Generated:
        """The best finished sentence of every entry."""
        lengths = self.ended_lengths[:, 0]
        tokens = self.ended[:, 0, : int(lengths.max()) if lengths.numel() else 0]
        return Generated(tokens.masked_fill(tokens < 0, filler), lengths, self.ended_scores[:, 0])

    def _finish(self, tokens: Tensor, scores: Tensor) -> None:
        """Count sentences as finished, where their log-probability is not -inf and the search goes on."""
        scores = scores.masked_fill(self.done[:, None], -torch.inf)
        self.num_ended += (scores > -torch.inf).sum(1)
        scores = torch.cat((self.ended_scores, scores / self._divisor(self.length)), 1)
        padded = self.ended.new_full((*tokens.shape[:2], self.max_len), -1)
        padded[:, :, : self.length] = tokens
        self.ended_scores, chosen = scores.topk(self.beam_size)
        self.ended = _take(torch.cat((self.ended, padded[:, : scores.shape[1] - self.beam_size]), 1), chosen)
        lengths = torch.full_like(scores[:, self.beam_size :], self.length, dtype=torch.int64)
        self.ended_lengths = torch.cat((self.ended_lengths, lengths), 1).gather(1, chosen)

    def _settle(self) -> None:
        """Mark the entries whose search is over."""
        # Log-probabilities only fall, and are divided by at most the largest penalty still to come.
        divisor = max(self._divisor(self.length + 1), self._divisor(self.max_len))
        hope = self.open_scores.amax(1) / divisor
        self.done |= (self.num_ended >= self.beam_size) | (self.ended_scores[:, 0] >= hope)

    def _divisor(self, length: int) -> float:
        return ((5 + length) / 6) ** self.penalty


def _take(sentences: Tensor, index: Tensor) -> Tensor:
    """sentences [B, N, T] at index [B, M]: [B, M, T]."""
    return sentences.gather(1, index[:, :, None].expand(-1, -1, sentences.shape[2]))


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _filler(model: Transformer, eos_index: int) -> int:
    return eos_index if model.padding_idx is None else model.padding_idx


def _stack(found: list[Tensor], src: Tensor) -> Tensor:
    if found:
        return torch.stack(found, 1)
    return torch.empty(src.shape[0], 0, dtype=torch.int64, device=src.device)


def _checked(model: Transformer, src: Tensor, bos_index: int, eos_index: int, max_len: int | None) -> int:
    """The limit on generated tokens; raises where an argument breaks its rule."""
    if src.dim() != 2:
        raise ValueError(f"src must be [B, Ls], got shape {list(src.shape)}")
    vocab = model.output.weight.shape[0]
    for name, index in (("bos_index", bos_index), ("eos_index", eos_index)):
        if not 0 <= check_int(name, index) < vocab:
            raise ValueError(f"{name} must be from 0 to {vocab - 1}, got {index}")
    limit = model.positions.max_len
    if max_len is None:
        return min(src.shape[1] + EXTRA_TOKENS, limit)
    if check_int("max_len", max_len, 1) > limit:
        raise ValueError(f"max_len must be at most the model's {limit}, got {max_len}")
    return max_len


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Eval mode, no gradients; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
