"""Each rule on the arguments has a message that names the argument, the rule and the value got."""

from __future__ import annotations

import re

import pytest
import torch
from call_support import f32, qkv, randn

import fastattn
from fastattn.biases import ALiBi
from fastattn.masks import causal, documents

I32 = torch.int32


def call(**changes):
    """attention on 2x4x5x8 queries and 2x2x7x8 keys with one argument changed."""
    q, k, v = qkv(2, 4, 2, 5, 7, 8, 6, dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, **changes}
    return fastattn.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


ATTENTION = {
    "q no tensor": ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
    "k no tensor": ({"k": None}, TypeError, "k must be a torch.Tensor, got NoneType"),
    "q 3-D": (
        {"q": f32(4, 5, 8)},
        ValueError,
        "q must be 4-D [batch, heads, length, head_dim], got shape [4, 5, 8]",
    ),
    "v 3-D": (
        {"v": f32(2, 7, 6)},
        ValueError,
        "v must be 4-D [batch, heads, length, head_dim], got shape [2, 7, 6]",
    ),
    "q int": (
        {"q": torch.ones(2, 4, 5, 8, dtype=I32)},
        TypeError,
        "q must be one of float32, bfloat16, float16, float64, got int32",
    ),
    "k dtype": ({"k": f32(2, 2, 7, 8).half()}, TypeError, "k must have q's dtype float32, got float16"),
    "v dtype": ({"v": f32(2, 2, 7, 6).double()}, TypeError, "v must have q's dtype float32, got float64"),
    "sparse": ({"q": f32(2, 4, 5, 8).to_sparse()}, TypeError, "q must be a dense strided tensor, got layout"),
    "device": (
        {"k": torch.empty(2, 2, 7, 8, device="meta")},
        ValueError,
        "k must be on q's device cpu, got meta",
    ),
    "head_dim": ({"k": f32(2, 2, 7, 9)}, ValueError, "k must have q's head_dim 8, got 9"),
    "batch of k": ({"k": f32(3, 2, 7, 8)}, ValueError, "k must have q's batch size 2, got 3"),
    "batch of v": ({"v": f32(3, 2, 7, 6)}, ValueError, "v must have q's batch size 2, got 3"),
    "length of v": (
        {"v": f32(2, 2, 8, 6)},
        ValueError,
        "v must have shape [2, 2, 7, head_dim_v] like k, got [2, 2, 8, 6]",
    ),
    "heads of v": (
        {"v": f32(2, 4, 7, 6)},
        ValueError,
        "v must have shape [2, 2, 7, head_dim_v] like k, got [2, 4, 7, 6]",
    ),
    "heads": ({"q": f32(2, 3, 5, 8)}, ValueError, "q's heads must be a multiple of k's 2, got 3"),
    "no heads of k": (
        {"k": f32(2, 0, 7, 8), "v": f32(2, 0, 7, 6)},
        ValueError,
        "q and k must both have heads, or neither: got 4 and 0",
    ),
    "scale type": ({"scale": "1"}, TypeError, "scale must be a real number, got str"),
    "scale bool": ({"scale": True}, TypeError, "scale must be a real number, got bool"),
    "scale tensor": ({"scale": torch.ones(())}, TypeError, "scale must be a real number, got Tensor"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "scale inf": ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    "scale too large": ({"scale": 1e300}, ValueError, "scale must be finite in float32, got 1e+300"),
    "scale too large an int": ({"scale": -(10**400)}, ValueError, "scale must be finite in float32, got -10"),
    "softcap too large": ({"softcap": 1e39}, ValueError, "softcap must be finite in float32, got 1e+39"),
    "softcap zero": ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
    "softcap negative": ({"softcap": -1}, ValueError, "softcap must be positive, got -1.0"),
    "softcap inf": ({"softcap": float("inf")}, ValueError, "softcap must be finite, got inf"),
    "softcap type": ({"softcap": []}, TypeError, "softcap must be a real number, got list"),
    "dropout above": ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
    "dropout below": ({"dropout_p": -0.5}, ValueError, "dropout_p must be between 0 and 1, got -0.5"),
    "dropout nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be between 0 and 1, got nan"),
    "dropout type": ({"dropout_p": None}, TypeError, "dropout_p must be a real number, got NoneType"),
    "dropout bool": ({"dropout_p": False}, TypeError, "dropout_p must be a real number, got bool"),
    "dropout tensor": (
        {"dropout_p": torch.zeros(3)},
        TypeError,
        "dropout_p must be a real number, got Tensor",
    ),
    "dropout 0-D tensor": (
        {"dropout_p": torch.zeros(())},
        TypeError,
        "dropout_p must be a real number, got Tensor",
    ),
    "seed type": ({"dropout_seed": 3}, TypeError, "dropout_seed must be a torch.Tensor, got int"),
    "seed dtype": (
        {"dropout_seed": torch.ones(1)},
        TypeError,
        "dropout_seed must be an int64 tensor of one element, got float32",
    ),
    "seed shape": (
        {"dropout_seed": torch.ones(2, dtype=torch.int64)},
        ValueError,
        "dropout_seed must have one element, got shape [2]",
    ),
    "seed device": (
        {"dropout_seed": torch.ones(1, dtype=torch.int64, device="meta")},
        ValueError,
        "dropout_seed must be on q's device cpu, got meta",
    ),
    "sinks type": ({"sinks": [0.0]}, TypeError, "sinks must be a torch.Tensor, got list"),
    "sinks dtype": (
        {"sinks": torch.ones(4, dtype=I32)},
        TypeError,
        "sinks must be one of float32, bfloat16, float16, float64, got int32",
    ),
    "sinks shape": (
        {"sinks": torch.ones(2)},
        ValueError,
        "sinks must have shape [4], one per query head, got [2]",
    ),
    "mask type": (
        {"mask": "causal"},
        TypeError,
        "mask must be a fastattn.masks.Mask or a bool tensor, got str",
    ),
    "mask not called": (
        {"mask": fastattn.masks.causal},
        TypeError,
        "mask must be a fastattn.masks.Mask or a bool tensor, got function causal: call it, causal(...)",
    ),
    "mask dtype": (
        {"mask": torch.ones(5, 7)},
        TypeError,
        "mask must be bool (True = attend), got float32: pass additive masks as bias",
    ),
    "mask shape": (
        {"mask": torch.ones(5, 8).bool()},
        ValueError,
        "mask must broadcast to [2, 4, 5, 7], got [5, 8]",
    ),
    "mask of heads of k": (
        {"mask": torch.ones(2, 5, 7).bool()},
        ValueError,
        "mask must broadcast to [2, 4, 5, 7], got [2, 5, 7]",
    ),
    "mask 5-D": (
        {"mask": torch.ones(1, 1, 1, 5, 7).bool()},
        ValueError,
        "mask must broadcast to [2, 4, 5, 7], got [1, 1, 1, 5, 7]",
    ),
    "mask device": (
        {"mask": torch.ones(5, 7, dtype=torch.bool, device="meta")},
        ValueError,
        "mask must be on q's device cpu, got meta",
    ),
    "bias type": ({"bias": 1.0}, TypeError, "bias must be a tensor or a fastattn.biases.Bias, got float"),
    "bias dtype": (
        {"bias": torch.ones(5, 7, dtype=torch.float64)},
        TypeError,
        "bias must have q's dtype float32, got float64",
    ),
    "bias bool": (
        {"bias": torch.ones(5, 7, dtype=torch.bool)},
        TypeError,
        "bias must have q's dtype float32, got bool",
    ),
    "bias shape": ({"bias": f32(4, 1)}, ValueError, "bias must broadcast to [2, 4, 5, 7], got [4, 1]"),
    "bias heads": ({"bias": ALiBi(f32(3))}, ValueError, "bias ALiBi must be for 4 heads, got 3"),
    "bias batch": ({"bias": ALiBi(f32(3, 4))}, ValueError, "bias ALiBi must have batch size 2 (or 1), got 3"),
    "backend name": (
        {"backend": "gpu"},
        ValueError,
        "backend must be one of cuda, triton, cpu, torch, reference, got 'gpu'",
    ),
    "backend type": ({"backend": 1}, TypeError, "backend must be a string or None, got int"),
    "backend unbuilt": (
        {"backend": "cuda"},
        NotImplementedError,
        "backend 'cuda' cannot run attention(q=2x4x5x8, k=2x2x7x8, head_dim_v=6, float32 on cpu",
    ),
    "backend unfit": (
        {"backend": "torch", "softcap": 1.0, "sinks": f32(4), "dropout_p": 0.5, "return_lse": True},
        NotImplementedError,
        "PyTorch has no softcap; PyTorch has no sinks; PyTorch drops other elements; PyTorch does not return",
    ),
}


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_attention(case):
    changes, error, message = case
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


def test_nested_tensors_point_to_varlen():
    nested = torch.nested.nested_tensor([torch.ones(4, 5, 8), torch.ones(4, 3, 8)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="use varlen_attention"):
        call(q=nested)


def test_unknown_environment(monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"FASTATTN_BACKEND must be one of cuda, .*, got 'fast'"):
        call()


def test_numbers_beyond_float32_are_for_float64():
    q = randn(1, 1, 3, 8)
    for options in ({"scale": 1e39}, {"softcap": 1e300}):
        assert fastattn.attention(q, q, q, **options).isfinite().all()


def test_vmap_over_a_mask_that_needs_block_lists():
    q, ids = f32(3, 2, 1, 9, 8), torch.zeros(3, 2, 9, dtype=I32)

    def call(q, ids):
        return fastattn.attention(q, q, q, mask=causal() & documents(ids))

    with pytest.raises(
        NotImplementedError, match=r"mask AndMask needs block lists.* a batch dimension instead"
    ):
        torch.vmap(call)(q, ids)
    assert torch.equal(torch.vmap(call, (0, None))(q, ids[0])[1], call(q[1], ids[0]))


OUT, LSE = f32(1, 2, 3, 4), f32(1, 2, 3)

MERGE = {
    "none": (([], []), ValueError, "outs must have at least one part, got none"),
    "numbers": (([OUT], [LSE, LSE]), ValueError, "lses must have as many parts as outs, 1, got 2"),
    "type": (([OUT, None], [LSE, LSE]), TypeError, "outs[1] must be a torch.Tensor, got NoneType"),
    "outs int": ((3, 4), TypeError, "outs must be a sequence of tensors or a stacked tensor, got int"),
    "outs None": (
        (None, None),
        TypeError,
        "outs must be a sequence of tensors or a stacked tensor, got NoneType",
    ),
    "lses 0-D": (([OUT], LSE[0, 0, 0]), TypeError, "lses must be a sequence of tensors or a stacked tensor"),
    "first": (([None], [LSE]), TypeError, "outs[0] must be a torch.Tensor, got NoneType"),
    "dtype": (
        ([OUT, OUT.half()], [LSE, LSE]),
        TypeError,
        "outs[1] must have outs[0]'s dtype float32, got float16",
    ),
    "int": (
        ([OUT], [LSE.int()]),
        TypeError,
        "lses[0] must be one of float32, bfloat16, float16, float64, got int32",
    ),
    "device": (
        ([OUT], [LSE.to("meta")]),
        ValueError,
        "lses[0] must be on outs[0]'s device cpu, got meta",
    ),
    "shape": (
        ([OUT, f32(1, 2, 3, 5)], [LSE, LSE]),
        ValueError,
        "outs[1] must have outs[0]'s shape [1, 2, 3, 4], got [1, 2, 3, 5]",
    ),
    "lse shape": (([OUT], [f32(1, 2, 4)]), ValueError, "lses must have shape [1, 2, 3], got [1, 2, 4]"),
    "dims": (
        ([f32(3, 4)], [f32(3)]),
        ValueError,
        "outs must be [batch, heads, length, head_dim_v] or [tokens",
    ),
    "packed": (([f32(5, 2, 4)], [f32(5, 2)]), ValueError, "lses must have shape [2, 5], got [5, 2]"),
}


@pytest.mark.parametrize("case", MERGE.values(), ids=MERGE)
def test_merge(case):
    arguments, error, message = case
    with pytest.raises(error, match=re.escape(message)):
        fastattn.merge(*arguments)


WEIGHTS = {
    "rows type": ({"rows": "all"}, TypeError, "rows must hold ints, got 'all'"),
    "rows items": ({"rows": [0.5]}, TypeError, "rows must hold ints, got [0.5]"),
    "rows dtype": ({"rows": torch.ones(1)}, TypeError, "rows must be int64 or int32, got float32"),
    "rows float": ({"rows": 1.5}, TypeError, "rows must hold ints, got 1.5"),
    "rows step": ({"rows": slice(4, 0, -1)}, ValueError, "rows's step must be >= 1 or None, got -1"),
    "rows start": ({"cols": slice("a", 3)}, TypeError, "cols's start must be an int or None, got str"),
    "rows dims": ({"rows": torch.ones(1, 1, dtype=I32)}, ValueError, "rows must be 1-D, got shape [1, 1]"),
    "rows range": ({"rows": [0, 5]}, ValueError, "rows must be between -5 and 4, got 5"),
    "cols range": ({"cols": [-8]}, ValueError, "cols must be between -7 and 6, got -8"),
    "k": ({"k": None}, TypeError, "k must be a torch.Tensor, got NoneType"),
    "mask": (
        {"mask": torch.ones(5, 6).bool()},
        ValueError,
        "mask must broadcast to [2, 4, 5, 7], got [5, 6]",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(case):
    changes, error, message = case
    q, k, _ = qkv(2, 4, 2, 5, 7)
    arguments = {"q": q, "k": k, **changes}
    with pytest.raises(error, match=re.escape(message)):
        fastattn.attention_weights(arguments.pop("q"), arguments.pop("k"), **arguments)


def test_weights_of_numpy_ints():
    import numpy

    q, k, _ = qkv(1, 2, 2, 5, 7)
    want = fastattn.attention_weights(q, k, rows=3)
    for rows in (numpy.int64(3), [numpy.int32(-2)], numpy.array([3])):
        assert torch.equal(fastattn.attention_weights(q, k, rows=rows), want)


def test_errors_come_before_any_kernel_in_every_route():
    q, k, v = qkv(2, 4, 2, 5, 7, grad=True)
    message = re.escape("k must have q's head_dim 8, got 7")
    for setting in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with setting(), pytest.raises(ValueError, match=message):
            fastattn.attention(q, k[..., :7], v)
    with pytest.raises(ValueError, match=message):
        torch.vmap(fastattn.attention)(q[None], k[None, ..., :7], v[None])
