"""The attention function that every layer of a model calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.functional import attention, varlen_attention
from fastattn.integrations.off_interface import LEFT
from fastattn.integrations.transformers import arguments
from fastattn.integrations.transformers.attentions import returned_weights, wants_weights
from fastattn.masks import Mask

# Arguments that change the result: the name, what it is for, who can do it.
_UNSUPPORTED = (
    ("block_indices", "attention over chosen blocks of keys", "eager"),
    ("cache", "a paged cache (continuous batching)", "sdpa"),
)


def fastattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Mask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer with the arguments of transformers.

    Args:
        module: the layer, whose `is_causal` counts where the argument is None.
        query: [B, Hq, Lq, D]; key: [B, Hkv, Lk, D]; value: [B, Hkv, Lk, Dv].
        attention_mask: what `fastattn_mask` returned, or a tensor broadcastable to [B, Hq, Lq, Lk], bool
            (True = attend) or additive.
        scaling: factor of the scores, 1 / sqrt(D) where None.
        dropout: probability with which each weight is dropped.
        is_causal: without a mask and with several queries: query i sees keys 0 to i.
        sliding_window: without a mask: number of keys seen to the left, and without `is_causal` to the right,
            the query's own among them.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux, sinks: one more logit in each softmax: of a head [Hq], or of each row [B, Hq, Lq, 1].
        position_bias: added to the scores, broadcastable to [B, Hq, Lq, Lk].
        cu_seq_lens_q, cu_seq_lens_k: [S + 1], where packed sequences begin; the batch size is then 1.
        indices: [B, Lq, n], the only keys that each query sees.
        kwargs: `output_attentions`, and what concerns other implementations.
    Returns:
        [B, Lq, Hq, Dv], and the weights after dropout [B, Hq, Lq, Lk] where the caller wants attentions.
    Raises:
        NotImplementedError: block_indices or a paged cache, which would change the result, or a layer that
            only eager attention computes rightly.
        ValueError: attentions of more pairs than `register` allows.
    """
    for name, what, instead in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f'{name} must be None: {what} is not supported, use attn_implementation="{instead}"'
            )
    if (reason := LEFT.get(type(module).__name__)) is not None:
        raise NotImplementedError(
            f'attn_implementation must be "eager" for {type(module).__name__}: {reason}'
        )
    query, key, value = arguments.same_batch(query, key, value)
    mask: Mask | Tensor | None
    bias: Bias | Tensor | None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask, bias = arguments.implied_mask(query.shape[2], causal, sliding_window), None
    else:
        mask, bias = arguments.split_mask(attention_mask, query.dtype)
    if indices is not None:
        mask = arguments.both(mask, arguments.chosen_keys(indices, key.shape[2]))
    logits = sinks if s_aux is None else s_aux
    if position_bias is not None and not (logits is None and arguments.is_constant(position_bias)):
        mask, bias = arguments.add_position_bias(mask, bias, position_bias, query.dtype)
    of_heads = None
    if logits is not None and logits.numel() == query.shape[1]:
        of_heads, logits = logits.reshape(-1), None
    wanted = wants_weights(kwargs)
    if cu_seq_lens_q is None and logits is None and not wanted:
        out = attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            scale=scaling,
            softcap=softcap,
            sinks=of_heads,
            dropout_p=dropout,
        )
        return out.transpose(1, 2).contiguous(), None
    call = Call("attention", query, key, value, mask, bias, scaling, softcap, of_heads, dropout)
    if cu_seq_lens_q is not None:
        starts = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        if arguments.is_local(mask) and bias is None and logits is None and not wanted:
            return _varlen(call, *starts), None
        call.mask = arguments.packed(mask, *starts, call.seqlens())
    weights = returned_weights(call) if wanted else None
    out = attention(query, key, value, bias=bias, return_lse=logits is not None, **_options(call))
    if logits is not None:
        out, lse = out
        # exp(lse) / (exp(lse) + exp(sink)) is what the sink leaves of every weight.
        share = torch.sigmoid(lse[..., None] - logits).to(out.dtype)
        out, weights = out * share, None if weights is None else weights * share
    return out.transpose(1, 2).contiguous(), weights


def _varlen(call: Call, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """out [1, total_q, Hq, Dv] of packed sequences."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (call.q, call.k, call.v))
    starts = cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32)
    return varlen_attention(q, k, v, *starts, **_options(call))[None]


def _options(call: Call) -> dict[str, Any]:
    names = ("mask", "scale", "softcap", "sinks", "dropout_p", "dropout_seed")
    return {name: getattr(call, name) for name in names}
