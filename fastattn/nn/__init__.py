"""Layers: drop-in modules on fastattn's functions, without kernel logic of their own."""

from fastattn.nn.additive import AdditiveAttention
from fastattn.nn.cache import KVCache
from fastattn.nn.embedding import TokenEmbedding
from fastattn.nn.feed_forward import PositionwiseFeedForward
from fastattn.nn.hard import HardAttention
from fastattn.nn.kernel_regression import KernelRegression
from fastattn.nn.local import LocalAttention
from fastattn.nn.multihead import MultiheadAttention
from fastattn.nn.positions import LearnedPositionalEncoding, SinusoidalPositionalEncoding, document_positions

__all__ = [
    "AdditiveAttention",
    "HardAttention",
    "KVCache",
    "KernelRegression",
    "LearnedPositionalEncoding",
    "LocalAttention",
    "MultiheadAttention",
    "PositionwiseFeedForward",
    "SinusoidalPositionalEncoding",
    "TokenEmbedding",
    "document_positions",
]
