"""Case: one attention problem, described but not yet filled with numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LAYOUTS = (
    "bhld", "blhd", "sliced", "padded_rows", "expanded_kv", "expanded_batch", "reversed", "stepped",
    "side_by_side",
)  # fmt: skip


@dataclass(frozen=True)
class BiasCase:
    """A bias with one differentiable leaf tensor.

    Args:
        leaf: the leaf's name in results: "bias", "slopes" or "table".
        make: (case, generator) -> the leaf.
        build: leaf -> the `bias=` argument.
        requires_grad: whether gradients of the leaf are compared.
    """

    leaf: str
    make: Callable[[Case, torch.Generator], Tensor]
    build: Callable[[Tensor], Any]
    requires_grad: bool = True


@dataclass(frozen=True)
class Case:
    """One call of `attention`, `varlen_attention` or `decode_attention`.

    Args:
        name: unique, used as the test's id and as the seed of its inputs.
        heads_kv, seqlen_k, head_dim_v: None means the same as heads, seqlen_q, head_dim.
        mask: (case, generator) -> Mask or bool tensor.
        sinks: whether there is a per-head sink logit.
        layout: strides of q, k, v; see `fastattn.testing.inputs`.
        lengths_q, lengths_k: lengths of a varlen call's sequences; of a cache's, lengths_k alone.
        page_size: keys in a page, for a paged cache.
        score: one of fastattn.spec.SCORES; scale is then None, unless it is "dot".
        grads: whether gradients are compared.
        slow: left to `make test-all`.
    """

    name: str
    batch: int = 2
    heads: int = 2
    heads_kv: int | None = None
    seqlen_q: int = 33
    seqlen_k: int | None = None
    head_dim: int = 16
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    mask: Callable[[Case, torch.Generator], Any] | None = None
    bias: BiasCase | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    layout: str = "bhld"
    op: str = "attention"
    lengths_q: tuple[int, ...] = ()
    lengths_k: tuple[int, ...] = ()
    page_size: int | None = None
    score: str = "dot"
    grads: bool = True
    slow: bool = False

    @property
    def num_heads_kv(self) -> int:
        return self.heads if self.heads_kv is None else self.heads_kv

    @property
    def keys(self) -> int:
        """Lk: the number of keys, the longest sequence's for varlen, the capacity for caches."""
        if self.op == "varlen":
            return max(self.lengths_k)
        return self.seqlen_q if self.seqlen_k is None else self.seqlen_k

    @property
    def queries(self) -> int:
        return max(self.lengths_q) if self.op == "varlen" else self.seqlen_q

    @property
    def dim_v(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    def with_dtype(self, dtype: torch.dtype) -> Case:
        """The same case in another dtype, named after it."""
        return replace(self, dtype=dtype, name=f"{self.name}-{str(dtype).removeprefix('torch.')}")
