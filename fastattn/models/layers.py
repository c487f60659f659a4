"""The two layers of "Attention Is All You Need"."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from fastattn.checks import check_bool, check_int
from fastattn.masks import Mask, causal
from fastattn.models.cache import LayerCache
from fastattn.models.stock import StockAttention, StockMask
from fastattn.nn.feed_forward import PositionwiseFeedForward
from fastattn.nn.multihead import MultiheadAttention

ATTENTIONS = ("fastattn", "torch")
CAUSAL = causal()  # masks are immutable, so one serves as every default


class LayerOptions(TypedDict, total=False):
    """What layers take beyond d_model and dropout, and whole models pass on to them."""

    num_heads: int
    d_ff: int
    attention_dropout: float
    norm_first: bool
    num_kv_heads: int | None
    attention: str


class _Layer(nn.Module):
    """Sublayers with residual connections: norm(x + dropout(f(x))), or x + dropout(f(norm(x)))."""

    # One attention for each; the feed-forward network comes after them.
    attentions: tuple[str, ...] = ()

    def __init__(
        self,
        d_model: int = 512,
        num_heads: int = 8,
        d_ff: int = 2048,
        dropout: float = 0.1,
        *,
        attention_dropout: float = 0.0,
        norm_first: bool = False,
        num_kv_heads: int | None = None,
        attention: str = "fastattn",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("d_model", d_model, 1)
        if d_model % check_int("num_heads", num_heads, 1):
            raise ValueError(f"d_model must be a multiple of num_heads={num_heads}, got {d_model}")
        self.norm_first = check_bool("norm_first", norm_first)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in self.attentions:
            new = new_attention(attention, d_model, num_heads, attention_dropout, num_kv_heads, factory)
            self.add_module(name, new)
        self.feed_forward = PositionwiseFeedForward(d_model, d_ff, **factory)
        for n in range(1, len(self.attentions) + 2):
            self.add_module(f"norm{n}", nn.LayerNorm(d_model, **factory))
        self.dropout = nn.Dropout(dropout)

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}"

    def _enter(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What a sublayer gets."""
        return norm(x) if self.norm_first else x

    def _leave(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        """What becomes of x by a sublayer's result y."""
        x = x + self.dropout(y)
        return x if self.norm_first else norm(x)


class EncoderLayer(_Layer):
    """Self-attention, then a feed-forward network, each as LayerNorm(x + dropout(sublayer(x))).

    >>> EncoderLayer(d_model=16, num_heads=2, d_ff=32)(torch.zeros(3, 5, 16)).shape
    torch.Size([3, 5, 16])

    Args:
        d_model: width; a multiple of num_heads.
        num_heads: attention heads.
        d_ff: width within the feed-forward network.
        dropout: probability, on each sublayer's output.
        attention_dropout: probability, on attention weights.
        norm_first: x + dropout(sublayer(LayerNorm(x))) instead.
        num_kv_heads: heads of keys and values, a divisor of num_heads; None for num_heads.
        attention: "fastattn", or "torch" for the same layer on PyTorch's attention. The same seed gives both
            the same weights, and state dicts load both ways.
        device, dtype: of the weights; torch's defaults where None.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.1.
    """

    attentions = ("self_attn",)
    self_attn: MultiheadAttention | StockAttention
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm

    def forward(self, x: Tensor, *, mask: Mask | Tensor | StockMask | None = None) -> Tensor:
        """One layer on.

        Args:
            x: [B, L, d_model].
            mask: a fastattn.masks.Mask, such as padding(lengths), or bool broadcastable to [B, H, L, L],
                True = attend; None for all.
        Returns:
            [B, L, d_model].
        """
        y = self._enter(x, self.norm1)
        y, _ = self.self_attn(y, y, y, mask=mask, need_weights=False)
        x = self._leave(x, y, self.norm1)
        return self._leave(x, self.feed_forward(self._enter(x, self.norm2)), self.norm2)


class DecoderLayer(_Layer):
    """Causal self-attention, attention to the encoder's output, then a feed-forward network.

    Each is LayerNorm(x + dropout(sublayer(x))).

    Args: as for `EncoderLayer`.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.1.
    """

    attentions = ("self_attn", "cross_attn")
    self_attn: MultiheadAttention | StockAttention
    cross_attn: MultiheadAttention | StockAttention
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Mask | Tensor | StockMask | None = CAUSAL,
        memory_mask: Mask | Tensor | StockMask | None = None,
        cache: LayerCache | None = None,
        need_weights: bool = False,
    ) -> Any:
        """One layer on.

        Args:
            x: [B, Lt, d_model]; with a cache, the new tokens alone.
            memory: [B, Ls, d_model], the encoder's output; may be None where the cache holds it.
            mask: for the self-attention, causal() unless given; None for all.
            memory_mask: for the attention to memory, such as padding(source_lengths); None for all.
            cache: takes in the new tokens' keys and values, and memory's once.
            need_weights: whether to return the attention to memory too; without a cache only.
        Returns:
            [B, Lt, d_model], or with need_weights (that, weights [B, H, Lt, Ls]).
        Raises:
            ValueError: no memory, or weights and a cache.
        """
        own, cross = (None, None) if cache is None else (cache.self_attn, cache.cross_attn)
        if cross is not None and cross.length:
            memory = None  # the cache holds its projection
        elif memory is None:
            raise ValueError("memory must be the encoder's output until a cache holds it, got None")
        if need_weights and cache is not None:
            raise ValueError("need_weights must be False where a cache is given, got True")
        y = self._enter(x, self.norm1)
        y, _ = self.self_attn(y, y, y, mask=mask, cache=own, need_weights=False)
        x = self._leave(x, y, self.norm1)

        y = self._enter(x, self.norm2)
        y, weights = self.cross_attn(
            y,
            memory,
            memory,
            mask=memory_mask,
            cache=cross,
            need_weights=need_weights,
            average_attn_weights=False,
        )
        x = self._leave(x, y, self.norm2)

        x = self._leave(x, self.feed_forward(self._enter(x, self.norm3)), self.norm3)
        return (x, weights) if need_weights else x


def new_attention(
    attention: str,
    d_model: int,
    num_heads: int,
    dropout: float,
    num_kv_heads: int | None,
    factory: dict[str, Any],
) -> nn.MultiheadAttention:
    """One attention module of either kind; the same seed gives both kinds the same weights."""
    new: nn.MultiheadAttention
    if attention == "fastattn":
        new = MultiheadAttention(
            d_model, num_heads, dropout, batch_first=True, num_kv_heads=num_kv_heads, **factory
        )
    elif attention == "torch":
        if num_kv_heads not in (None, num_heads):
            raise ValueError(f'num_kv_heads must be None with attention="torch", got {num_kv_heads}')
        new = StockAttention(d_model, num_heads, dropout, batch_first=True, **factory)
    else:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    nn.init.xavier_uniform_(new.out_proj.weight)  # as the other weights are
    return new
