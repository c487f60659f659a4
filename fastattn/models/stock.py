"""PyTorch's own attention behind the interface of fastattn.nn.MultiheadAttention, to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.masks import Mask, MaskShape, as_mask, causal
from fastattn.nn.cache import KVCache

_CAUSAL = causal()


@dataclass(frozen=True, eq=False)
class StockMask:
    """A mask as torch.nn.MultiheadAttention takes it fastest.

    Args:
        key_padding_mask: bool [B, Lk], True = blocked.
        attn_mask: [Lq, Lk] or [B * H, Lq, Lk], 0 and -inf: every layer would convert a bool one again.
        is_causal: whether attn_mask is the causal mask, which is then not read.
    """

    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    is_causal: bool = False


class StockAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, batch first, that also takes a fastattn mask and a cache.

    Without a cache the call is PyTorch's own, with a cache F.scaled_dot_product_attention.

    Args: as of torch.nn.MultiheadAttention.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Mask | Tensor | StockMask | None = None,
        cache: KVCache | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """As fastattn.nn.MultiheadAttention.forward, for these arguments."""
        if cache is not None:
            if need_weights or isinstance(mask, StockMask):
                raise ValueError("cache must be None where weights are asked for or the mask is a StockMask")
            return self._with_cache(query, key, value, mask, cache), None
        key = query if key is None else key
        value = key if value is None else value
        if not isinstance(mask, StockMask):
            mask = stock_mask(mask, self.num_heads, query, key)
        return super().forward(
            query,
            key,
            value,
            key_padding_mask=mask.key_padding_mask,
            need_weights=need_weights,
            attn_mask=mask.attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=mask.is_causal,
        )

    def _with_cache(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        mask: Mask | Tensor | None,
        cache: KVCache,
    ) -> Tensor:
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)

        def heads(x: Tensor, part: int) -> Tensor:
            projected = F.linear(x, weights[part], biases[part])
            return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q = heads(query, 0)
        if key is None or value is None:
            keys, values = cache.keys, cache.values
        else:
            keys, values = cache.append(heads(key, 1), heads(value, 2))
        visible = None
        if mask is not None:
            shape = MaskShape(q.shape[0], self.num_heads, q.shape[2], keys.shape[2])
            visible = as_mask(mask).to_dense(shape, q.device)
        dropout_p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, dropout_p=dropout_p)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def stock_mask(mask: Mask | Tensor | None, num_heads: int, query: Tensor, key: Tensor) -> StockMask:
    """The mask as a good user of torch.nn.MultiheadAttention would pass it.

    Args:
        mask: a fastattn mask or bool tensor, True = attend; None for none.
        num_heads: of the attention.
        query: [B, Lq, E]; key: [B, Lk, E].
    """
    if mask is None:
        return StockMask()
    batch, seqlen_q, seqlen_k = query.shape[0], query.shape[1], key.shape[1]
    mask = as_mask(mask)
    blocked = ~mask.to_dense(MaskShape(batch, num_heads, seqlen_q, seqlen_k), query.device)
    if blocked.shape[1:3] == (1, 1):
        return StockMask(key_padding_mask=blocked[:, 0, 0].expand(batch, seqlen_k))
    added = torch.zeros(blocked.shape, dtype=query.dtype, device=query.device)
    added.masked_fill_(blocked, float("-inf"))
    if added.shape[:2] == (1, 1):
        is_causal = mask == _CAUSAL and seqlen_q == seqlen_k
        return StockMask(attn_mask=added[0, 0].expand(seqlen_q, seqlen_k), is_causal=is_causal)
    return StockMask(attn_mask=added.expand(batch, num_heads, seqlen_q, seqlen_k).flatten(0, 1))
