"""convert_heads: trained multi-head attention with fewer heads of keys and values."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastattn.checks import check_int
from fastattn.nn.multihead import MultiheadAttention

Module = TypeVar("Module", bound=nn.Module)


def convert_heads(module: Module, num_kv_heads: int) -> Module:
    """W'_g = mean of the W_h of group g, for keys and for values: multi-head to grouped-query attention.

    The paper then trains on for a few percent of the original steps, since outputs change.

    >>> full = MultiheadAttention(64, 8, batch_first=True)
    >>> grouped = convert_heads(full, num_kv_heads=2)
    >>> list(full.in_proj_weight.shape), list(grouped.in_proj_weight.shape)
    ([192, 64], [96, 64])

    Args:
        module: a fastattn.nn.MultiheadAttention, or a model that holds some, such as models.Transformer; it
            is left as it is.
        num_kv_heads: heads of keys and values that remain; must divide the number that there is. 1 is
            multi-query attention.
    Returns:
        A copy with fewer heads of keys and values; everything else in it is equal.
    Raises:
        TypeError: the module holds no fastattn.nn.MultiheadAttention.
        ValueError: a number that does not divide.
    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
    Checkpoints" (arXiv 2305.13245), section 2.1.
    """
    check_int("num_kv_heads", num_kv_heads, 1)
    parts = module.modules() if isinstance(module, nn.Module) else ()
    found = [part for part in parts if isinstance(part, MultiheadAttention)]
    if not found:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(
            f"module must be or hold a fastattn.nn.MultiheadAttention, got {kind}: "
            "fastattn.integrations.torch.replace_modules makes one of each torch.nn.MultiheadAttention"
        )
    for part in found:
        if part.num_kv_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide the {part.num_kv_heads} heads that there are, got {num_kv_heads}"
            )
    converted = copy.deepcopy(module)
    for copied in converted.modules():
        if isinstance(copied, MultiheadAttention):
            _pool(copied, num_kv_heads)
    return converted


@torch.no_grad()
def _pool(attention: MultiheadAttention, heads: int) -> None:
    """Average the rows of keys and values over groups of neighbouring heads, in place."""
    before, head_dim = attention.num_kv_heads, attention.head_dim

    def pooled(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (heads, before // heads, head_dim)).mean(1).flatten(0, 1)

    def packed(rows: Tensor) -> Tensor:
        sizes = [attention.embed_dim, before * head_dim, before * head_dim]
        q, k, v = rows.split(sizes)
        return torch.cat([q, pooled(k), pooled(v)])

    def last(vector: Tensor) -> Tensor:  # [1, 1, Hkv D]
        return pooled(vector.flatten()).view(1, 1, -1)

    changes = {
        "in_proj_weight": packed,
        "in_proj_bias": packed,
        "k_proj_weight": pooled,
        "v_proj_weight": pooled,
        "bias_k": last,
        "bias_v": last,
    }
    for name, change in changes.items():
        parameter = getattr(attention, name)
        if parameter is not None:
            setattr(attention, name, nn.Parameter(change(parameter), parameter.requires_grad))
    attention.num_kv_heads = heads
