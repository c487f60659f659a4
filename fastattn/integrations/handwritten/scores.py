"""What a product of queries and keys has become so far, and the attention call that it amounts to.

Models give scores any leading dimensions and reshape them on the way: [B H, L, S] into [B, H, L, S], windows
out of the batch and back. Each bias is kept with the leading shape that it was added at; only when values
arrive are all shapes cut into common factors and joined into the [batch, heads] of `fastattn.attention`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.autocast import autocast_dtype
from fastattn.functional import attention

Lead = tuple[int, ...]


class NotFusable(Exception):
    """The scores have a form that no one call of attention has."""


@dataclass(frozen=True)
class Scores:
    """scale q k^T + sum of factor bias, where every keep is True, -inf elsewhere.

    Attributes:
        q: [*, L, D]; k: [*, S, D]: leading dimensions that broadcast to `lead`.
        lead: leading dimensions of the product.
        scale: of the product.
        biases: (bias [*, L|1, S|1] that broadcasts to the scores, factor, leading shape of the scores then).
        keeps: (bool [*, L|1, S|1], leading shape of the scores then).
    """

    q: Tensor
    k: Tensor
    lead: Lead
    scale: float = 1.0
    biases: tuple[tuple[Tensor, float, Lead], ...] = ()
    keeps: tuple[tuple[Tensor, Lead], ...] = ()


@dataclass(frozen=True)
class Weights:
    """softmax of the scores; kept with probability 1 - dropout_p and divided by it, where seed is given."""

    scores: Scores
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def leads(self, *more: Lead) -> list[Lead]:
        scores = self.scores
        return [scores.lead, *(b[2] for b in scores.biases), *(keep[1] for keep in scores.keeps), *more]


@dataclass(frozen=True)
class Transposed:
    """Weights with keys as rows, which stand to the right of their values."""

    weights: Weights


@dataclass(frozen=True)
class RowMaximum:
    """The largest score of each query, [*, L] or [*, L, 1]: a softmax is the same with it subtracted."""


@dataclass(frozen=True)
class Fold:
    """Leading dimensions cut into factors, those before `at` being the batch and the others the heads."""

    factors: Lead
    at: int

    @property
    def batch(self) -> int:
        return math.prod(self.factors[: self.at])

    @property
    def heads(self) -> int:
        return math.prod(self.factors[self.at :])

    def sizes(self, tensor: Tensor) -> tuple[int, int]:
        """Batch and heads that a tensor of `cut` needs: 1 where it is the same for all."""
        lead = tensor.shape[:-2]
        batch = 1 if all(n == 1 for n in lead[: self.at]) else self.batch
        return batch, 1 if all(n == 1 for n in lead[self.at :]) else self.heads

    def apply(self, tensor: Tensor, batch: int, heads: int) -> Tensor:
        """A tensor of `cut` as [batch, heads, a, b]."""
        lead = [1] * self.at if batch == 1 else self.factors[: self.at]
        lead = [*lead, *([1] * (len(self.factors) - self.at) if heads == 1 else self.factors[self.at :])]
        return tensor.expand(*lead, *tensor.shape[-2:]).reshape(batch, heads, *tensor.shape[-2:])


def attend(weights: Weights, v: Tensor, lead: Lead) -> Tensor:
    """weights @ v as one call of attention.

    Args:
        v: [*, S, Dv], leading dimensions that broadcast to `lead`.
        lead: leading dimensions of the weights.
    Returns:
        [*lead, L, Dv] of v's dtype.
    Raises:
        NotFusable: no one call says the same.
    """
    scores = weights.scores
    if not _broadcasts(v.shape[:-2], lead):
        raise NotFusable("the values have more leading dimensions than the weights")
    fold, bias, keep = _fold(weights, lead)
    q = fold.apply(cut(scores.q, scores.lead, fold.factors), fold.batch, fold.heads)
    k, v_cut = cut(scores.k, scores.lead, fold.factors), cut(v, lead, fold.factors)
    heads_kv = max(fold.sizes(k)[1], fold.sizes(v_cut)[1])
    k, v_4d = (fold.apply(t, fold.batch, heads_kv) for t in (k, v_cut))
    if autocast_dtype(q) is None:
        dtype = torch.promote_types(q.dtype, v.dtype)
        q, k, v_4d = q.to(dtype), k.to(dtype), v_4d.to(dtype)
        if bias is not None and bias.dtype not in (dtype, torch.float32):
            bias = bias.to(dtype)
    out = attention(
        q,
        k,
        v_4d,
        mask=keep,
        bias=bias,
        scale=scores.scale,
        dropout_p=weights.dropout_p,
        dropout_seed=weights.seed,
    )
    out = out.reshape(*lead, *out.shape[-2:])
    return out if autocast_dtype(q) is not None else out.to(v.dtype)


def dropped(weights: Weights, probabilities: Tensor) -> Tensor:
    """The weights after the dropout that `attend` runs with.

    Args:
        probabilities: [*lead, L, S], the weights before it.
    """
    # Imported here: only models that ask for weights in training need it.
    from fastattn.philox import dropout_mask

    if weights.seed is None:
        return probabilities
    fold, _, _ = _fold(weights, tuple(probabilities.shape[:-2]))
    seqlen_q, seqlen_k = probabilities.shape[-2:]
    keep = dropout_mask(weights.seed, fold.batch, fold.heads, seqlen_q, seqlen_k, weights.dropout_p)
    return probabilities * keep.view(probabilities.shape) / (1 - weights.dropout_p)


def cut(tensor: Tensor, lead: Lead, factors: Lead) -> Tensor:
    """A tensor whose leading dimensions broadcast to `lead`, with one dimension, or 1, for each factor."""
    shape: list[int] = []
    at = 0
    own = [1] * (len(lead) - (tensor.dim() - 2)) + list(tensor.shape[:-2])
    for size, whole in zip(own, lead, strict=True):
        start, group = at, 1
        while group < whole:
            group *= factors[at]
            at += 1
        shape += [1] * (at - start) if size == 1 else factors[start:at]
    return tensor.reshape(*shape, *tensor.shape[-2:])


def factors_of(leads: list[Lead]) -> Lead:
    """Sizes, none of them 1, of which each leading shape is a sequence of products.

    >>> factors_of([(6,), (2, 3)])
    (2, 3)
    """
    if any(0 in lead for lead in leads):
        raise NotFusable("a leading dimension is 0")
    cuts = sorted({math.prod(lead[:n]) for lead in leads for n in range(1, len(lead) + 1)} - {1})
    found, before = [], 1
    for product in cuts:
        if product % before:
            raise NotFusable(f"leading dimensions {' and '.join(map(str, leads))} have no common factors")
        found.append(product // before)
        before = product
    return tuple(found)


def _fold(weights: Weights, lead: Lead) -> tuple[Fold, Tensor | None, Tensor | None]:
    """How the leading dimensions become batch and heads; the folded bias and mask.

    They depend on the scores alone, so that values which come later see the same dropout.
    """
    scores = weights.scores
    factors = factors_of(weights.leads(lead))
    bias = None
    for term, factor, at in scores.biases:
        term = cut(term if factor == 1 else term * factor, at, factors)
        bias = term if bias is None else bias + term
    keep = None
    for mask, at in scores.keeps:
        mask = cut(mask, at, factors)
        keep = mask if keep is None else keep & mask
    dense = [tensor for tensor in (bias, keep) if tensor is not None]
    folds = [Fold(factors, at) for at in range(max(len(factors) - 1, 0), -1, -1)]
    # A bias may be one for the whole batch or all heads, not for some of either: fold where least is copied.
    fold = min(folds, key=lambda f: sum(math.prod(f.sizes(tensor)) for tensor in dense))
    bias, keep = (
        None if tensor is None else fold.apply(tensor, *fold.sizes(tensor)) for tensor in (bias, keep)
    )
    return fold, bias, keep


def _broadcasts(lead: Lead, to: Lead) -> bool:
    return len(lead) <= len(to) and all(
        n in (1, m) for n, m in zip(reversed(lead), reversed(to), strict=False)
    )
