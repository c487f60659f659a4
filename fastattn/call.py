"""Call: the arguments of one public call, gathered for validation, dispatch and backends to share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fastattn.biases import Bias
    from fastattn.masks import Mask, MaskShape


@dataclass
class Call:
    """One call as the user wrote it.

    `op` fixes the layouts:
      attention  q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]
      varlen     q [total_q, Hq, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv], cu_seqlens int32 [S + 1]
      decode     q [B, Hq, Lq, D], k [B, Hkv, Lmax, D] and lengths [B]; with block_table [B, max_pages]
                 k [pages, Hkv, page, D] and v [pages, Hkv, page, Dv]
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | Tensor | None = None
    bias: Bias | Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    return_lse: bool = False
    backend: str | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    lengths: Tensor | None = None
    block_table: Tensor | None = None
    score: str = "dot"  # one of fastattn.spec.SCORES
    score_weights: Tensor | None = None  # [D], of the additive score
    names: Mapping[str, str] | None = None  # what the user knows arguments by, where not by the fields' names
    checked: bool = False  # whether the contents of the index tensors are known to be right

    def name(self, argument: str) -> str:
        """An argument's name in messages."""
        return argument if self.names is None else self.names.get(argument, argument)

    def scale_value(self) -> float:
        """The scale in force; scores of zero-width heads are zero whatever it is."""
        return 1.0 / math.sqrt(max(self.q.shape[-1], 1)) if self.scale is None else self.scale

    def num_heads(self) -> int:
        return self.q.shape[1]

    def num_heads_kv(self) -> int:
        return self.k.shape[1]

    def batch(self) -> int:
        """Batch entries, or sequences of a varlen call."""
        if self.cu_seqlens_q is not None:
            return self.cu_seqlens_q.shape[0] - 1
        return self.q.shape[0]

    def seqlens(self) -> tuple[int, int]:
        """The (maximal) query and key lengths: what masks and biases broadcast to."""
        if self.op == "varlen":
            return self.max_seqlen_q, self.max_seqlen_k
        if self.block_table is not None:
            return self.q.shape[2], self.block_table.shape[1] * self.k.shape[2]
        return self.q.shape[2], self.k.shape[2]

    def mask_shape(self) -> MaskShape:
        """The index space in which this call's mask and bias are evaluated."""
        from fastattn.masks import MaskShape

        seqlen_q, seqlen_k = self.seqlens()
        seqlens_q = seqlens_k = None
        if self.cu_seqlens_q is not None and self.cu_seqlens_k is not None:
            seqlens_q = self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]
            seqlens_k = self.cu_seqlens_k[1:] - self.cu_seqlens_k[:-1]
        elif self.lengths is not None:
            seqlens_k = self.lengths
        return MaskShape(self.batch(), self.num_heads(), seqlen_q, seqlen_k, seqlens_q, seqlens_k)
