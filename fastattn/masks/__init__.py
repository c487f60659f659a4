"""Masks: which pairs of query and key see each other.

Masks compose with `&`, `|` and `~` (Python binds `&` tighter than `|`) and are immutable. Each reaches
kernels in one of three forms: a band with key ranges, a bool tensor read in place, or lists of 64x64 tiles
(`BlockMask`).
"""

from fastattn.block_mask import BlockMask
from fastattn.masks.band import causal, window
from fastattn.masks.base import LoweredMask, Mask, as_mask
from fastattn.masks.blocks import blocks
from fastattn.masks.dense import dense
from fastattn.masks.documents import documents
from fastattn.masks.global_tokens import global_tokens
from fastattn.masks.links import links
from fastattn.masks.predicate import predicate
from fastattn.masks.ranges import padding, prefix
from fastattn.masks.space import Align, MaskShape

__all__ = [
    "Align",
    "BlockMask",
    "LoweredMask",
    "Mask",
    "MaskShape",
    "as_mask",
    "blocks",
    "causal",
    "dense",
    "documents",
    "global_tokens",
    "links",
    "padding",
    "predicate",
    "prefix",
    "window",
]
