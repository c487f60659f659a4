"""The readable implementation as a backend: every dtype, every device, derivatives of every order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.call import Call
from fastattn.spec import AttentionSpec

name = "reference"


def supports(spec: AttentionSpec) -> None:
    """It runs every call, in O(N^2) memory."""
    return


def run(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of a validated call; half precision is computed in float32, as kernels accumulate it."""
    dtype = call.q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = call.q.to(wide), call.k.to(wide), call.v.to(wide)
    if call.num_heads() == 0 or call.batch() == 0:
        # Nothing to compute, and no ratio of head counts; the sum ties the empty result to the graph.
        lse = q.sum(-1) if q.dim() == 4 else q.sum(-1).mT
        link = (q.sum() + k.sum() + v.sum()).to(dtype)
        return q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=dtype) + link, lse
    options: dict[str, Any] = {
        "mask": call.mask,
        "bias": call.bias,
        "scale": call.scale_value(),
        "softcap": call.softcap,
        "sinks": call.sinks,
        "dropout_p": call.dropout_p,
        "dropout_seed": call.dropout_seed,
        "score": call.score,
        "score_weights": call.score_weights,
        "return_lse": True,
    }
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        out, lse = reference.varlen_attention(q, k, v, call.cu_seqlens_q, call.cu_seqlens_k, **options)
    elif call.lengths is not None:
        out, lse = reference.decode_attention(q, k, v, call.lengths, block_table=call.block_table, **options)
    else:
        out, lse = reference.attention(q, k, v, **options)
    return out.to(dtype), lse
