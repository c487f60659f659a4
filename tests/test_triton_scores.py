"""Scores other than scale q·k on the Triton kernels: additive, and kernels of the distance."""

from __future__ import annotations

import math

import pytest
import torch
from score_support import call_definition, call_kernels, expected, leaves_of, results
from triton_support import needs_triton

import fastattn
from fastattn import masks
from fastattn.spec import SCORES
from fastattn.testing import check_all
from fastattn.testing.inputs import poisoned_memory

pytestmark = needs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = SCORES[1:]
BOOL = torch.rand(2, 1, 21, 35, generator=torch.Generator().manual_seed(3)) < 0.6
BOOL[:, :, ::7] = False
MASKS = {
    "causal": masks.causal(),
    "window": masks.window(9, 4, align="top_left") & masks.padding([35, 12]),
    "per query": masks.padding(torch.arange(42).view(2, 21) % 36, torch.arange(21).view(1, 21) // 2),
    "bool": BOOL,
    "documents": masks.documents(torch.arange(21)[None] // 8, torch.arange(35)[None] // 10) | masks.prefix(3),
}


def on_triton(score, leaves, **options):
    return call_kernels(score, leaves, backend="triton", **options)


def check(score: str, leaves: list[torch.Tensor], **options) -> None:
    exact, native = expected(score, leaves, **options)
    with poisoned_memory():
        got = results(on_triton, score, leaves, **options)
    check_all(got, exact, native, leaves[0].dtype)


# (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 7, 13, 5, 3), (1, 1, 1, 19, 37, 40, 20)], ids=str
)
@pytest.mark.parametrize("score", PAIRS)
def test_shapes(score, shape):
    check(score, leaves_of(score, shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    check("additive", leaves_of("additive", (1, 2, 1, 17, 33, 20, 8), dtype))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask):
    check("additive", leaves_of("additive", (2, 2, 1, 21, 35, 6, 4)), mask=mask)
