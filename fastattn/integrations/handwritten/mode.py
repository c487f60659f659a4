"""The mode in which products are put off until it is known whether they are attention."""

from __future__ import annotations

import inspect
from typing import Any

from torch.utils._pytree import tree_leaves

from fastattn.integrations.handwritten.lazy import (
    Lazy,
    Notes,
    by_rule,
    may_change,
    settle_readers,
    without_lazy,
)
from fastattn.integrations.handwritten.products import PRODUCTS
from fastattn.integrations.torch.override import Mode
from fastattn.integrations.torch.stand_ins import torch_mha

__all__ = ["AttentionMode", "Lazy", "Notes", "without_lazy"]

_NEED_WEIGHTS = list(inspect.signature(torch_mha).parameters).index("need_weights")


class AttentionMode(Mode):
    """While it holds, this thread's scaled_dot_product_attention is ours, and attention written out too.

    Args:
        notes: where to write what became of the products.
        needs_weights: whether F.multi_head_attention_forward returns weights where it is asked for them.
        backend: as of override_sdpa.
    """

    def __init__(self, notes: Notes, needs_weights: bool = True, backend: str | None = None) -> None:
        super().__init__(backend)
        self.notes, self.needs_weights = notes, needs_weights

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = PRODUCTS.get(func)
        if product is not None and not any(issubclass(kind, Lazy) for kind in types):
            found = by_rule(product, self.notes, func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        elif func is torch_mha and not self.needs_weights and len(args) <= _NEED_WEIGHTS:
            kwargs = {**kwargs, "need_weights": False}
        elif may_change(func, kwargs):
            settle_readers(tree_leaves((args, kwargs)))
        return super().__torch_function__(func, types, args, kwargs)
