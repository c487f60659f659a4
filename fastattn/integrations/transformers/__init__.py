"""fastattn inside Hugging Face transformers: `register()`, then `attn_implementation="fastattn"`."""

try:
    from transformers import __version__ as _version
except ImportError as error:
    raise ImportError(
        f"fastattn.integrations.transformers needs transformers 5.16 or newer ({error}); "
        "run: pip install 'fastattn[hf]'"
    ) from error

if tuple(map(int, _version.split(".")[:2])) < (5, 16):  # masks and caches were described otherwise before
    raise ImportError(
        f"fastattn.integrations.transformers needs transformers 5.16 or newer, got {_version}; "
        "run: pip install 'fastattn[hf]'"
    )

from fastattn.integrations.transformers.cache import FastCache
from fastattn.integrations.transformers.registration import register

__all__ = ["FastCache", "register"]
