"""Attention that a model writes out itself, as a product, a softmax and a product: run as one call.

See docs/decisions/0016-hand-written-attention-is-read-as-it-runs.md.
"""

from fastattn.integrations.handwritten.mode import AttentionMode, Notes, without_lazy

__all__ = ["AttentionMode", "Notes", "without_lazy"]
