"""Dropout: the generator, which elements are kept, and that kernels and the definition keep the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton_support import needs_triton

import fastattn
from fastattn import masks
from fastattn.backends import cpu
from fastattn.philox import philox4x32
from fastattn.testing import dropout_mask, dropout_words

SEED = 0x0123456789ABCDEF
KNOWN = [((0, 0, 0), 0xB850222E), ((0, 0, 16), 0xC58CB04B), ((3, 5, 77), 0xDD66A65C)]
needs_native = pytest.mark.skipif(not cpu.available(), reason="the native core is not built")
BACKENDS = [
    pytest.param("cpu", marks=needs_native),
    pytest.param("triton", marks=needs_triton),
    "reference",
]


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64)


def test_philox_agrees_with_random123():
    """Three of the known-answer vectors that Random123 distributes for philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in vectors:
        got = philox4x32(seed_of(key), tuple(torch.tensor(c) for c in counter))
        assert tuple(got.tolist()) == words


@pytest.mark.parametrize(("where", "word"), KNOWN)
def test_known_words(where: tuple[int, int, int], word: int):
    bh, i, j = where
    assert int(dropout_words(seed_of(SEED), 2, 2, i + 1, j + 1)[bh // 2, bh % 2, i, j]) == word


@pytest.mark.parametrize(("where", "word"), KNOWN)
def test_known_words_of_the_native_core(where: tuple[int, int, int], word: int, native):
    assert native.philox(SEED, *where) == word


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 0x0123456789ABCDEF, 2**32, 2**31])
def test_native_generator_matches_the_definition(seed: int, native):
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(2**31, (50, 3), generator=generator)
    places[:10] %= 200
    for bh, i, j in places.tolist():
        counter = [torch.tensor(c) for c in (16 * (j // 64) + j % 16, i, bh, 0)]
        want = int(philox4x32(seed_of(seed), tuple(counter))[j // 16 % 4])
        assert native.philox(seed, bh, i, j) == want


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_of_kept_elements(p: float):
    """Within five standard deviations overall, and of each row, column and head."""
    keep = dropout_mask(7, 4, 4, 128, 256, p).double()
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
        count = keep.sum(dims)
        n = keep.numel() / count.numel()
        assert ((count - n * (1 - p)).abs() <= 5 * (n * p * (1 - p)) ** 0.5).all()


@pytest.mark.parametrize(
    "shift", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 16), (0, 0, 0, 64)]
)
def test_neighbours_are_independent(shift: tuple[int, ...]):
    signs = dropout_mask(11, 4, 4, 128, 256, 0.5).double() * 2 - 1
    products = signs * signs.roll(shift, dims=(0, 1, 2, 3))
    assert products.mean().abs() <= 5 / products.numel() ** 0.5


def test_other_seeds_keep_other_elements():
    base = dropout_mask(5, 1, 2, 64, 64, 0.5)
    for other in (6, 5 + 2**32, -5):
        agreement = (base == dropout_mask(other, 1, 2, 64, 64, 0.5)).double().mean()
        assert 0.45 < agreement < 0.55


def test_threshold_is_exact():
    words = dropout_words(seed_of(3), 1, 1, 8, 64)
    for p in (0.25, 1 / 3, 2**-20, 1 - 2**-20):
        assert torch.equal(dropout_mask(3, 1, 1, 8, 64, p), words >= int(p * 2**32))
    assert dropout_mask(3, 1, 1, 8, 64, 0.0).all()
    assert not dropout_mask(3, 1, 1, 8, 64, 1.0).any()


def weights(
    lq: int, lk: int, p: float, seed: int, backend: str, dtype=torch.float32, heads_kv: int = 2, **options
):
    """The dropped-out weights of uniform attention, and the same from dv: rows of the identity show them."""
    q = torch.zeros(2, 4, lq, 8, dtype=dtype)
    k = torch.zeros(2, heads_kv, lk, 8, dtype=dtype)
    v = torch.eye(lk, dtype=dtype).expand(2, heads_kv, lk, lk).clone().requires_grad_()
    out = fastattn.attention(q, k, v, dropout_p=p, dropout_seed=seed_of(seed), backend=backend, **options)
    return out, v


def elements() -> Iterator[Any]:
    """Shapes, dtypes and backends; large shapes take 10 s under Triton's interpreter: slow but for one."""
    shapes = [(1, 1), (3, 65), (70, 131), (65, 200)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for shape, dtype in itertools.product(shapes, dtypes):
        yield pytest.param(shape, dtype, "reference")
        yield pytest.param(shape, dtype, "cpu", marks=needs_native)
        if dtype != torch.float64:
            slow = shape[0] > 3 and (shape, dtype) != ((70, 131), torch.float32)
            marks = [needs_triton, pytest.mark.slow] if slow else needs_triton
            yield pytest.param(shape, dtype, "triton", marks=marks)


@pytest.mark.parametrize(("shape", "dtype", "backend"), elements(), ids=str)
def test_backends_keep_the_defined_elements(shape: tuple[int, int], dtype: torch.dtype, backend: str):
    lq, lk = shape
    for seed, p in ((SEED, 0.1), (-3, 0.5), (2**40, 0.97)):
        out, _ = weights(lq, lk, p, seed, backend, dtype)
        keep = dropout_mask(seed, 2, 4, lq, lk, p)
        assert torch.equal(out != 0, keep)
        factor = (
            1 / (1 - p) if dtype == torch.float64 else torch.tensor(1 / (1 - p), dtype=torch.float32).item()
        )
        expected = torch.full_like(out, factor / lk) * keep
        torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "generic"])
def test_each_isa_keeps_the_defined_elements(isa: str, use_isa):
    use_isa(isa)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for options in ({}, {"mask": masks.causal()}):
            out, _ = weights(70, 150, 0.3, SEED, "cpu", dtype, **options)
            keep = dropout_mask(SEED, 2, 4, 70, 150, 0.3)
            visible = torch.ones(70, 150, dtype=torch.bool).tril(150 - 70) if options else True
            assert torch.equal(out != 0, keep & visible)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads_kv", [1, 4])
def test_backward_drops_the_same_elements(heads_kv: int, backend: str):
    """dv_jd sums weight_ij dO_id over rows and the group's heads: a single row of dO shows that row's."""
    lq, lk, p = 67, 90, 0.4
    out, v = weights(lq, lk, p, SEED, backend, heads_kv=heads_kv)
    for i, h in ((0, 0), (66, 3), (31, 2)):
        dout = torch.zeros_like(out)
        dout[:, h, i] = 1
        (dv,) = torch.autograd.grad(out, v, dout, retain_graph=True)
        keep = dropout_mask(SEED, 2, 4, lq, lk, p)[:, h, i]
        assert torch.equal(dv[:, h * heads_kv // 4, :, 0] != 0, keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_varlen_counts_rows_and_columns_per_sequence(backend: str):
    heads, lens_q, lens_k = 3, (5, 66, 1), (70, 66, 130)
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k))
    widest = max(lens_k)
    q, k = torch.zeros(sum(lens_q), heads, 4), torch.zeros(sum(lens_k), heads, 4)
    v = torch.cat([torch.eye(n, widest) for n in lens_k])[:, None].expand(-1, heads, -1).contiguous()
    out = fastattn.varlen_attention(
        q, k, v, cu_q, cu_k, dropout_p=0.3, dropout_seed=seed_of(SEED), backend=backend
    )
    keep = dropout_mask(SEED, len(lens_q), heads, max(lens_q), widest, 0.3)
    for b, (lq, lk) in enumerate(zip(lens_q, lens_k, strict=True)):
        rows = out[cu_q[b] : cu_q[b + 1]].transpose(0, 1)
        assert torch.equal(rows[..., :lk] != 0, keep[b, :, :lq, :lk])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_counts_rows_and_columns_from_zero(backend: str):
    q, k = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 100, 8)
    v = torch.eye(100).expand(2, 2, 100, 100)
    lengths = torch.tensor([100, 37])
    out = fastattn.decode_attention(
        q, k, v, lengths, dropout_p=0.3, dropout_seed=seed_of(SEED), backend=backend
    )
    keep = dropout_mask(SEED, 2, 4, 3, 100, 0.3) & (torch.arange(100) < lengths.view(2, 1, 1, 1))
    assert torch.equal(out != 0, keep)


def qkv(requires_grad: bool = False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 40, 8, generator=generator).requires_grad_(requires_grad) for _ in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_does_not_change(backend: str):
    q, k, v = qkv()
    _, dropped = fastattn.attention(q, k, v, dropout_p=0.4, return_lse=True, backend=backend)
    _, plain = fastattn.attention(q, k, v, return_lse=True, backend=backend)
    assert torch.equal(dropped, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_p_zero_is_no_dropout_and_draws_nothing(backend: str):
    q, k, v = qkv()
    before = torch.get_rng_state()
    out = fastattn.attention(q, k, v, dropout_p=0.0, backend=backend)
    assert torch.equal(out, fastattn.attention(q, k, v, backend=backend))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("backend", BACKENDS)
def test_p_one_gives_zeros_and_draws_nothing(backend: str):
    q, k, v = qkv(requires_grad=True)
    before = torch.get_rng_state()
    out, lse = fastattn.attention(q, k, v, dropout_p=1.0, return_lse=True, backend=backend)
    assert torch.equal(before, torch.get_rng_state())
    assert out.count_nonzero() == 0
    assert torch.equal(lse, fastattn.attention(q, k, v, return_lse=True, backend=backend)[1])
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.count_nonzero() == 0


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_the_seed_comes_from_torchs_generator(backend: str | None):
    q, k, v = qkv()

    def call() -> torch.Tensor:
        return fastattn.attention(q, k, v, dropout_p=0.5, backend=backend)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)


def test_a_given_seed_draws_nothing():
    q, k, v = qkv()
    before = torch.get_rng_state()
    fastattn.attention(q, k, v, dropout_p=0.5, dropout_seed=seed_of(1))
    assert torch.equal(before, torch.get_rng_state())


def test_the_mean_over_seeds_is_the_output_without_dropout():
    q, k, v = qkv()
    outs = torch.stack(
        [fastattn.attention(q, k, v, dropout_p=0.3, dropout_seed=seed_of(s)) for s in range(400)]
    )
    plain = fastattn.attention(q, k, v)
    error = (outs.mean(0) - plain).abs() / (outs.std(0) / 400**0.5)
    assert error.max() < 6
