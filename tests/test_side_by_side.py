"""The backward pass where heads lie side by side: rows so far apart that kernels copy, and keep, them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from call_support import NATIVE

import fastattn
from fastattn import masks
from fastattn.inspect import summarize
from fastattn.testing import Case, make_inputs, oracle, run
from fastattn.testing.cases import always, block_layout, tensor_bias
from fastattn.testing.checking import check_case
from fastattn.testing.inputs import Inputs, lay_out

pytestmark = pytest.mark.skipif(not NATIVE, reason="the native core is not built")

# Several tiles of rows, the last one ragged, and of keys; rows of q and dout are 3.5 KB apart or more.
WIDE = Case("side-by-side", 1, 14, 2, 150, 210, 64, 64, layout="blhd")
CAUSAL = always(masks.causal())
PACKED = {"op": "varlen", "batch": 4, "lengths_q": (70, 5, 140, 0), "lengths_k": (70, 140, 65, 9)}
CASES = {
    "dense": WIDE,
    "causal": replace(WIDE, mask=CAUSAL),
    "own-keys": replace(WIDE, heads_kv=14),  # their rows lie as far apart
    "dv-smaller": replace(WIDE, head_dim_v=32),  # rows of dout, 1.75 KB apart, are read where they lie
    "dv-larger": replace(WIDE, head_dim=32, head_dim_v=72),  # rows of q are
    "too-many": replace(WIDE, heads_kv=1, seqlen_q=260, seqlen_k=130),  # to be kept
    "blocks": replace(WIDE, mask=lambda c, g: block_layout(c, g, 48)),
    "bias": replace(WIDE, bias=tensor_bias("h", "q", "k")),
    "dropout-sinks": replace(WIDE, dropout_p=0.3, sinks=True, softcap=3.0),
    "bfloat16": WIDE.with_dtype(torch.bfloat16),
    "bfloat16-causal": replace(WIDE, mask=CAUSAL).with_dtype(torch.bfloat16),
    "float64": WIDE.with_dtype(torch.float64),
    "packed": replace(WIDE, layout="bhld", **PACKED),
    "packed-causal": replace(WIDE, layout="bhld", mask=CAUSAL, **PACKED),
    "packed-bfloat16": replace(WIDE, layout="bhld", mask=CAUSAL, **PACKED).with_dtype(torch.bfloat16),
}


def inputs_of(name: str) -> Inputs:
    inputs = make_inputs(replace(CASES[name], name=f"side-by-side-{name}"))
    return replace(inputs, dout=lay_out(inputs.dout, inputs.case.layout))


@pytest.mark.parametrize("name", CASES)
def test_heads_side_by_side(name: str):
    inputs = inputs_of(name)
    check_case("cpu", inputs, oracle(inputs))


@pytest.mark.parametrize("name", ["dense", "causal", "own-keys", "too-many", "float64"])
def test_copies_change_no_bits(name: str):
    inputs = inputs_of(name)
    in_place = make_inputs(replace(inputs.case, layout="bhld"))
    got, want = run(fastattn, inputs, backend="cpu"), run(fastattn, in_place, backend="cpu")
    for result, value in want.items():
        assert torch.equal(got[result], value), result


@pytest.mark.parametrize("mask", [None, masks.causal()], ids=repr)
def test_gradients_of_a_summary(mask):
    """They come of the same kernel, with rows of dout that have no width."""
    case = replace(WIDE, layout="bhld").with_dtype(torch.float64)
    q, k = (make_inputs(case).leaves[name] for name in ("q", "k"))

    def gradients(layout: str, backend: str) -> tuple[torch.Tensor, ...]:
        leaves = [lay_out(x, layout).requires_grad_() for x in (q, k)]
        summary = summarize(*leaves, mask=mask, pool=5, backend=backend)
        losses = summary.entropy, summary.received, summary.distance, summary.pooled
        return torch.autograd.grad(sum(loss.square().sum() for loss in losses), leaves)

    got, want = gradients("blhd", "cpu"), gradients("bhld", "reference")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
