"""Keys that no sequence holds: the learned one of add_bias_kv and the zero one of add_zero_attn."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.call import Call
from fastattn.execution import run
from fastattn.head_weights import dropped_weights


def attend_with_extra_keys(
    call: Call,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    zero_attn: bool,
    average: bool | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over k and up to two keys more, which masks, biases and lengths know nothing of.

    A zero key with a zero value has score 0 and adds nothing: it is a sink of logit 0. The learned key's
    share joins the rest by their lse, as in `fastattn.merge`, so that k and v are not copied to make room.

    Args:
        call: with q [B, Hq, L, D], k and v [B, Hkv, S, D], and without sinks.
        bias_k, bias_v: [1, 1, Hkv D], the learned key and value, or None.
        zero_attn: whether there is the zero key.
        average: whether the returned weights are averaged over the heads; None: no weights.
    Returns:
        out [B, Hq, L, D] and the weights [B, L, S + n] or [B, Hq, L, S + n], the n extra keys last.
    """
    q, k = call.q, call.k
    heads, head_dim = q.shape[1], q.shape[3]
    sinks = q.new_zeros(heads) if zero_attn else None
    call = replace(call, sinks=sinks)
    out, lse = run(replace(call, return_lse=True))
    share, columns = None, []
    if bias_k is not None and bias_v is not None:
        key, value = (_per_head(vector, heads, head_dim) for vector in (bias_k, bias_v))
        score = (q @ key).squeeze(-1).to(lse.dtype) / head_dim**0.5
        total = torch.logaddexp(lse, score)
        share = (lse - total).exp().unsqueeze(-1)
        column = F.dropout((score - total).exp(), call.dropout_p).unsqueeze(-1)
        out = (share * out + column * value.mT).to(out.dtype)
        columns.append(column)
        lse = total
    if average is None:
        return out, None
    weights = dropped_weights(call, q, k, average=False)
    if share is not None:
        weights = weights * share
    if zero_attn:
        columns.append(F.dropout((-lse).exp(), call.dropout_p).unsqueeze(-1))
    weights = torch.cat([weights, *(column.to(weights.dtype) for column in columns)], -1).to(q.dtype)
    return out, weights.mean(1) if average else weights


def _per_head(vector: Tensor, heads: int, head_dim: int) -> Tensor:
    """[Hq, D, 1] of [1, 1, Hkv D]."""
    per_head = vector.view(-1, head_dim, 1)
    return per_head.repeat_interleave(heads // per_head.shape[0], 0)
