"""Target sentences from a trained Transformer: greedy and beam search, with caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.checks import check_int
from fastattn.models.transformer import Transformer
from fastattn.spec import accumulate_dtype

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
        found = _Found.empty(steps, src.shape[0], max_len, _filler(model, eos_index))
        entries = torch.arange(src.shape[0], device=src.device)  # those that go on
        token = torch.full_like(entries, bos_index)
        for step in range(max_len):
            best, token = steps(token).max(-1)
            found.tokens[entries, step] = token
            found.lengths[entries] = step + 1
            found.scores[entries] += best
            going = (token != eos_index).nonzero()[:, 0]
            if going.shape[0] < entries.shape[0]:
                entries, token = entries[going], token[going]
                if not entries.shape[0]:
                    break
                steps.reorder(going, same_source=False)
    return found.trimmed()


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
        found = _Found.empty(steps, src.shape[0], max_len, _filler(model, eos_index))
        beams = _Beams(steps, found, beam_size, float(length_penalty), eos_index)
        token = src.new_full((src.shape[0],), bos_index, dtype=torch.int64)
        while token.shape[0]:
            token = beams.extend(steps(token))
    return found.trimmed()


class _Found(NamedTuple):
    """Room for one sentence of each batch entry: as Generated, with max_len columns of `filler` at first."""

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    filler: int

    @staticmethod
    def empty(steps: _Steps, batch: int, max_len: int, filler: int) -> _Found:
        """Sentences of no token."""
        scores = steps.zeros(batch)
        tokens = torch.full((batch, max_len), filler, dtype=torch.int64, device=scores.device)
        return _Found(tokens, torch.zeros_like(tokens[:, 0]), scores, filler)

    def trimmed(self) -> Generated:
        """Without the columns that no sentence reached."""
        longest = int(self.lengths.max()) if self.lengths.numel() else 0
        return Generated(self.tokens[:, :longest], self.lengths, self.scores)


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
        return torch.zeros(shape, dtype=accumulate_dtype(weight.dtype), device=weight.device)

    def __call__(self, token: Tensor) -> Tensor:
        """token: int64 [rows], the last of each; returns [rows, V]."""
        logits = self.model.decode(token[:, None], self.memory, src_lengths=self.lengths, cache=self.cache)
        self.memory = None  # the cache holds it now, in every layer's projection
        result = logits[:, -1].log_softmax(-1, dtype=accumulate_dtype(logits.dtype))
        if self.model.padding_idx is not None:
            result[:, self.model.padding_idx] = -torch.inf
        return result

    def reorder(self, rows: Tensor, *, same_source: bool) -> None:
        """Go on with other rows; same_source: each with a sentence of the same source as before."""
        self.cache.reorder(rows, memory=not same_source)
        if self.lengths is not None and not same_source:
            self.lengths = self.lengths[rows]


class _Beams:
    """Open and finished sentences of the batch entries whose search goes on.

    `open` [A, W, length] and `open_scores` [A, W] are log-probabilities, W <= beam_size growing from 1;
    `ended` [A, K, length], `ended_lengths` and `ended_scores` [A, K] are finished ones, best first, their
    scores penalised and -inf where there is none. `entries` [A] are the entries' places in the batch.
    """

    def __init__(self, steps: _Steps, found: _Found, beam_size: int, penalty: float, eos_index: int) -> None:
        self.steps, self.found = steps, found
        self.beam_size, self.penalty, self.eos_index = beam_size, penalty, eos_index
        self.length, self.max_len = 0, found.tokens.shape[1]
        self.open = found.tokens[:, None, :0]
        self.open_scores = found.scores[:, None]
        self.ended = self.open.expand(-1, beam_size, -1)
        self.ended_lengths = found.lengths[:, None].expand(-1, beam_size)
        self.ended_scores = torch.full_like(self.ended_lengths, -torch.inf, dtype=found.scores.dtype)
        self.num_ended = torch.zeros_like(found.lengths)
        self.entries = torch.arange(found.lengths.shape[0], device=found.lengths.device)

    def extend(self, log_probs: Tensor) -> Tensor:
        """Take one more token each; returns the last tokens [A * W] of the open sentences that go on."""
        count, width = self.open_scores.shape
        vocab = log_probs.shape[-1]
        scores = (self.open_scores[:, :, None] + log_probs.view(count, width, vocab)).flatten(1)
        # Each open sentence has one ending, so twice as many extensions leave enough that go on.
        scores, index = scores.topk(min(2 * self.beam_size, width * vocab))
        parent, token = index // vocab, index % vocab
        tokens = torch.cat((_take(self.open, parent), token[:, :, None]), 2)
        self.length += 1
        self.ended = F.pad(self.ended, (0, 1), value=self.found.filler)
        ends = token == self.eos_index
        self._finish(tokens, scores.masked_fill(~ends, -torch.inf)[:, : self.beam_size])

        keep = min(self.beam_size, scores.shape[1])
        self.open_scores, chosen = scores.masked_fill(ends, -torch.inf).topk(keep)
        self.open = _take(tokens, chosen)
        if self.length == self.max_len:
            self._finish(self.open, self.open_scores)
        going = self._settle()
        if going.shape[0]:
            first_rows = torch.arange(count, device=parent.device)[:, None] * width
            rows = (first_rows + parent.gather(1, chosen))[going]
            self.steps.reorder(rows.flatten(), same_source=rows.shape == (count, width))
        return self.open[:, :, -1].flatten()

    def _finish(self, tokens: Tensor, scores: Tensor) -> None:
        """Count the first sentences as finished, where their log-probability [A, N] is not -inf."""
        tokens = tokens[:, : scores.shape[1]]
        lengths = self.num_ended.new_full(scores.shape, self.length)
        self.num_ended = self.num_ended + (scores > -torch.inf).sum(1)
        scores = torch.cat((self.ended_scores, scores / self._divisor(self.length)), 1)
        self.ended_scores, chosen = scores.topk(self.beam_size)
        self.ended = _take(torch.cat((self.ended, tokens), 1), chosen)
        self.ended_lengths = torch.cat((self.ended_lengths, lengths), 1).gather(1, chosen)

    def _settle(self) -> Tensor:
        """Store the best sentence of each entry whose search is over; returns the places of the others."""
        # Log-probabilities only fall, and are divided by at most the largest penalty still to come.
        divisor = max(self._divisor(self.length + 1), self._divisor(self.max_len))
        hopeless = self.ended_scores[:, 0] >= self.open_scores[:, 0] / divisor
        over = hopeless | (self.num_ended >= self.beam_size)
        if self.length == self.max_len:
            over = torch.ones_like(over)
        entries = self.entries[over]
        self.found.tokens[entries, : self.length] = self.ended[over, 0]
        self.found.lengths[entries] = self.ended_lengths[over, 0]
        self.found.scores[entries] = self.ended_scores[over, 0]
        going = (~over).nonzero()[:, 0]
        if going.shape[0] < over.shape[0]:
            for name in _BY_ENTRY:
                setattr(self, name, getattr(self, name)[going])
        return going

    def _divisor(self, length: int) -> float:
        return ((5 + length) / 6) ** self.penalty


_BY_ENTRY = ("open", "open_scores", "ended", "ended_lengths", "ended_scores", "num_ended", "entries")


def _take(sentences: Tensor, index: Tensor) -> Tensor:
    """sentences [B, N, T] at index [B, M]: [B, M, T]."""
    return sentences.gather(1, index[:, :, None].expand(-1, -1, sentences.shape[2]))


def _filler(model: Transformer, eos_index: int) -> int:
    return eos_index if model.padding_idx is None else model.padding_idx


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
