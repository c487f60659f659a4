"""Each rule on the arguments of scaled_dot_product_attention has its message."""

from __future__ import annotations

import re

import pytest
import torch
from call_support import f32

import fastattn

I32 = torch.int32


SDPA = {
    "mask and is_causal": (
        {"attn_mask": torch.ones(5, 7).bool(), "is_causal": True},
        ValueError,
        "attn_mask must be None with is_causal=True",
    ),
    "1-D": ({"query": f32(8)}, ValueError, "query must have at least 2 dimensions, got shape [8]"),
    "no tensor": ({"key": 3}, TypeError, "key must be a torch.Tensor, got int"),
    "mask type": ({"attn_mask": [True]}, TypeError, "attn_mask must be a tensor, got list"),
    "mask int": (
        {"attn_mask": torch.ones(5, 7, dtype=I32)},
        TypeError,
        "attn_mask must be one of bool, float32, got int32",
    ),
    "mask float64": (
        {"attn_mask": torch.ones(5, 7, dtype=torch.float64)},
        TypeError,
        "attn_mask must be one of bool, float32, got float64",
    ),
    "mask shape": (
        {"attn_mask": torch.ones(5, 6)},
        ValueError,
        "attn_mask must broadcast to [2, 4, 5, 7], got [5, 6]",
    ),
    "mask shape, 3-D": (
        {"query": f32(4, 5, 8), "key": f32(4, 7, 8), "value": f32(4, 7, 6), "attn_mask": torch.ones(2, 5, 7)},
        ValueError,
        "attn_mask must broadcast to [4, 5, 7], got [2, 5, 7]",
    ),
    "heads": (
        {"key": f32(2, 2, 7, 8), "value": f32(2, 2, 7, 6)},
        ValueError,
        "query, key and value must have head counts that are equal or 1, or enable_gqa=True, got 4, 2 and 2",
    ),
    "heads with gqa": (
        {"key": f32(2, 3, 7, 8), "value": f32(2, 3, 7, 6), "enable_gqa": True},
        ValueError,
        "key's heads must divide query's 4 with enable_gqa=True, got 3",
    ),
    "batch": (
        {"key": f32(3, 4, 7, 8)},
        ValueError,
        "query, key and value must have batch dimensions that broadcast, got [2], [3], [2]",
    ),
    "dtype": (
        {"value": f32(2, 4, 7, 6).half()},
        TypeError,
        "value must have query's dtype float32, got float16",
    ),
    "query dtype": (
        {"query": torch.ones(2, 4, 5, 8, dtype=I32)},
        TypeError,
        "query must be one of float32, bfloat16, float16, float64, got int32",
    ),
    "head_dim": ({"key": f32(2, 4, 7, 9)}, ValueError, "key must have query's head_dim 8, got 9"),
    "head_dim, 3-D": (
        {"query": f32(4, 5, 8), "key": f32(4, 7, 9), "value": f32(4, 7, 6)},
        ValueError,
        "key must have query's head_dim 8, got 9",
    ),
    "length": (
        {"value": f32(2, 4, 6, 6)},
        ValueError,
        "value must have shape [2, 4, 7, head_dim_v] like key, got [2, 4, 6, 6]",
    ),
    "device": (
        {"key": torch.empty(2, 4, 7, 8, device="meta")},
        ValueError,
        "key must be on query's device cpu, got meta",
    ),
    "mask device": (
        {"attn_mask": torch.ones(5, 7, device="meta")},
        ValueError,
        "attn_mask must be on query's device cpu, got meta",
    ),
    "bool mask device": (
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool, device="meta")},
        ValueError,
        "attn_mask must be on query's device cpu, got meta",
    ),
    "dropout": ({"dropout_p": 2.0}, ValueError, "dropout_p must be between 0 and 1, got 2.0"),
}


@pytest.mark.parametrize("case", SDPA.values(), ids=SDPA)
def test_sdpa(case):
    changes, error, message = case
    arguments = {"query": f32(2, 4, 5, 8), "key": f32(2, 4, 7, 8), "value": f32(2, 4, 7, 6), **changes}
    with pytest.raises(error, match=re.escape(message)):
        fastattn.scaled_dot_product_attention(**arguments)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (I32, "attn_mask must be one of bool, float32, got int32"),
        (torch.float64, "attn_mask must have query's dtype bfloat16 or float32, got float64"),
    ],
    ids=str,
)
def test_sdpa_masks_under_autocast(dtype, message):
    with torch.autocast("cpu"), pytest.raises(TypeError, match=re.escape(message)):
        fastattn.scaled_dot_product_attention(
            f32(2, 4, 5, 8), f32(2, 4, 7, 8), f32(2, 4, 7, 6), torch.ones(5, 7, dtype=dtype)
        )


def test_sdpa_takes_a_bool_dropout_p_as_torch_does():
    q = f32(1, 1, 3, 8)
    want = fastattn.scaled_dot_product_attention(q, q, q)
    assert torch.equal(fastattn.scaled_dot_product_attention(q, q, q, dropout_p=False), want)


def test_sdpa_causal_bias_of_other_lengths():
    from torch.nn.attention.bias import causal_upper_left

    with pytest.raises(ValueError, match=re.escape("attn_mask must be for lengths [5, 7], got [5, 6]")):
        fastattn.scaled_dot_product_attention(
            f32(2, 4, 5, 8), f32(2, 4, 7, 8), f32(2, 4, 7, 6), causal_upper_left(5, 6)
        )
