"""Sentence pairs as tokens, and batches of them in a fixed order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.data import EnglishChinese, Pair
from fastattn.data.subwords import BOS, EOS, PAD, Subwords

# Batches are cut from so many at a time, sorted by length: little padding, and still a random order.
POOL = 20

Tokens = tuple[list[int], list[int]]


class Batch(NamedTuple):
    """What a training step takes; PAD fills up rows on the right.

    Attributes:
        src: int64 [B, Ls], English and EOS.
        tgt: int64 [B, Lt], BOS and Chinese.
        want: int64 [B, Lt], Chinese and EOS: the tokens after those of `tgt`.
        src_documents, tgt_documents: int64 [B, Ls] and [B, Lt] where several pairs share a row: the number of
            the pair, PAD_DOCUMENT for padding; else None.
    """

    src: Tensor
    tgt: Tensor
    want: Tensor
    src_documents: Tensor | None = None
    tgt_documents: Tensor | None = None


PAD_DOCUMENT = -1


@dataclass(frozen=True)
class Text:
    """Pairs as tokens, with what made them.

    Attributes:
        subwords: the vocabulary, learnt from the training pairs alone.
        train: (English, Chinese) tokens of each pair, without BOS and EOS.
        held_out: pairs that neither training nor the vocabulary saw.
    """

    subwords: Subwords
    train: list[Tokens]
    held_out: tuple[Pair, ...]

    @staticmethod
    def of(data: EnglishChinese, vocab_size: int) -> Text:
        subwords = Subwords.learn((text for pair in data.train for text in pair[:2]), vocab_size)
        train = [(subwords.encode(pair.english), subwords.encode(pair.chinese)) for pair in data.train]
        return Text(subwords, train, data.held_out)

    def digest(self) -> str:
        """Hexadecimal number that differs where the training text or its tokens do."""
        return hashlib.sha256(repr(self.train).encode()).hexdigest()[:16]


def batches(pairs: Sequence[Tokens], size: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless batches, each pair once in an epoch, from batch number `start` of the order that `seed` gives.

    Raises:
        ValueError: fewer pairs than a batch has.
    """
    if len(pairs) < size:
        raise ValueError(f"pairs must be at least size={size}, got {len(pairs)}")
    an_epoch = len(pairs) // size
    epoch, first = divmod(start, an_epoch)
    while True:
        order = _epoch(pairs, size, random.Random(f"{seed} {epoch}"))
        for rows in order[first:]:
            yield padded([pairs[row] for row in rows])
        epoch, first = epoch + 1, 0


def _epoch(pairs: Sequence[Tokens], size: int, chance: random.Random) -> list[list[int]]:
    """The rows of every batch of an epoch; what does not fill a batch waits for the next epoch."""
    rows = list(range(len(pairs)))
    chance.shuffle(rows)
    del rows[len(rows) // size * size :]
    found = []
    for begin in range(0, len(rows), POOL * size):
        pool = sorted(rows[begin : begin + POOL * size], key=lambda row: tuple(map(len, pairs[row][::-1])))
        found += [pool[at : at + size] for at in range(0, len(pool), size)]
    chance.shuffle(found)
    return found


def padded(pairs: Sequence[Tokens], length: int | None = None) -> Batch:
    """One pair a row, as long as the longest, or of the length given."""
    return Batch(
        _rows([[*src, EOS] for src, _ in pairs], PAD, length),
        _rows([[BOS, *tgt] for _, tgt in pairs], PAD, length),
        _rows([[*tgt, EOS] for _, tgt in pairs], PAD, length),
    )


def packed(pairs: Sequence[Tokens], size: int, length: int) -> Batch:
    """`size` rows of `length`, filled with pairs in their order: as many as have room in a row stand in it.

    Raises:
        ValueError: too few pairs to fill the rows.
    """
    rows: list[list[Tokens]] = [[]]
    room = [length, length]
    for src, tgt in pairs:
        need = (len(src) + 1, len(tgt) + 1)
        if need[0] > room[0] or need[1] > room[1]:
            if len(rows) == size:
                break
            rows.append([])
            room = [length, length]
        rows[-1].append((src, tgt))
        room = [room[0] - need[0], room[1] - need[1]]
    else:
        raise ValueError(f"pairs must fill {size} rows of {length} tokens, got {len(pairs)} pairs")

    def joined(side: int, before: Sequence[int], after: Sequence[int]) -> Tensor:
        return _rows(
            [[t for pair in row for t in (*before, *pair[side], *after)] for row in rows], PAD, length
        )

    def documents(side: int) -> Tensor:
        numbers = [[n for n, pair in enumerate(row) for _ in range(len(pair[side]) + 1)] for row in rows]
        return _rows(numbers, PAD_DOCUMENT, length)

    return Batch(
        joined(0, (), (EOS,)), joined(1, (BOS,), ()), joined(1, (), (EOS,)), documents(0), documents(1)
    )


def _rows(rows: Sequence[Sequence[int]], filler: int, length: int | None) -> Tensor:
    length = max(map(len, rows)) if length is None else length
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])
