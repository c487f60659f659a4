"""fastattn inside Hugging Face transformers: `register()`, then `attn_implementation="fastattn"`."""

from fastattn.integrations.transformers.cache import FastCache
from fastattn.integrations.transformers.registration import register

__all__ = ["FastCache", "register"]
