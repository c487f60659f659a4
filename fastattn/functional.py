"""The public calls that run attention: dense, packed (varlen) and cached (decode)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastattn import dispatch, repeated
from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.dispatch import Explanation
from fastattn.execution import declared_length, prepare, run
from fastattn.masks import Mask
from fastattn.plain import is_plain, plain_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """out_i = sum_j p_ij v_j with p_i = softmax_j(softcap(scale q_i . k_j) + bias_ij) over visible j.

    >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
    >>> attention(q, k, v, mask=torch.tensor([[True, False], [True, True]]), scale=0.0)
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.5000]]]])

    Args:
        q: [B, Hq, Lq, D], float32, bfloat16, float16 or float64. Any strides; a last dimension that is not
            contiguous costs a copy.
        k: [B, Hkv, Lk, D], q's dtype. Hq must be a multiple of Hkv: query head h reads head h // (Hq / Hkv).
        v: [B, Hkv, Lk, Dv], q's dtype.
        mask: a fastattn.masks.Mask, or bool broadcastable to [B, Hq, Lq, Lk], True = attend.
        bias: a tensor of q's dtype or float32, broadcastable to [B, Hq, Lq, Lk], neither scaled nor capped,
            whose -inf masks; or a fastattn.biases.Bias.
        scale: any finite number; 1 / sqrt(D) where None.
        softcap: positive; scores become softcap * tanh(score / softcap).
        sinks: [Hq], one more logit in each row's softmax that carries no value.
        dropout_p: probability with which each weight is dropped after the softmax.
        dropout_seed: int64, one element, on q's device; drawn from the device's default generator where it
            is needed and absent.
        return_lse: whether to return lse too.
        backend: force one of fastattn.dispatch.BACKENDS; None chooses.
    Returns:
        out [B, Hq, Lq, Dv] in q's dtype and stride order; with return_lse also lse [B, Hq, Lq], float32
        (float64 for float64), the natural logarithm of each row's softmax denominator, not changed by
        dropout. A row with no visible key has out 0, gradients 0, and lse = its sink, or -inf without sinks.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got.
    """
    if backend is None and is_plain(q, k, v):
        return plain_attention(
            q, k, v, mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, return_lse
        )
    if bias is None and sinks is None and isinstance(q, Tensor) and q.is_cuda:
        results = repeated.attention(
            q, k, v, mask, scale, softcap, dropout_p, dropout_seed, return_lse, backend
        )
        if results is not None:
            return results if return_lse else results[0]
    if has_torch_function_variadic(q, k, v):
        return handle_torch_function(
            attention,
            (q, k, v),
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            return_lse=return_lse,
            backend=backend,
        )
    return run(
        Call(
            "attention",
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            return_lse=return_lse,
            backend=backend,
        )
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` of each sequence of a packed batch by itself.

    Sequence s has the tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1. Mask, bias and dropout are read at each
    sequence's own row and column indices, with the sequence as the batch entry.

    Args:
        q: [total_q, Hq, D]; k: [total_k, Hkv, D]; v: [total_k, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1], from 0, never decreasing, to the number of tokens.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; computed where None (in compiled code,
            which may not look at values, the number of tokens stands in).
        mask: a fastattn.masks.Mask; a dense tensor raises NotImplementedError.
        bias: a fastattn.biases.Bias; a tensor raises NotImplementedError.
        scale, softcap, sinks, dropout_p, dropout_seed, return_lse, backend: as in `attention`.
    Returns:
        out [total_q, Hq, Dv]; with return_lse also lse [Hq, total_q]. Empty rows as in `attention`.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got. Rules on
        the values of cu_seqlens raise on CPU.
    """
    call = Call(
        "varlen",
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        backend=backend,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=declared_length(max_seqlen_q, "cu_seqlens_q", cu_seqlens_q, q),
        max_seqlen_k=declared_length(max_seqlen_k, "cu_seqlens_k", cu_seqlens_k, k),
    )
    return run(call)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of the last Lq tokens of each entry over the first lengths[b] keys of its cache.

    The cache already holds the new tokens' keys and values: query i stands at position lengths[b] - Lq + i.
    No mask is implied beyond the lengths: with Lq > 1, pass mask=causal() so that a new token does not see
    those after it.

    Args:
        q: [B, Hq, Lq, D].
        k_cache, v_cache: [B, Hkv, Lmax, D] and [B, Hkv, Lmax, Dv]; with a block_table, pages [pages, Hkv,
            page, D] and [pages, Hkv, page, Dv].
        lengths: int32 or int64 [B], from 0 to the capacity (Lmax, or max_pages * page).
        block_table: int32 [B, max_pages]; entry n of row b names the page of keys n * page to (n + 1) * page
            - 1. Entries beyond a length are never read.
        mask: a fastattn.masks.Mask (bottom-right alignment counts from lengths[b]), or bool broadcastable to
            [B, Hq, Lq, capacity].
        bias: a fastattn.biases.Bias, or a tensor broadcastable to [B, Hq, Lq, capacity].
        scale, softcap, sinks, dropout_p, dropout_seed, return_lse, backend: as in `attention`.
    Returns:
        out [B, Hq, Lq, Dv]; with return_lse also lse [B, Hq, Lq]. Empty rows as in `attention`.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got. Rules on
        the values of lengths and block_table raise on CPU.
    """
    call = Call(
        "decode",
        q,
        k_cache,
        v_cache,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        backend=backend,
        lengths=lengths,
        block_table=block_table,
    )
    return run(call)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend runs a call, and why each other one does not; nothing is computed.

    Args:
        q, k, v: as in `attention`; with cu_seqlens_q and cu_seqlens_k (and max_seqlen_q, max_seqlen_k) as in
            `varlen_attention`; with lengths (and block_table) as in `decode_attention`.
        mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, return_lse, backend: as in that function.
    Returns:
        An Explanation, whose str() is a small table.
    Raises:
        TypeError, ValueError, NotImplementedError: as the call itself would.
    """
    call = Call(
        "attention",
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        backend=backend,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        lengths=lengths,
        block_table=block_table,
    )
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        call.op = "varlen"
        call.max_seqlen_q = declared_length(max_seqlen_q, "cu_seqlens_q", cu_seqlens_q, q)
        call.max_seqlen_k = declared_length(max_seqlen_k, "cu_seqlens_k", cu_seqlens_k, k)
    elif lengths is not None or block_table is not None:
        call.op = "decode"
    prepare(call)
    return dispatch.explain(call)
