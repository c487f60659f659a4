"""decode_attention: contiguous and paged caches against attention over each entry's valid keys."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from call_support import EXACT, NATIVE, grads, qkv, randn

import fastattn
from fastattn.biases import ALiBi, RelativePosition
from fastattn.masks import causal, padding, prefix, window

CAPACITY = 24
OPTIONS = {
    "plain": {},
    "causal": {"mask": causal()},
    "window": {"mask": window(3, 0)},
    "scores": {"scale": 0.9, "softcap": 2.0, "sinks": randn(4)},
    "alibi": {"bias": ALiBi(randn(4))},
    "relative": {"bias": RelativePosition(randn(8, 4)), "mask": causal()},
    "prefix": {"mask": causal() | prefix([2])},
}


def cache(seqlen_q, grad=False, lengths=(CAPACITY, 7, 5)):
    q, k, v = qkv(3, 4, 2, seqlen_q, CAPACITY, 8, 6, grad=grad)
    return q, k, v, torch.tensor(lengths)


def loop(q, k, v, lengths, **options):
    """Each entry by itself through the dense call."""
    outs, lses = [], []
    for b, length in enumerate(lengths.tolist()):
        one = q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length]
        out, lse = fastattn.attention(*one, return_lse=True, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def paged(k, v, page, seed=0):
    """The same keys and values scattered over pages, with the table that finds them."""
    batch, heads, capacity, _ = k.shape
    used = capacity // page
    pages = batch * used + 2
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(pages, generator=generator)[: batch * used].view(batch, used).to(torch.int32)
    caches = []
    for tensor in (k, v):
        scattered = torch.full((pages, heads, page, tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        scattered[table.flatten().long()] = tensor.unflatten(2, (used, page)).transpose(1, 2).flatten(0, 1)
        caches.append(scattered)
    return *caches, table


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("backend", ["cpu", "reference"] if NATIVE else ["reference"])
def test_contiguous(seqlen_q, options, backend):
    q, k, v, lengths = cache(seqlen_q)
    got = fastattn.decode_attention(q, k, v, lengths, return_lse=True, backend=backend, **options)
    want = loop(q, k, v, lengths, **options)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("page", [1, 4, 8])
def test_paged(seqlen_q, options, page):
    q, k, v, lengths = cache(seqlen_q)
    k_pages, v_pages, table = paged(k, v, page)
    got = fastattn.decode_attention(
        q, k_pages, v_pages, lengths, block_table=table, return_lse=True, **options
    )
    torch.testing.assert_close(got, loop(q, k, v, lengths, **options), **EXACT)


def test_entries_beyond_a_length_are_never_read():
    q, k, v, lengths = cache(2)
    want = fastattn.decode_attention(q, k, v, lengths)
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.inf
    torch.testing.assert_close(fastattn.decode_attention(q, k, v, lengths), want, rtol=0, atol=0)
    k_pages, v_pages, table = paged(k, v, 4)
    table[1, 2:], table[2, 2:] = -7, 10**6
    got = fastattn.decode_attention(q, k_pages, v_pages, lengths, block_table=table)
    torch.testing.assert_close(got, want, **EXACT)


def test_no_mask_is_implied():
    q, k, v, lengths = cache(3)
    got = fastattn.decode_attention(q, k, v, lengths)
    rows = [fastattn.decode_attention(q[:, :, n : n + 1], k, v, lengths) for n in range(3)]
    torch.testing.assert_close(got, torch.cat(rows, 2), **EXACT)
    masked = fastattn.decode_attention(q, k, v, lengths, mask=causal())
    rows = [fastattn.decode_attention(q[:, :, n : n + 1], k, v, lengths - 2 + n) for n in range(3)]
    torch.testing.assert_close(masked, torch.cat(rows, 2), **EXACT)


def test_lengths_of_zero_and_below_the_queries():
    q, k, v, lengths = cache(4, lengths=(0, 2, CAPACITY))
    out, lse = fastattn.decode_attention(q, k, v, lengths, mask=causal(), return_lse=True)
    assert out[0].count_nonzero() == 0
    assert (lse[0] == -torch.inf).all()
    torch.testing.assert_close((out, lse), loop(q, k, v, lengths, mask=causal()), **EXACT)


@pytest.mark.parametrize("name", ["bool", "bias", "padding", "dropout"])
def test_options_of_the_whole_capacity(name):
    q, k, v, lengths = cache(4)
    options = {
        "bool": {"mask": randn(3, 1, 4, CAPACITY) > -1},
        "bias": {"bias": randn(4, 1, CAPACITY)},
        "padding": {"mask": padding([20, 9, 3], [2, 0, 1])},
        "dropout": {"dropout_p": 0.5, "dropout_seed": torch.tensor([3])},
    }[name]
    want = fastattn.decode_attention(q, k, v, lengths, return_lse=True, backend="reference", **options)
    got = fastattn.decode_attention(q, k, v, lengths, return_lse=True, **options)
    torch.testing.assert_close(got, want, **EXACT)
    k_pages, v_pages, table = paged(k, v, 8)
    got = fastattn.decode_attention(
        q, k_pages, v_pages, lengths, block_table=table, return_lse=True, **options
    )
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_of_contiguous_caches(options):
    q, k, v, lengths = cache(4, grad=True)

    def call(q, k, v, backend=None):
        return fastattn.decode_attention(q, k, v, lengths, return_lse=True, backend=backend, **options)

    got, got_grads = grads(call, [q, k, v])
    want, want_grads = grads(lambda *t: call(*t, backend="reference"), [q, k, v])
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    for grad in got_grads[1:]:
        assert grad[1, :, 7:].count_nonzero() == 0


def test_gradients_of_pages_run_on_the_reference():
    q, k, v, lengths = cache(2)
    k_pages, v_pages, table = paged(k, v, 8)
    k_pages = k_pages.nan_to_num().requires_grad_()
    choice = fastattn.explain(q, k_pages, v_pages.nan_to_num(), lengths=lengths, block_table=table)
    assert choice.backend == "reference"
    out = fastattn.decode_attention(
        q, k_pages, v_pages.nan_to_num(), lengths, block_table=table, backend="reference"
    )
    assert torch.autograd.grad(out.sum(), k_pages)[0].shape == k_pages.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_dtypes(dtype, kind):
    q, k, v, lengths = cache(1)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out, lse = fastattn.decode_attention(q, k, v, lengths.to(kind), return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    want = loop(q.double(), k.double(), v.double(), lengths)
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=2e-2)


def test_a_long_cache():
    q, k, v = qkv(2, 8, 2, 1, 3000, 16)
    lengths = torch.tensor([3000, 1234])
    torch.testing.assert_close(
        fastattn.decode_attention(q, k, v, lengths), loop(q, k, v, lengths)[0], **EXACT
    )


THREADS_STARTED = """
import os, torch, fastattn
torch.set_num_threads(1)  # making tensors starts none
length, page = 16384, 16
cache = torch.zeros(length // page, 8, page, 64)
table = torch.arange(length // page, dtype=torch.int32)[None]
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
for keys in (page, length):
    fastattn.decode_attention(torch.zeros(1, 8, 1, 64), cache, cache, torch.tensor([keys]), block_table=table)
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_threads_are_as_many_as_a_paged_cache_is_long_for():
    """However short its pages are: none for one page, and another for 16384 keys."""
    command = [sys.executable, "-c", THREADS_STARTED]
    done = subprocess.run(command, timeout=200, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "1"], done.stderr
