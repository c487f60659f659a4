"""fastattn: one attention call for PyTorch, exact and fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastattn import (
    biases,
    mask_ops,  # noqa: F401  (registers its op, which saved programs name)
    masks,
    ops,  # noqa: F401  (likewise)
)
from fastattn._version import __version__
from fastattn.combine import merge
from fastattn.dispatch import Explanation
from fastattn.functional import attention, decode_attention, explain, varlen_attention
from fastattn.multi_head import multi_head_attention
from fastattn.sdpa import scaled_dot_product_attention
from fastattn.spec import AttentionSpec
from fastattn.weights import attention_weights

__all__ = [
    "AttentionSpec",
    "Explanation",
    "__version__",
    "attention",
    "attention_weights",
    "biases",
    "decode_attention",
    "explain",
    "inspect",
    "masks",
    "merge",
    "models",
    "multi_head_attention",
    "nn",
    "scaled_dot_product_attention",
    "varlen_attention",
]

if TYPE_CHECKING:
    from fastattn import inspect, models, nn
else:

    def __getattr__(name: str) -> Any:
        """fastattn.inspect, fastattn.models and fastattn.nn, imported when first used."""
        if name in ("inspect", "models", "nn"):
            return import_module(f"fastattn.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
