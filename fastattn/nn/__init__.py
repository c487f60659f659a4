"""Layers: drop-in modules that call fastattn's kernels."""

from fastattn.nn.embedding import TokenEmbedding
from fastattn.nn.feed_forward import PositionwiseFeedForward
from fastattn.nn.positions import LearnedPositionalEncoding, SinusoidalPositionalEncoding, document_positions

__all__ = [
    "LearnedPositionalEncoding",
    "PositionwiseFeedForward",
    "SinusoidalPositionalEncoding",
    "TokenEmbedding",
    "document_positions",
]
