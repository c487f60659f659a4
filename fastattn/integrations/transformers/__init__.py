"""fastattn inside Hugging Face transformers: `register()`, then `attn_implementation="fastattn"`."""

try:
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: F401
except ImportError as error:  # no transformers, or one from before 5
    raise ImportError(
        f"fastattn.integrations.transformers needs transformers 5 or newer ({error}); "
        "run: pip install 'fastattn[hf]'"
    ) from error

from fastattn.integrations.transformers.cache import FastCache
from fastattn.integrations.transformers.registration import register

__all__ = ["FastCache", "register"]
