"""A call for every option of the kernels, to compile them by."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import masks
from fastattn.biases import ALiBi
from fastattn.call import Call

SEQLEN = 256

# Those that between them launch every kernel come first, for a run that is cut short.
VARIANTS = (
    "causal", "bias", "alibi", "additive", "summary", "split",
    "descriptors", "varlen", "dropout", "blocks", "mask", "padding", "softcap, sinks", "paged", "few", "some",
    "triangular", "summary, blocks", "plain",
)  # fmt: skip
FORWARD_ONLY = ("descriptors", "split")  # whose backward pass is another variant's


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def variant_call(name: str, dtype: torch.dtype, head_dim: int) -> Call:
    """A call that uses an option of the kernels.

    Args:
        name: one of VARIANTS.
    """
    seqlen = {"few": 16, "some": 64, "split": 1}.get(name, SEQLEN)
    keys = 16 * SEQLEN if name == "split" else SEQLEN
    q, k, v = (_tensor(1, 2, n, head_dim, dtype=dtype) for n in (seqlen, keys, keys))
    call = Call("attention", q, k, v, return_lse=True)
    if name in ("causal", "descriptors"):
        call.mask = masks.causal()
    elif name == "mask":
        call.mask = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool)
    elif name == "blocks":
        call.mask = masks.causal() | masks.prefix(torch.tensor([40]))
    elif name == "padding":
        call.mask = masks.padding(torch.tensor([200]))
    elif name == "bias":
        call.bias = _tensor(2, SEQLEN, SEQLEN, dtype=dtype).requires_grad_()
    elif name == "alibi":
        call.bias, call.mask = ALiBi(torch.ones(2, requires_grad=True)), masks.causal()
    elif name == "softcap, sinks":
        call.softcap, call.sinks = 30.0, torch.zeros(2, requires_grad=True)
    elif name == "dropout":
        call.dropout_p, call.dropout_seed = 0.1, torch.zeros(1, dtype=torch.int64)
    elif name == "varlen":
        call.op, call.mask = "varlen", masks.causal()
        call.q, call.k, call.v = (x[0].transpose(0, 1) for x in (q, k, v))
        call.cu_seqlens_q = call.cu_seqlens_k = torch.tensor([0, 100, SEQLEN], dtype=torch.int32)
        call.max_seqlen_q = call.max_seqlen_k = SEQLEN
    elif name == "paged":
        call.op, call.lengths = "decode", torch.tensor([200])
        call.k, call.v = (x.view(2, 2, SEQLEN // 2, head_dim) for x in (k, v))
        call.block_table = torch.tensor([[0, 1]], dtype=torch.int32)
    elif name == "additive":
        call.score, call.scale, call.score_weights = name, 1.0, torch.zeros(head_dim, requires_grad=True)
    elif name == "triangular":
        call.score, call.scale, call.mask = name, 1.0, masks.causal() | masks.prefix(torch.tensor([40]))
        call.dropout_p, call.dropout_seed = 0.1, torch.zeros(1, dtype=torch.int64)
    elif name == "summary":
        call.mask, call.sinks = masks.causal(), torch.zeros(2)
    elif name == "summary, blocks":
        call.mask = masks.causal() | masks.prefix(torch.tensor([40]))
    elif name not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    return call
