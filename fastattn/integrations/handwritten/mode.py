"""The mode in which products are put off until it is known whether they are attention."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import tree_leaves

from fastattn.integrations.handwritten.lazy import Lazy, Notes, may_change, settle_readers, without_lazy
from fastattn.integrations.handwritten.products import PRODUCTS
from fastattn.integrations.torch.override import Mode

__all__ = ["AttentionMode", "Lazy", "Notes", "without_lazy"]


class AttentionMode(Mode):
    """While it holds, this thread's scaled_dot_product_attention is ours, and attention written out too.

    Args:
        notes: where to write what became of the products.
        backend: as of override_sdpa.
    """

    def __init__(self, notes: Notes, backend: str | None = None) -> None:
        super().__init__(backend)
        self.notes = notes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = PRODUCTS.get(func)
        if product is not None and not any(issubclass(kind, Lazy) for kind in types):
            found = product(self.notes, func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        elif may_change(func, kwargs):
            settle_readers(tree_leaves((args, kwargs)))
        return super().__torch_function__(func, types, args, kwargs)
