"""Stacks of layers: Encoder and Decoder, on vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastattn.checks import check_int
from fastattn.masks import Mask
from fastattn.models.cache import DecoderCache
from fastattn.models.layers import CAUSAL, DecoderLayer, EncoderLayer, LayerOptions
from fastattn.models.stock import StockAttention, StockMask, stock_mask

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Stack(nn.Module):
    """Layers one after the other; where they norm first, a last norm follows."""

    layer: type[EncoderLayer] | type[DecoderLayer]

    def __init__(
        self,
        d_model: int = 512,
        num_layers: int = 6,
        dropout: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        check_int("num_layers", num_layers, 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            self.layer(d_model, dropout=dropout, **options, **factory) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model, **factory) if self.layers[0].norm_first else nn.Identity()

    def _shared(
        self, mask: Mask | Tensor | None, query: Tensor, key: Tensor
    ) -> Mask | Tensor | StockMask | None:
        """The mask in the form that all layers take, so that none converts it again."""
        attention = self.layers[0].self_attn
        if mask is not None and isinstance(attention, StockAttention):
            return stock_mask(mask, attention.num_heads, query, key)
        return mask


class Encoder(_Stack):
    """num_layers of `EncoderLayer`, and a last LayerNorm where they norm first.

    >>> Encoder(d_model=16, num_layers=2, num_heads=2, d_ff=32)(torch.zeros(3, 5, 16)).shape
    torch.Size([3, 5, 16])

    Args:
        d_model, dropout, device, dtype: as for `EncoderLayer`.
        num_layers: at least 1.
        options: num_heads, d_ff, attention_dropout, norm_first, num_kv_heads and attention, likewise.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.1.
    """

    layer = EncoderLayer

    def forward(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """All layers.

        Args:
            x: [B, L, d_model].
            mask: as in `EncoderLayer.forward`.
        Returns:
            [B, L, d_model].
        """
        shared = self._shared(mask, x, x)
        for layer in self.layers:
            x = layer(x, mask=shared)
        return self.norm(x)


class Decoder(_Stack):
    """num_layers of `DecoderLayer`, and a last LayerNorm where they norm first.

    Args: as for `Encoder`.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.1.
    """

    layer = DecoderLayer

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = CAUSAL,
        memory_mask: Mask | Tensor | None = None,
        cache: DecoderCache | None = None,
        need_weights: bool = False,
    ) -> Any:
        """All layers.

        Args:
            x, memory, mask, memory_mask, need_weights: as in `DecoderLayer.forward`.
            cache: of as many layers, from `new_cache`.
        Returns:
            [B, Lt, d_model], or with need_weights (that, a list of weights [B, H, Lt, Ls], one per layer).
        Raises:
            ValueError: no memory; weights and a cache; a cache of another number of layers.
        """
        if cache is None:
            caches = [None] * len(self.layers)
            shared = self._shared(mask, x, x)
            shared_memory = memory_mask if memory is None else self._shared(memory_mask, x, memory)
        else:
            caches = self._layer_caches(cache)
            shared, shared_memory = mask, memory_mask
        found = []
        for layer, held in zip(self.layers, caches, strict=True):
            result = layer(
                x,
                memory,
                mask=shared,
                memory_mask=shared_memory,
                cache=held,
                need_weights=need_weights,
            )
            x = result[0] if need_weights else result
            if need_weights:
                found.append(result[1])
        x = self.norm(x)
        return (x, found) if need_weights else x

    def new_cache(self) -> DecoderCache:
        """An empty cache for this decoder."""
        return DecoderCache(len(self.layers))

    def _layer_caches(self, cache: DecoderCache) -> list[Any]:
        if len(cache.layers) != len(self.layers):
            raise ValueError(f"cache must have {len(self.layers)} layers, got {len(cache.layers)}")
        return list(cache.layers)
