"""Layers: drop-in modules on fastattn's functions, without kernel logic of their own."""

from fastattn.nn.cache import KVCache
from fastattn.nn.multihead import MultiheadAttention

__all__ = ["KVCache", "MultiheadAttention"]
