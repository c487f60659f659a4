"""Attention written plainly: the oracle that every backend is compared with.

Small and slow on purpose. It computes in the dtype of its inputs, so that float64 inputs give the
exact answer and narrower ones give the error that plain eager code makes. Every step is an
ordinary differentiable operation, to any order; only the two products of `_Scores` and `_Mix` are
special, because they skip invisible pairs instead of multiplying them by zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.masks import Mask, MaskShape
from fastattn.philox import dropout_mask, dropout_words


class _Scores(torch.autograd.Function):
    """s_ij = a_i . b_j where pair (i, j) is visible, else 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, visible: Tensor) -> Tensor:
        return torch.where(visible, a @ b.mT, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b, visible = ctx.saved_tensors
        return _Mix.apply(grad, b, visible), _Mix.apply(grad.mT, a, visible.mT), None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, _: None) -> Tensor:
        a, b, visible = ctx.saved_tensors
        tangents = [(x, y) for x, y in ((da, b), (a, db)) if x is not None and y is not None]
        return torch.stack([_Scores.apply(x, y, visible) for x, y in tangents]).sum(0)


class _Mix(torch.autograd.Function):
    """y_i = sum of w_ij x_j over the visible pairs (i, j); NaN where such an x_j is not finite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, x: Tensor, visible: Tensor) -> Tensor:
        finite = x.isfinite()
        y = torch.where(visible, w, 0.0) @ torch.where(finite, x, 0.0)
        reached = visible.to(x.dtype) @ (~finite).to(x.dtype)
        return torch.where(reached > 0, torch.nan, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        w, x, visible = ctx.saved_tensors
        return _Scores.apply(grad, x, visible), _Mix.apply(w.mT, grad, visible.mT), None

    @staticmethod
    def jvp(ctx: Any, dw: Tensor | None, dx: Tensor | None, _: None) -> Tensor:
        w, x, visible = ctx.saved_tensors
        tangents = [(p, y) for p, y in ((dw, x), (w, dx)) if p is not None and y is not None]
        return torch.stack([_Mix.apply(p, y, visible) for p, y in tangents]).sum(0)


def _visible(mask: Any, shape: MaskShape, device: torch.device) -> Tensor:
    """The mask and the key lengths as bool, broadcastable to [B, Hq, Lq, Lk]."""
    if mask is None:
        visible = torch.ones(1, 1, shape.seqlen_q, shape.seqlen_k, dtype=torch.bool, device=device)
    else:
        visible = mask.to_dense(shape, device) if isinstance(mask, Mask) else mask
    if shape.seqlens_k is None:
        return visible
    return visible & (torch.arange(shape.seqlen_k, device=device) < shape.seqlens_k.view(-1, 1, 1, 1))


def _bias(bias: Any, shape: MaskShape, q: Tensor) -> Tensor | None:
    if bias is None or isinstance(bias, Tensor):
        return bias
    return bias.to_dense(shape, q.device, torch.promote_types(q.dtype, torch.float32))


def _probabilities(
    q: Tensor, k: Tensor, visible: Tensor, bias: Tensor | None, scale: float | None, softcap: float | None,
    sinks: Tensor | None, score: str = "dot", score_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normalised weights p [B, Hq, Lq, Lk], lse [B, Hq, Lq] and which pairs are visible."""
    s, visible = _masked_scores(q, k, visible, bias, scale, softcap, score, score_weights)
    return *_softmax(s, visible, sinks), visible


def _masked_scores(
    q: Tensor, k: Tensor, visible: Tensor, bias: Tensor | None, scale: float | None, softcap: float | None,
    score: str = "dot", score_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores [B, Hq, Lq, Lk], -inf where a pair is not visible, and which pairs are."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    shape = (*q.shape[:-1], k.shape[-2])
    if bias is not None:
        visible = visible & (bias != -math.inf)
    visible = visible.expand(shape)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    if score != "dot":
        s = _pair_scores(q, k, visible, score, score_weights)
        visible = visible & (s != -math.inf)
    elif torch.compiler.is_compiling() or torch.jit.is_tracing():  # neither writes down functions of Python
        s = scale * torch.where(visible, q @ k.mT, 0.0)
    else:
        s = scale * _Scores.apply(q, k, visible)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    return torch.where(visible, s, -math.inf), visible


def _softmax(s: Tensor, visible: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and lse of such scores."""
    shape, dtype = s.shape, torch.promote_types(s.dtype, torch.float32)
    sink = s.new_tensor(-math.inf) if sinks is None else sinks.view(-1, 1, 1)
    s = torch.cat([s, sink.expand(*shape[:-1], 1)], -1)
    empty = ~visible.any(-1, keepdim=True) & (sink == -math.inf)
    s = torch.where(empty, 0.0, s)  # an empty row must not reach softmax: its gradient would be NaN
    # A hidden pair weighs 0 in a row of NaNs too.
    p = torch.where(visible, torch.softmax(s, -1)[..., : shape[-1]], 0.0)
    # Not torch.logsumexp: its gradient exp(s - lse) is wrong where lse is so large that it absorbs log(sum).
    largest = s.detach().amax(-1, keepdim=True)
    lse = torch.where(empty, -math.inf, largest + (s - largest).exp().sum(-1, keepdim=True).log()).squeeze(-1)
    return p, lse.to(dtype)


def _pair_scores(q: Tensor, k: Tensor, visible: Tensor, score: str, w: Tensor | None) -> Tensor:
    """w . tanh(q_i + k_j), or log of a kernel of r = |q_i - k_j|; 0 where a pair is not visible.

    -inf beyond a kernel's support.
    """
    if w is not None:
        return torch.where(visible[..., None], q[..., None, :] + k[..., None, :, :], 0.0).tanh() @ w.to(
            q.dtype
        )
    squared = torch.where(visible[..., None], q[..., None, :] - k[..., None, :, :], 0.0).square().sum(-1)
    if score == "gaussian":
        return -squared / 2
    if score == "boxcar":
        return torch.where(squared > 1, -math.inf, 0 * squared)
    inside = torch.where(squared < 1, squared, 0.0)
    if score == "triangular":  # the slope of r at 0 is taken to be 0
        inside = torch.where(inside > 0, torch.where(inside > 0, inside, 1.0).sqrt(), 0.0)
    return torch.where(squared < 1, torch.log1p(-inside), torch.where(squared >= 1, -math.inf, squared))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None, keep: Tensor | None, *,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    score: str = "dot", score_weights: Tensor | None = None, dropout_p: float = 0.0,
    reverse_keys: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if reverse_keys:
        k, v = k.flip(-2), v.flip(-2)
        visible = visible.flip(-1)
        bias, keep = (None if x is None else x.flip(-1) for x in (bias, keep))
    p, lse, visible = _probabilities(q, k, visible, bias, scale, softcap, sinks, score, score_weights)
    if keep is not None:
        p = p * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)  # a dropped NaN stays: it is visible
    out = _Mix.apply(p.to(v.dtype), v.repeat_interleave(q.shape[1] // v.shape[1], 1), visible)
    return out, lse


def _keep(shape: MaskShape, p: float, seed: Any, device: torch.device) -> Tensor | None:
    if p == 0:
        return None
    if seed is None:  # at p = 1 nothing is kept, whatever the seed, so nothing is drawn
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device) if p < 1 else 0
    return dropout_mask(seed, shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, p, device)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, bias: Any = None, dropout_p: float = 0.0,
    dropout_seed: Any = None, return_lse: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """out_i = sum_j p_ij v_j, p_i = softmax_j(softcap(scale q_i . k_j) + bias_ij) over visible j.

    Args:
        q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]: one floating dtype, Hq % Hkv == 0.
        mask: a Mask, or bool broadcastable to [B, Hq, Lq, Lk], True = attend.
        bias: a tensor broadcastable to [B, Hq, Lq, Lk], -inf masks; or a fastattn.biases object.
        dropout_seed: int64 tensor of one element, drawn where absent and needed.
        options: scale (1 / sqrt(D) by default); softcap; sinks [Hq], one more logit in each row's
            denominator; score, one of fastattn.spec.SCORES, in place of scale q . k, and score_weights [D],
            w of the additive one; reverse_keys, which adds the keys up in the opposite order: the same answer
            but for rounding, which is how tests measure the rounding of float64.
    Returns:
        out [B, Hq, Lq, Dv], and lse [B, Hq, Lq] if asked (float32; float64 for float64). A row with
        no visible key has out 0 and lse = sink, or -inf without sinks.
    """
    shape = MaskShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    keep = _keep(shape, dropout_p, dropout_seed, q.device)
    out, lse = _attention(
        q, k, v, _visible(mask, shape, q.device), _bias(bias, shape, q), keep, dropout_p=dropout_p, **options
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_weights(
    q: Tensor, k: Tensor, *, mask: Any = None, bias: Any = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, score: str = "dot",
    score_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The whole matrix p [B, Hq, Lq, Lk] of `attention`, before dropout."""
    shape = MaskShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    visible, dense_bias = _visible(mask, shape, q.device), _bias(bias, shape, q)
    return _probabilities(q, k, visible, dense_bias, scale, softcap, sinks, score, score_weights)[0]


def hard_index(q: Tensor, k: Tensor, *, mask: Any = None, scale: float, seed: Tensor | None = None) -> Tensor:
    """argmax_j of scale q_i . k_j, or with a seed of that plus Gumbel noise, over visible j.

    Args:
        q [B, Hq, Lq, D], k [B, Hkv, Lk, D]; mask: as in `attention`.
        seed: int64 tensor of one element; the noise of a pair is -log(-log(1 - r)), r = (word + 1/2) / 2**32
            of the word that dropout would read.
    Returns:
        int64 [B, Hq, Lq], the first of equals; -1 where no key is visible.
    """
    shape = MaskShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    visible = _visible(mask, shape, q.device).expand(*q.shape[:3], k.shape[2])
    dtype = torch.promote_types(q.dtype, torch.float32)
    s = scale * (q.to(dtype) @ k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1).mT)
    if seed is not None:
        words = dropout_words(seed, shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k)
        s = s.double() - torch.log(-torch.log1p(-(words.double() + 0.5) / 2**32))
    found = torch.where(visible, s, -math.inf).argmax(-1)
    first = visible.to(torch.uint8).argmax(-1)  # where every visible score is -inf
    found = torch.where(visible.gather(-1, found[..., None])[..., 0], found, first)
    return torch.where(visible.any(-1), found, -1)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, mask: Any = None, bias: Any = None,
    dropout_p: float = 0.0, dropout_seed: Any = None, return_lse: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """`attention` of each sequence of a packed batch, one after the other.

    Args:
        q [total_q, Hq, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1]; sequence s has tokens cu[s] to cu[s + 1] - 1.
        mask, bias: read at each sequence's own indices.
    Returns:
        out [total_q, Hq, Dv], and lse [Hq, total_q] if asked.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lens_q, lens_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    batch, heads = len(starts_q) - 1, q.shape[1]
    longest = [max([0, *lens.tolist()]) for lens in (lens_q, lens_k)]
    shape = MaskShape(batch, heads, longest[0], longest[1], lens_q, lens_k)
    per_sequence = [batch, heads, *longest]
    visible = _visible(mask, shape, q.device).expand(per_sequence)
    biases = _bias(bias, shape, q)
    biases = None if biases is None else biases.expand(per_sequence)
    keeps = _keep(shape, dropout_p, dropout_seed, q.device)
    outs, lses = [q.new_zeros(0, heads, v.shape[-1])], [q.new_zeros(heads, 0)]
    for b in range(batch):
        (q0, q1), (k0, k1) = starts_q[b : b + 2], starts_k[b : b + 2]
        one = (slice(b, b + 1), slice(None), slice(q1 - q0), slice(k1 - k0))
        out, lse = _attention(
            *(x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])),
            *(None if x is None else x[one] for x in (visible, biases, keeps)),
            dropout_p=dropout_p, **options,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, -1).to(torch.promote_types(q.dtype, torch.float32))
    return (out, lse) if return_lse else out


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, block_table: Tensor | None = None,
    mask: Any = None, bias: Any = None, dropout_p: float = 0.0, dropout_seed: Any = None,
    return_lse: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """`attention` over the first lengths[b] keys of each sequence's cache.

    Args:
        q [B, Hq, Lq, D], the last Lq positions of each sequence.
        k_cache, v_cache: [B, Hkv, Lmax, D | Dv], or [pages, Hkv, page, D | Dv] with a block_table.
        lengths: int [B], keys in the cache, those of q's own positions included.
        block_table: int32 [B, max_pages], the page that holds keys n * page ... of a sequence.
    Returns:
        out [B, Hq, Lq, Dv], and lse [B, Hq, Lq] if asked.
    """
    if block_table is not None:
        pages = block_table.long().clamp(0, max(k_cache.shape[0] - 1, 0))  # unused entries may be anything
        k_cache, v_cache = (x[pages].transpose(1, 2).flatten(2, 3) for x in (k_cache, v_cache))
    shape = MaskShape(q.shape[0], q.shape[1], q.shape[2], k_cache.shape[2], None, lengths)
    keep = _keep(shape, dropout_p, dropout_seed, q.device)
    out, lse = _attention(
        q, k_cache, v_cache, _visible(mask, shape, q.device), _bias(bias, shape, q), keep,
        dropout_p=dropout_p, **options,
    )  # fmt: skip
    return (out, lse) if return_lse else out
