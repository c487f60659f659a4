"""fastattn inside models that know nothing of it: under the function that they call, or in their modules."""

from fastattn.integrations.torch.modules import Replacement, replace_modules
from fastattn.integrations.torch.override import override_sdpa

__all__ = ["Replacement", "override_sdpa", "replace_modules"]
