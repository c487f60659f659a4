"""Philox4x32-10 in int64 torch arithmetic: the definition of which elements dropout keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mulhilo(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of m * x. x is split in half so that no product leaves int64."""
    upper = m * (x >> 16) + ((m * (x & 0xFFFF)) >> 16)
    return upper >> 16, (m * x) & _LOW


def philox4x32(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Random123's Philox4x32-10 of each counter.

    Args:
        seed: int64 tensor of one element; its low and high 32 bits are the key.
        counter: four int64 tensors holding 32-bit values, broadcastable to one shape S.
    Returns:
        int64 [4, *S], each a word in [0, 2**32).
    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3.
    """
    seed = seed.reshape(())
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    for _ in range(10):
        hi0, lo0 = _mulhilo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack([c0, c1, c2, c3])


def dropout_words(seed: Tensor, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The random word of every score, int64 [batch, heads, seqlen_q, seqlen_k].

    One Philox call serves the four columns j, j+16, j+32, j+48 of a block of 64, so that a vector
    of 4, 8 or 16 neighbouring columns takes its words from as many calls without a shuffle.
    """
    device = seed.device
    j = torch.arange(seqlen_k, device=device)
    i = torch.arange(seqlen_q, device=device).view(-1, 1)
    bh = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    words = philox4x32(seed, (16 * (j // 64) + j % 16, i, bh, torch.zeros_like(j)))
    lane = (j // 16 % 4).expand(1, *words.shape[1:])
    return words.gather(0, lane)[0]


def dropout_mask(
    seed: Tensor | int, batch: int, heads: int, seqlen_q: int, seqlen_k: int, p: float, device: Any = None
) -> Tensor:
    """The elements that dropout with this seed keeps: word >= int(p * 2**32).

    Args:
        seed: int64 tensor of one element, or an int.
        batch, heads: heads counts query heads.
        p: probability of dropping, 0 <= p <= 1.
        device: where the mask is made; the seed's device by default.
    Returns:
        bool [batch, heads, seqlen_q, seqlen_k], True = kept.

    >>> dropout_mask(0x0123456789ABCDEF, 1, 1, 1, 17, p=0.75)[0, 0, 0, [0, 16]].tolist()
    [False, True]
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    return dropout_words(seed, batch, heads, seqlen_q, seqlen_k) >= int(p * 2**32)
