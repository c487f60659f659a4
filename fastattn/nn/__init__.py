"""Layers: drop-in modules on fastattn's functions, without kernel logic of their own."""

from fastattn.nn.attention import Attention
from fastattn.nn.cache import KVCache
from fastattn.nn.embedding import TokenEmbedding
from fastattn.nn.feed_forward import PositionwiseFeedForward
from fastattn.nn.multihead import MultiheadAttention
from fastattn.nn.positions import LearnedPositionalEncoding, SinusoidalPositionalEncoding, document_positions
from fastattn.nn.relative import ALiBiBias, RelativePositionBias
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.nn.self_attention import MultiHeadSelfAttention, SingleHeadAttention
from fastattn.nn.sentence import SentenceEncoder

__all__ = [
    "ALiBiBias",
    "Attention",
    "KVCache",
    "LearnedPositionalEncoding",
    "MultiHeadSelfAttention",
    "MultiheadAttention",
    "PositionwiseFeedForward",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SentenceEncoder",
    "SingleHeadAttention",
    "SinusoidalPositionalEncoding",
    "TokenEmbedding",
    "document_positions",
]
