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
from fastattn.additive import additive_attention
from fastattn.combine import merge
from fastattn.dispatch import Explanation
from fastattn.functional import attention, decode_attention, explain, varlen_attention
from fastattn.hard import hard_attention
from fastattn.kernel_regression import kernel_attention
from fastattn.multi_head import multi_head_attention
from fastattn.sdpa import scaled_dot_product_attention
from fastattn.spec import AttentionSpec
from fastattn.weights import attention_weights

__all__ = [
    "AttentionSpec",
    "Explanation",
    "__version__",
    "additive_attention",
    "attention",
    "attention_weights",
    "biases",
    "decode_attention",
    "explain",
    "hard_attention",
    "inspect",
    "kernel_attention",
    "masks",
    "merge",
    "models",
    "multi_head_attention",
    "nn",
    "patch",
    "scaled_dot_product_attention",
    "varlen_attention",
]

if TYPE_CHECKING:
    from fastattn import inspect, models, nn
    from fastattn.integrations.patching import patch
else:

    def __getattr__(name: str) -> Any:
        """fastattn.inspect, .models, .nn and .patch, imported when first used."""
        if name == "patch":
            return import_module("fastattn.integrations.patching").patch
        if name in ("inspect", "models", "nn"):
            return import_module(f"fastattn.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
