"""Summaries on the Triton kernels, beside their definition in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from summary_support import BY_NAME, arguments, compare, gradients, oracle
from triton_support import needs_triton

from fastattn import masks
from fastattn.inspect import summarize
from fastattn.inspect.summary import AttentionSummary
from fastattn.testing import Case
from fastattn.testing.inputs import poisoned_memory
from fastattn.weight_statistics import Wanted

pytestmark = needs_triton


def results(inputs, wanted: Wanted) -> dict[str, torch.Tensor]:
    q, k, options = arguments(inputs)
    pool = None if 0 in wanted.pool else wanted.pool
    options |= {"top_k": wanted.top_k, "pool": pool, "pool_mode": wanted.pool_mode}
    return {"pooled": q.new_empty(0)} | summarize(q, k, backend="triton", **options).tensors()


def small(name: str, grads: bool = True, **changes) -> Case:
    """A case of the list, with fewer pairs, for the interpreter."""
    case = BY_NAME[name]
    sizes = {"seqlen_q": min(case.queries, 40), "seqlen_k": min(case.keys, 70), "batch": min(case.batch, 2)}
    return replace(case, name=f"{name}-small", grads=grads, **(sizes | changes))


def check(case: Case, wanted: Wanted) -> None:
    expected = oracle(case, wanted)
    with poisoned_memory():
        inputs = expected.inputs.requiring_grad() if case.grads else expected.inputs
        got = results(inputs, wanted)
        found = gradients(got, inputs) if case.grads else {}
    compare({name: tensor.detach() for name, tensor in (got | found).items()}, expected)


CASES = [
    (small("one"), Wanted(3, (1, 1))),
    (small("primes", heads=1), Wanted(3, (5, 7))),
    (small("gqa", batch=1, heads=2, heads_kv=1), Wanted(1, (3, 70), "sum")),
    (small("causal-long-k", batch=1, seqlen_q=66, seqlen_k=130), Wanted(5, (2, 130), "sum")),
    (small("mask-padding-per-query", heads=1), Wanted(20, (2, 9))),
    (small("mask-documents-causal", heads=1, batch=1, seqlen_q=70, seqlen_k=70), Wanted(20, (3, 5))),
    (small("bool-rows", batch=1), Wanted(2)),
    (small("sinks-causal-softcap", batch=1), Wanted(4, (2, 3))),
    (small("bias-holes", batch=1, grads=False), Wanted(4, (4, 3), "max")),
    (small("alibi-rows", batch=1, grads=False), Wanted(2, (7, 2))),
    (small("primes", batch=1, heads=1, dtype=torch.bfloat16), Wanted(2, (5, 3))),
]


@pytest.mark.parametrize(("case", "wanted"), CASES, ids=[case.name for case, _ in CASES])
def test_cases(case, wanted):
    check(case, wanted)


@pytest.mark.slow
def test_many_links():
    """Long lists take fewer rows at a time."""
    check(small("primes", dtype=torch.float16), Wanted(100, (40, 70)))


@pytest.mark.slow
def test_block_masks_in_smaller_tiles():
    check(small("mask-documents-causal", seqlen_q=90, seqlen_k=110, heads=1, head_dim=80), Wanted(2, (3, 5)))


def test_a_given_lse_changes_nothing():
    q = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    alone = summarize(q, q, top_k=2, backend="triton")
    given = summarize(q, q, top_k=2, lse=alone.lse, backend="triton")
    for name, tensor in alone.tensors().items():
        assert torch.equal(tensor, given.tensors()[name]), name


def test_rows_that_see_nothing():
    q = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([True, False, True])[:, None].expand(3, 4)
    summary = summarize(q, torch.randn(1, 1, 4, 4), mask=mask, top_k=2, pool=2, backend="triton")
    for name in ("entropy", "distance", "max_weight", "topk_weights"):
        assert (getattr(summary, name)[:, :, 1] == 0).all(), name
    assert (summary.max_index[:, :, 1] == -1).all() and (summary.topk_indices[:, :, 1] == -1).all()
    assert (summary.lse[:, :, 1] == -math.inf).all()
    (gradient,) = torch.autograd.grad(summary.entropy.sum() + summary.received.square().sum(), q)
    assert (gradient[:, :, 1] == 0).all() and gradient.isfinite().all()


def poisoned() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and a mask under which the first two queries do not see key 3, which is NaN."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 6, 4, generator=generator), torch.randn(1, 1, 9, 4, generator=generator)
    k[0, 0, 3, 1] = math.nan
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[:2, 3] = False
    return q.requires_grad_(), k, mask


def summary_of(q, k, mask, mode: str) -> AttentionSummary:
    return summarize(q, k, mask=mask, top_k=2, pool=(6, 9), pool_mode=mode, backend="triton")


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_a_nan_reaches_what_sees_it(mode):
    q, k, mask = poisoned()
    summary, clean = summary_of(q, k, mask, mode), summary_of(q, k.nan_to_num(0.0), mask, mode)
    for name in ("entropy", "distance", "lse", "max_weight", "topk_weights", "max_index", "topk_indices"):
        got, want = (getattr(x, name).detach()[0, 0] for x in (summary, clean))
        assert torch.equal(got[:2], want[:2]), name
        assert (got[2:] == -1).all() if name.startswith(("max_i", "topk_i")) else got[2:].isnan().all(), name
    cells = summary.pooled.detach()[0, 0]
    assert torch.equal(cells[:2], clean.pooled.detach()[0, 0, :2]) and cells[2:].isnan().all()
    (gradient,) = torch.autograd.grad(summary.entropy[0, 0, :2].sum(), q)
    assert gradient[0, 0, :2].isfinite().all()


def test_what_it_refuses():
    q = torch.zeros(1, 1, 2, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="summaries have no gradients of a bias"):
        summarize(q, q, bias=torch.zeros(2, 2), backend="triton")
    with pytest.raises(NotImplementedError, match="it has no float64"):
        summarize(q.double(), q.double(), mask=masks.causal(), backend="triton")


def test_routes_agree():
    """Compiled, and by vmap of func.grad, the same numbers as directly."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 1, 5, 4, generator=generator)
    sinks = torch.zeros(1)

    def loss(q: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        return summarize(q, q, sinks=sinks, mask=masks.causal(), backend="triton").entropy.square().sum()

    want = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(q, sinks)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in range(2):
        leaves = q[n].clone().requires_grad_(), sinks.clone().requires_grad_()
        for function in (loss, compiled):
            got = torch.autograd.grad(function(*leaves), leaves)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b[n])
