"""fastattn inside models that know nothing of it: the function, for a while, or the modules, for good."""

from fastattn.integrations.torch.override import override_sdpa

__all__ = ["override_sdpa"]
