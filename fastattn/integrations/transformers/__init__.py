"""fastattn inside Hugging Face transformers: `register()`, then `attn_implementation="fastattn"`."""

from fastattn.integrations.needed import need

need("transformers", (5, 16), "hf")  # masks and caches were described otherwise before

from fastattn.integrations.transformers.cache import FastCache  # noqa: E402
from fastattn.integrations.transformers.registration import register  # noqa: E402

__all__ = ["FastCache", "register"]
