"""Random calls against the reference, made smaller by hypothesis where they fail."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fastattn
from fastattn import masks
from fastattn.backends import cpu
from fastattn.testing import Case, check_all, make_inputs, oracle, run
from fastattn.testing.case import BiasCase
from fastattn.testing.cases import alibi, always, random_mask, relative, tensor_bias
from fastattn.testing.inputs import poisoned_memory
from fastattn.testing.magnitudes import magnitudes

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native core fastattn._C is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIGNS = st.sampled_from(("bottom_right", "top_left"))
DIMENSIONS = st.sampled_from(("b", "h", "q", "k"))


@st.composite
def analytic_masks(draw: st.DrawFn, lq: int, lk: int) -> Any:
    kind = draw(st.sampled_from(("causal", "window", "prefix", "global", "predicate")))
    if kind == "causal":
        return masks.causal(align=draw(ALIGNS))
    if kind == "window":
        side = st.one_of(st.none(), st.integers(0, 40))
        return masks.window(draw(side), draw(side), align=draw(ALIGNS))
    if kind == "prefix":
        return masks.prefix(torch.tensor([draw(st.integers(0, lk))]))
    if kind == "global":
        positions = draw(st.lists(st.integers(0, max(min(lq, lk) - 1, 0)), max_size=3, unique=True))
        return masks.global_tokens(torch.tensor(positions, dtype=torch.int64))
    modulus = draw(st.integers(2, 5))
    return masks.predicate(lambda b, h, i, j: (i + 2 * j + h) % modulus != 0)


@st.composite
def mask_algebra(draw: st.DrawFn, lq: int, lk: int) -> Any:
    """A Mask of up to four constructors under &, | and ~."""
    mask = draw(analytic_masks(lq, lk))
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.sampled_from("&|~"))
        if step == "~":
            mask = ~mask
        else:
            other = draw(analytic_masks(lq, lk))
            mask = mask & other if step == "&" else mask | other
    return mask


def biases(lengths_agree: bool) -> st.SearchStrategy[BiasCase | None]:
    tensors = st.builds(
        lambda dims, holes: tensor_bias(*dims, holes=holes),
        st.sets(DIMENSIONS),
        st.sampled_from((0.0, 0.2, 1.0)),
    )
    objects = [st.builds(alibi), st.builds(relative, max_distance=st.integers(5, 60))]
    return st.one_of(st.none(), *objects, *([tensors] if lengths_agree else []))


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "scale": draw(st.one_of(st.none(), st.floats(-2, 2))),
        "softcap": draw(st.one_of(st.none(), st.floats(0.1, 20))),
        "sinks": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 0.9))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "head_dim": draw(st.integers(1, 70)),
        "head_dim_v": draw(st.one_of(st.none(), st.integers(1, 70))),
    }


@st.composite
def dense_cases(draw: st.DrawFn) -> Case:
    heads_kv = draw(st.integers(1, 3))
    lq, lk = draw(st.integers(0, 150)), draw(st.integers(0, 150))
    dims = draw(st.sets(DIMENSIONS))
    mask = draw(
        st.one_of(
            st.none(),
            mask_algebra(lq, lk).map(always),
            st.just(random_mask(*dims, p=draw(st.sampled_from((0.05, 0.5, 0.95))))),
        )
    )
    return Case(
        f"random-{draw(st.integers(0, 10**6))}",
        batch=draw(st.integers(0, 3)),
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        seqlen_q=lq,
        seqlen_k=lk,
        mask=mask,
        bias=draw(biases(True)),
        layout=draw(st.sampled_from(("bhld", "blhd", "sliced", "padded_rows", "expanded_kv"))),
        **draw(options()),
    )


@st.composite
def varlen_cases(draw: st.DrawFn) -> Case:
    heads_kv, count = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    lengths = st.lists(st.integers(0, 90), min_size=count, max_size=count).map(tuple)
    lengths_q, lengths_k = draw(lengths), draw(lengths)
    mask = st.one_of(st.none(), mask_algebra(max(lengths_q), max(lengths_k)).map(always))
    return Case(
        f"random-varlen-{draw(st.integers(0, 10**6))}",
        op="varlen",
        batch=count,
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        mask=draw(mask),
        bias=draw(biases(False)),
        **draw(options()),
    )


@st.composite
def decode_cases(draw: st.DrawFn) -> Case:
    heads_kv, count = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    capacity, lq = draw(st.integers(1, 300)), draw(st.integers(1, 5))
    lengths = st.lists(st.integers(0, capacity), min_size=count, max_size=count).map(tuple)
    return Case(
        f"random-decode-{draw(st.integers(0, 10**6))}",
        op="decode",
        batch=count,
        heads=heads_kv * draw(st.integers(1, 4)),
        heads_kv=heads_kv,
        seqlen_q=lq,
        seqlen_k=capacity,
        lengths_k=draw(lengths),
        page_size=draw(st.one_of(st.none(), st.integers(1, 40))),
        mask=draw(st.one_of(st.none(), mask_algebra(lq, capacity).map(always))),
        bias=draw(biases(False)),
        grads=False,
        **draw(options()),
    )


def agrees(case: Case) -> None:
    inputs = make_inputs(case)
    expected = oracle(inputs)
    with poisoned_memory():
        got = run(fastattn, inputs, backend="cpu")
    check_all(got, expected.ref64, expected.native, case.dtype, magnitudes(inputs, expected.ref64))


# The same examples every time: a failure on one machine is a failure on the next. `make test-all` draws more.
FEW = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
MANY = settings(FEW, max_examples=2000, derandomize=False)


@given(dense_cases())
@FEW
def test_attention(case: Case):
    agrees(case)


@given(varlen_cases())
@FEW
def test_varlen(case: Case):
    agrees(case)


@given(decode_cases())
@FEW
def test_decode(case: Case):
    agrees(case)


@pytest.mark.slow
@given(st.one_of(dense_cases(), varlen_cases(), decode_cases()))
@MANY
def test_many(case: Case):
    agrees(case)
