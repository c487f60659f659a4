"""varlen_attention against a loop over its sequences."""

from __future__ import annotations

import pytest
import torch
from call_support import EXACT, NATIVE, grads, randn

import fastattn
from fastattn.biases import ALiBi, RelativePosition
from fastattn.masks import MaskShape, causal, documents, global_tokens, padding, prefix, window

LENGTHS = {
    "equal": ([4, 4, 4], [4, 4, 4]),
    "mixed": ([3, 1, 0, 70, 5], [6, 1, 4, 131, 0]),
    "one": ([9], [7]),
    "longer queries": ([9, 70], [2, 65]),
    "empty": ([0, 0], [3, 0]),
}
OPTIONS = {
    "plain": {},
    "causal": {"mask": causal()},
    "top left": {"mask": causal(align="top_left")},
    "window": {"mask": window(2, 1)},
    "scores": {"scale": -0.4, "softcap": 1.5},
    "sinks": {"sinks": randn(4)},
    "prefix": {"mask": causal() | prefix([2])},
    "global": {"mask": window(3, 0) | global_tokens([0])},
    "not": {"mask": ~causal()},
    "alibi": {"bias": ALiBi(randn(4))},
    "alibi top left": {"bias": ALiBi(randn(4), align="top_left"), "mask": causal()},
    "relative": {"bias": RelativePosition(randn(8, 4))},
}


def packed(lengths_q, lengths_k, grad=False):
    cu_q, cu_k = (
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    tensors = (
        randn(total_q, 4, 8, grad=grad),
        randn(total_k, 2, 8, seed=2, grad=grad),
        randn(total_k, 2, 6, seed=3, grad=grad),
    )
    return [*tensors], cu_q, cu_k


def loop(q, k, v, cu_q, cu_k, **options):
    """Each sequence by itself through the dense call."""
    outs, lses = [q.new_zeros(0, 4, v.shape[-1])], [q.new_zeros(4, 0)]
    for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        one = (t.transpose(0, 1)[None] for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out, lse = fastattn.attention(*one, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("backend", ["cpu", "reference"] if NATIVE else ["reference"])
def test_a_loop_over_the_sequences(lengths, options, backend):
    inputs, cu_q, cu_k = packed(*lengths, grad=True)
    options = {**options, "backend": backend}

    def call(q, k, v):
        return fastattn.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **options)

    got, got_grads = grads(call, inputs)
    want, want_grads = grads(lambda q, k, v: loop(q, k, v, cu_q, cu_k, **options), inputs)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("name", ["padding", "documents", "dropout", "alibi of the batch"])
def test_what_depends_on_the_sequence(name):
    inputs, cu_q, cu_k = packed([3, 5, 2], [6, 5, 4], grad=True)
    options = {
        "padding": {"mask": padding([4, 0, 3]) & causal()},
        "documents": {"mask": documents(torch.arange(15).view(3, 5) % 2, torch.arange(18).view(3, 6) % 2)},
        "dropout": {"dropout_p": 0.5, "dropout_seed": torch.tensor([4])},
        "alibi of the batch": {"bias": ALiBi(randn(3, 4))},
    }[name]

    def call(q, k, v, backend=None):
        return fastattn.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, backend=backend, **options)

    got, got_grads = grads(call, inputs)
    want, want_grads = grads(lambda *t: call(*t, backend="reference"), inputs)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_gradients_of_slopes_table_and_sinks():
    (q, k, v), cu_q, cu_k = packed([3, 5, 2], [6, 5, 4])
    learned = [randn(4, grad=True), randn(8, 4, grad=True), randn(4, seed=5, grad=True)]

    def call(slopes, table, sinks, backend=None):
        first = fastattn.varlen_attention(
            q, k, v, cu_q, cu_k, bias=ALiBi(slopes), sinks=sinks, backend=backend
        )
        second = fastattn.varlen_attention(q, k, v, cu_q, cu_k, bias=RelativePosition(table), backend=backend)
        return first, second

    got = grads(call, learned)[1]
    want = grads(lambda *t: call(*t, backend="reference"), learned)[1]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("grad", [False, True])
def test_no_sequences_at_all(grad):
    inputs, cu_q, cu_k = packed([], [], grad=grad)
    out, lse = fastattn.varlen_attention(*inputs, cu_q[:1], cu_k[:1], mask=causal(), return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 6), (4, 0))
    if grad:
        assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [t.shape for t in inputs]


@pytest.mark.parametrize("grad", [False, True])
def test_given_maxima_may_be_larger(grad):
    inputs, cu_q, cu_k = packed([3, 5, 2], [6, 5, 4], grad=grad)
    want = fastattn.varlen_attention(*inputs, cu_q, cu_k, mask=causal() | prefix([2]))
    got = fastattn.varlen_attention(
        *inputs, cu_q, cu_k, max_seqlen_q=150, max_seqlen_k=70, mask=causal() | prefix([2])
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_strided_tokens():
    (q, k, v), cu_q, cu_k = packed([3, 5, 2], [3, 5, 2])
    want = fastattn.varlen_attention(q, k, v, cu_q, cu_k, mask=causal())
    joined = torch.cat([q, k, k, v.repeat(1, 1, 2)[..., :8]], 1)
    views = joined.split([4, 2, 2, 2], 1)
    got = fastattn.varlen_attention(views[0], views[1], views[3][..., :6], cu_q, cu_k, mask=causal())
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    by_head = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    got = fastattn.varlen_attention(*by_head, cu_q, cu_k, mask=causal())
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    (q, k, v), cu_q, cu_k = packed([3, 70, 2], [6, 70, 4])
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out, lse = fastattn.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert lse.shape == (4, 75)
    want = fastattn.varlen_attention(q.double(), k.double(), v.double(), cu_q, cu_k, backend="reference")
    torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("declared", [1 << 20, 10**10])
@pytest.mark.parametrize("options", [{}, {"bias": ALiBi(randn(4))}], ids=["mask", "bias"])
def test_declared_maxima_cost_nothing(declared, options):
    inputs, cu_q, cu_k = packed([20, 44], [20, 44])
    options = {"mask": causal() | prefix(1), **options}
    want = fastattn.varlen_attention(*inputs, cu_q, cu_k, **options)
    # Lists of as many tiles, or a bias of as many diagonals, would not fit into memory.
    got = fastattn.varlen_attention(
        *inputs, cu_q, cu_k, max_seqlen_q=declared, max_seqlen_k=declared, **options
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_masks_of_the_declared_length():
    inputs, cu_q, cu_k = packed([3, 5, 2], [6, 5, 4])
    q_ids, k_ids = torch.arange(9 * 3).view(3, 9) % 2, torch.arange(200 * 3).view(3, 200) % 2
    want = fastattn.varlen_attention(
        *inputs, cu_q, cu_k, mask=documents(q_ids[:, :5], k_ids[:, :6]) | prefix(1)
    )
    got = fastattn.varlen_attention(
        *inputs, cu_q, cu_k, max_seqlen_q=9, max_seqlen_k=200, mask=documents(q_ids, k_ids) | prefix(1)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_block_lists_of_declared_lengths_end_in_empty_rows():
    lengths = torch.tensor([70, 3])
    exact = (causal() | prefix(1)).lower(MaskShape(2, 1, 70, 70, lengths, lengths)).block
    got = (causal() | prefix(1)).lower(MaskShape(2, 1, 1000, 300, lengths, lengths)).block
    assert (got.row_ptr.shape, got.col_ptr.shape) == ((2, 1, 17), (2, 1, 6))
    assert torch.equal(got.to_dense()[:, :, :70, :70], exact.to_dense())
    for pointers in (got.row_ptr, got.col_ptr):
        assert (pointers[..., 2:] == pointers[..., 2:3]).all()


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.parametrize("empty", ["first", "last"])
def test_a_sequence_without_keys_beside_one_that_fills_a_wave(empty, use_threads):
    """The backward pass takes sequences in waves, of which one may have no keys at all."""
    lengths = [(5, 0), (2100, 2304)][:: 1 if empty == "first" else -1]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths, strict=True))
    q, k, v = (randn(n, 1, 128).requires_grad_() for n in (2105, 2304, 2304))
    use_threads(1)
    out = fastattn.varlen_attention(q, k, v, cu_q, cu_k)
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    at = slice(5, None) if empty == "first" else slice(2100)
    alone = [t.detach()[None].transpose(1, 2).requires_grad_() for t in (q[at], k, v)]
    want = torch.autograd.grad(fastattn.attention(*alone).square().sum(), alone)
    assert torch.equal(got[0][at], want[0][0].transpose(0, 1))
    assert torch.equal(got[1], want[1][0].transpose(0, 1)) and torch.equal(got[2], want[2][0].transpose(0, 1))
