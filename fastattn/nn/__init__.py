"""Layers: drop-in modules on fastattn's functions, without kernel logic of their own."""

from fastattn.nn.additive import AdditiveAttention
from fastattn.nn.attention import Attention
from fastattn.nn.cache import KVCache
from fastattn.nn.convert import convert_heads
from fastattn.nn.embedding import TokenEmbedding
from fastattn.nn.feed_forward import PositionwiseFeedForward
from fastattn.nn.hard import HardAttention
from fastattn.nn.hierarchical import AttentionPooling, HierarchicalAttention, pad_documents
from fastattn.nn.kernel_regression import KernelRegression
from fastattn.nn.local import LocalAttention
from fastattn.nn.multihead import MultiheadAttention
from fastattn.nn.positions import LearnedPositionalEncoding, SinusoidalPositionalEncoding, document_positions
from fastattn.nn.relative import ALiBiBias, RelativePositionBias
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.nn.self_attention import MultiHeadSelfAttention, SingleHeadAttention
from fastattn.nn.sentence import SentenceEncoder

__all__ = [
    "ALiBiBias",
    "AdditiveAttention",
    "Attention",
    "AttentionPooling",
    "HardAttention",
    "HierarchicalAttention",
    "KVCache",
    "KernelRegression",
    "LearnedPositionalEncoding",
    "LocalAttention",
    "MultiHeadSelfAttention",
    "MultiheadAttention",
    "PositionwiseFeedForward",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SentenceEncoder",
    "SingleHeadAttention",
    "SinusoidalPositionalEncoding",
    "TokenEmbedding",
    "convert_heads",
    "document_positions",
    "pad_documents",
]
