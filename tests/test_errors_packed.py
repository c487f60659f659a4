"""Each rule on the arguments of packed and cached calls has its message."""

from __future__ import annotations

import re

import pytest
import torch
from call_support import NATIVE, f32

import fastattn
from fastattn.masks import causal, dense

I32 = torch.int32


def packed(**changes):
    cu = torch.tensor([0, 2, 5], dtype=I32)
    arguments = {
        "q": f32(5, 4, 8),
        "k": f32(5, 2, 8),
        "v": f32(5, 2, 6),
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
    }
    arguments.update(changes)
    return fastattn.varlen_attention(**arguments)


def cu(*values):
    return torch.tensor(values, dtype=I32)


VARLEN = {
    "q 4-D": (
        {"q": f32(1, 5, 4, 8)},
        ValueError,
        "q must be 3-D [tokens, heads, head_dim], got shape [1, 5, 4, 8]",
    ),
    "tokens of v": (
        {"v": f32(6, 2, 6)},
        ValueError,
        "v must have shape [5, 2, head_dim_v] like k, got [6, 2, 6]",
    ),
    "cu type": ({"cu_seqlens_k": [0, 2, 5]}, TypeError, "cu_seqlens_k must be a torch.Tensor, got list"),
    "cu dtype": ({"cu_seqlens_q": cu(0, 2, 5).long()}, TypeError, "cu_seqlens_q must be int32, got int64"),
    "cu bool": ({"cu_seqlens_k": cu(0, 2, 5) > 0}, TypeError, "cu_seqlens_k must be int32, got bool"),
    "cu float": ({"cu_seqlens_q": cu(0, 2, 5) / 1}, TypeError, "cu_seqlens_q must be int32, got float32"),
    "cu complex": (
        {"cu_seqlens_q": cu(0, 2, 5) * 1j},
        TypeError,
        "cu_seqlens_q must be int32, got complex64",
    ),
    "q": ({"q": "q"}, TypeError, "q must be a torch.Tensor, got str"),
    "q, cu without values": (
        {"q": "q", "cu_seqlens_q": cu(0, 2, 5).to("meta")},
        TypeError,
        "q must be a torch.Tensor, got str",
    ),
    "cu 2-D": ({"cu_seqlens_q": cu(0, 2, 5)[None]}, ValueError, "cu_seqlens_q must be 1-D, got shape [1, 3]"),
    "cu empty": (
        {"cu_seqlens_q": cu()},
        ValueError,
        "cu_seqlens_q must have one element more than there are",
    ),
    "cu sizes": (
        {"cu_seqlens_k": cu(0, 5)},
        ValueError,
        "cu_seqlens_k must have as many elements as cu_seqlens_q, 3, got 2",
    ),
    "cu start": ({"cu_seqlens_q": cu(1, 2, 5)}, ValueError, "cu_seqlens_q must start with 0, got 1"),
    "cu end": (
        {"cu_seqlens_k": cu(0, 2, 4)},
        ValueError,
        "cu_seqlens_k must end with k's number of tokens 5, got 4",
    ),
    "cu order": (
        {"cu_seqlens_q": cu(0, 6, 5)},
        ValueError,
        "cu_seqlens_q must not decrease, got 6 then 5 at index 1",
    ),
    "max too small": (
        {"max_seqlen_q": 2},
        ValueError,
        "max_seqlen_q must be at least the longest sequence, 3, got 2",
    ),
    "max type": ({"max_seqlen_k": 3.0}, TypeError, "max_seqlen_k must be an int, got float"),
    "max negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be >= 0, got -1"),
    "dense mask": (
        {"mask": torch.ones(3, 3).bool()},
        NotImplementedError,
        "mask must be a fastattn.masks.Mask in varlen_attention, got a dense tensor",
    ),
    "dense part": ({"mask": causal() & dense(torch.ones(3, 3).bool())}, NotImplementedError, "dense mask"),
    "bias": (
        {"bias": f32(3, 3)},
        NotImplementedError,
        "bias must be a fastattn.biases.Bias in varlen_attention, got a tensor",
    ),
}


@pytest.mark.parametrize("case", VARLEN.values(), ids=VARLEN)
def test_varlen(case):
    changes, error, message = case
    with pytest.raises(error, match=re.escape(message)):
        packed(**changes)


def cached(**changes):
    arguments = {
        "q": f32(2, 4, 1, 8),
        "k_cache": f32(2, 2, 16, 8),
        "v_cache": f32(2, 2, 16, 8),
        "lengths": torch.tensor([3, 16]),
    }
    arguments.update(changes)
    return fastattn.decode_attention(**arguments)


PAGES = {"k_cache": f32(6, 2, 4, 8), "v_cache": f32(6, 2, 4, 8), "block_table": torch.zeros(2, 4, dtype=I32)}

DECODE = {
    "k 3-D": (
        {"k_cache": f32(2, 16, 8)},
        ValueError,
        "k_cache must be 4-D [batch, heads, length, head_dim], got shape [2, 16, 8]",
    ),
    "pages 3-D": (
        {**PAGES, "v_cache": f32(6, 4, 8)},
        ValueError,
        "v_cache must be 4-D [pages, heads, page, head_dim], got shape [6, 4, 8]",
    ),
    "batch": ({"k_cache": f32(3, 2, 16, 8)}, ValueError, "k_cache must have q's batch size 2, got 3"),
    "lengths dtype": (
        {"lengths": torch.ones(2)},
        TypeError,
        "lengths must be int32 or int64, got float32",
    ),
    "lengths shape": (
        {"lengths": torch.ones(3, dtype=I32)},
        ValueError,
        "lengths must have shape [2], one per batch entry, got [3]",
    ),
    "lengths 0-D": ({"lengths": torch.ones((), dtype=I32)}, ValueError, "lengths must be 1-D, got shape []"),
    "too long": (
        {"lengths": torch.tensor([3, 17])},
        ValueError,
        "lengths must be between 0 and the capacity 16, got 17 at index 1",
    ),
    "negative": (
        {"lengths": torch.tensor([-1, 3])},
        ValueError,
        "lengths must be between 0 and the capacity 16, got -1 at index 0",
    ),
    "table dtype": (
        {**PAGES, "block_table": torch.zeros(2, 4)},
        TypeError,
        "block_table must be int32, got float32",
    ),
    "table 1-D": (
        {**PAGES, "block_table": torch.zeros(4, dtype=I32)},
        ValueError,
        "block_table must be 2-D, got shape [4]",
    ),
    "table rows": (
        {**PAGES, "block_table": torch.zeros(3, 4, dtype=I32)},
        ValueError,
        "block_table must have 2 rows, one per batch entry, got [3, 4]",
    ),
    "page": (
        {**PAGES, "block_table": torch.tensor([[0, 9, 9, 9], [1, 2, 3, 6]], dtype=I32)},
        ValueError,
        "block_table must name pages between 0 and 5, got 6 in row 1",
    ),
    "dense mask": (
        {"mask": torch.ones(1, 15).bool()},
        ValueError,
        "mask must broadcast to [2, 4, 1, 16], got [1, 15]",
    ),
}


@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE)
def test_decode(case):
    changes, error, message = case
    with pytest.raises(error, match=re.escape(message)):
        cached(**changes)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
def test_paged_caches_have_no_backward():
    pages = {**PAGES, "k_cache": f32(6, 2, 4, 8).requires_grad_()}
    with pytest.raises(NotImplementedError, match="paged caches have no backward pass"):
        cached(**pages, backend="cpu")
