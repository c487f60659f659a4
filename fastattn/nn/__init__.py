"""Layers: drop-in modules on fastattn's functions, without kernel logic of their own."""

from fastattn.nn.additive import AdditiveAttention
from fastattn.nn.cache import KVCache
from fastattn.nn.embedding import TokenEmbedding
from fastattn.nn.feed_forward import PositionwiseFeedForward
from fastattn.nn.multihead import MultiheadAttention
from fastattn.nn.positions import LearnedPositionalEncoding, SinusoidalPositionalEncoding, document_positions

__all__ = [
    "AdditiveAttention",
    "KVCache",
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "PositionwiseFeedForward",
    "SinusoidalPositionalEncoding",
    "TokenEmbedding",
    "document_positions",
]
