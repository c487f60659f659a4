"""Gradients against finite differences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from fastattn import masks, reference
from fastattn.backends import cpu
from fastattn.biases import ALiBi, RelativePosition

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason="the native core is not built")),
    "reference",
]


def rand(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def qkv(batch: int = 1, heads: int = 2, heads_kv: int = 1, lq: int = 3, lk: int = 4) -> list[torch.Tensor]:
    return [
        rand(batch, heads, lq, 3, seed=1),
        rand(batch, heads_kv, lk, 3, seed=2),
        rand(batch, heads_kv, lk, 2, seed=3),
    ]


SEED = torch.tensor([17])
HIDDEN_ROW = torch.tensor([[True, True, False, True], [False] * 4, [True, False, False, True]])
PLAIN: dict[str, dict[str, Any]] = {
    "dense": {},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 0.9, "scale": 1.3},
    "causal": {"mask": masks.causal()},
    "empty-row": {"mask": HIDDEN_ROW},
    "block": {"mask": masks.causal() | masks.global_tokens(torch.tensor([2]))},
    "dropout": {"dropout_p": 0.4, "dropout_seed": SEED},
    "together": {"mask": HIDDEN_ROW, "softcap": 1.5, "dropout_p": 0.3, "dropout_seed": SEED},
}


def finite(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both results; -inf, which has no finite difference, becomes 0."""
    return out, lse.masked_fill(lse.isinf(), 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_q_k_v(kind: str, backend: str):
    def call(q, k, v):
        return finite(*fastattn.attention(q, k, v, **PLAIN[kind], return_lse=True, backend=backend))

    assert gradcheck(call, qkv())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 4), (1, 1, 3, 4), (2, 1, 4), (3, 4), (1, 1, 1, 4), (3, 1), (1,)], ids=str
)
def test_tensor_bias(shape: tuple[int, ...], backend: str):
    def call(q, k, v, bias):
        return finite(*fastattn.attention(q, k, v, bias=bias, return_lse=True, backend=backend))

    assert gradcheck(call, [*qkv(), rand(*shape, seed=4)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, PLAIN["together"]], ids=["plain", "together"])
def test_sinks(options: dict[str, Any], backend: str):
    def call(q, k, v, sinks):
        return fastattn.attention(q, k, v, sinks=sinks, **options, return_lse=True, backend=backend)

    assert gradcheck(call, [*qkv(), rand(2, seed=5)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("options", [{}, PLAIN["together"]], ids=["plain", "together"])
def test_alibi_slopes(options: dict[str, Any], align: str, backend: str):
    def call(q, k, v, slopes):
        bias = ALiBi(slopes, align=align)
        return finite(*fastattn.attention(q, k, v, bias=bias, **options, return_lse=True, backend=backend))

    assert gradcheck(call, [*qkv(), rand(2, seed=6)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi_slopes_per_batch(backend: str):
    def call(q, k, v, slopes):
        return fastattn.attention(q, k, v, bias=ALiBi(slopes), return_lse=True, backend=backend)

    assert gradcheck(call, [*qkv(batch=2, heads=1, lq=2, lk=3), rand(2, 1, seed=6)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_table(bidirectional: bool, backend: str):
    def call(q, k, v, table):
        bias = RelativePosition(table, bidirectional=bidirectional, max_distance=4)
        return fastattn.attention(q, k, v, bias=bias, return_lse=True, backend=backend)

    assert gradcheck(call, [*qkv(), rand(4, 2, seed=7)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_varlen(backend: str):
    cu_q, cu_k = torch.tensor([0, 2, 2, 5]).int(), torch.tensor([0, 3, 4, 6]).int()
    slopes = rand(2, seed=6)

    def call(q, k, v, slopes):
        out, lse = fastattn.varlen_attention(
            q, k, v, cu_q, cu_k, mask=masks.causal(), bias=ALiBi(slopes), return_lse=True, backend=backend
        )
        return finite(out, lse)

    q, k, v = rand(5, 2, 3, seed=1), rand(6, 1, 3, seed=2), rand(6, 1, 2, seed=3)
    assert gradcheck(call, (q, k, v, slopes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_contiguous_cache(backend: str):
    q, k, v = qkv(batch=2, lk=5)
    lengths = torch.tensor([5, 3])

    def call(q, k, v):
        return fastattn.decode_attention(q, k, v, lengths, return_lse=True, backend=backend)

    assert gradcheck(call, (q, k, v))


@pytest.mark.parametrize("kind", ["block", "empty-row", "together"])
def test_the_reference_has_second_derivatives_and_forward_mode(kind: str):
    def call(q, k, v, sinks):
        return reference.attention(q, k, v, sinks=sinks, **PLAIN[kind])

    inputs = [*qkv(heads=1), rand(1, seed=5)]
    assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, inputs)
