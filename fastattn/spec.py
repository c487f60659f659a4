"""AttentionSpec: what one call computes, as a value that can be compared and printed."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastattn.call import Call

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What a score is made of: scale * q·k; w·tanh(q + k); the logarithm of a kernel of |q - k|.
DISTANCE_SCORES = ("gaussian", "boxcar", "epanechnikov", "triangular")
SCORES = ("dot", "additive", *DISTANCE_SCORES)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums, lse, sinks and bias diagonals are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, repr=False)
class AttentionSpec:
    """The frozen meaning of one call; it never says how fast or by which kernel.

    For varlen calls `batch` counts sequences and the lengths are the packed totals' maxima; for caches
    `seqlen_k` is the capacity. `mask` and `bias` hold the printed form of the arguments.

    >>> spec = AttentionSpec("attention", 1, 8, 2, 128, 128, 64, 64, "float32", "cpu", 0.125, mask="causal()")
    >>> spec
    attention(q=1x8x128x64, k=1x2x128x64, float32 on cpu, scale=0.125, mask=causal())
    """

    op: str  # "attention", "varlen" or "decode"
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    device: str  # device type
    scale: float
    softcap: float | None = None
    mask: str | None = None
    bias: str | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    return_lse: bool = False
    paged: bool = False
    score: str = "dot"
    needs_grad: bool = False

    def __repr__(self) -> str:
        text = (
            f"{self.op}(q={self.batch}x{self.num_heads}x{self.seqlen_q}x{self.head_dim}, "
            f"k={self.batch}x{self.num_heads_kv}x{self.seqlen_k}x{self.head_dim}, "
        )
        if self.head_dim_v != self.head_dim:
            text += f"head_dim_v={self.head_dim_v}, "
        text += f"{self.dtype} on {self.device}, scale={self.scale:g}"
        for field in fields(self)[_FIRST_OPTION:]:
            value = getattr(self, field.name)
            if value != field.default:
                text += f", {field.name}={value}"
        return text + ")"


_FIRST_OPTION = [field.name for field in fields(AttentionSpec)].index("softcap")


def needs_grad(call: Call) -> bool:
    """Whether autograd will want gradients of any tensor of this call."""
    if not torch.is_grad_enabled():
        return False
    if call.q.requires_grad or call.k.requires_grad or call.v.requires_grad:
        return True
    if any(t is not None and t.requires_grad for t in (call.sinks, call.score_weights)):
        return True
    if call.bias is None:
        return False
    return any(t.requires_grad for t in bias_tensors(call))


def bias_tensors(call: Call) -> list[Tensor]:
    """The tensors that gradients can reach through `bias`."""
    if isinstance(call.bias, Tensor):
        return [call.bias]
    return [t for t in torch.utils._pytree.tree_leaves(call.bias) if isinstance(t, Tensor)]


def spec_of(call: Call) -> AttentionSpec:
    """The spec of a validated call."""
    shape = call.mask_shape()
    return AttentionSpec(
        op=call.op,
        batch=shape.batch,
        num_heads=shape.heads,
        num_heads_kv=call.num_heads_kv(),
        seqlen_q=shape.seqlen_q,
        seqlen_k=shape.seqlen_k,
        head_dim=call.q.shape[-1],
        head_dim_v=call.v.shape[-1],
        dtype=dtype_name(call.q.dtype),
        device=call.q.device.type,
        scale=call.scale_value(),
        softcap=call.softcap,
        mask=_describe(call.mask),
        bias=_describe(call.bias),
        sinks=call.sinks is not None,
        dropout_p=call.dropout_p,
        return_lse=call.return_lse,
        paged=call.block_table is not None,
        score=call.score,
        needs_grad=needs_grad(call),
    )


def _describe(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}"
    return repr(value)
