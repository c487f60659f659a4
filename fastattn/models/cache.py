"""DecoderCache: what a decoder keeps between the tokens that it generates."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastattn.checks import check_int
from fastattn.nn.cache import KVCache


@dataclass
class LayerCache:
    """One decoder layer's keys and values: of the target so far, which grows, and of the encoder's output."""

    self_attn: KVCache = field(default_factory=KVCache)
    cross_attn: KVCache = field(default_factory=lambda: KVCache(static=True))


class DecoderCache:
    """A LayerCache for each layer of a decoder.

    The first forward with it projects the encoder's output, later ones read that; each appends its tokens.

    Args:
        num_layers: of the decoder.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(check_int("num_layers", num_layers, 1))]

    def __repr__(self) -> str:
        return f"DecoderCache({len(self.layers)} layers, length={self.length})"

    @property
    def length(self) -> int:
        """Number of target tokens held."""
        return self.layers[0].self_attn.length

    def reorder(self, index: Tensor, *, memory: bool = True) -> None:
        """Let batch entry index[b] take the place of entry b.

        Args:
            index: int64 [B'], entries of the present batch; B' may differ from B.
            memory: False where every entry goes on with the encoder's output that it has, as beams of one
                sentence do: nothing of that is copied then.
        """
        for layer in self.layers:
            layer.self_attn.reorder(index)
            if memory:
                layer.cross_attn.reorder(index)

    def truncate(self, length: int) -> None:
        """Forget all target tokens but the first `length`; raises ValueError where there are fewer."""
        for layer in self.layers:
            layer.self_attn.truncate(length)
