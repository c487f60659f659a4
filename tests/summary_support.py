"""What the tests of summaries share: a case's summary and gradients, its oracle, and their comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from call_support import NATIVE, qkv
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.inspect import summarize
from fastattn.inspect.definition import statistics
from fastattn.masks import MaskShape
from fastattn.spec import accumulate_dtype
from fastattn.testing import CASES, Case, check, make_inputs
from fastattn.testing.inputs import Inputs
from fastattn.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, max_error
from fastattn.weight_statistics import Wanted

# Dense calls, which are all that summarize takes; it knows no dropout.
SUMMARY_CASES = tuple(case for case in CASES if case.op == "attention" and not case.dropout_p)
BY_NAME = {case.name: case for case in SUMMARY_CASES}
LOSSES = ("entropy", "received", "distance", "lse", "pooled")  # those that gradients reach
SINGLE = ("max_weight", "topk_weights")
INDICES = ("max_index", "topk_indices")

BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(not NATIVE, reason="no native core")), "reference"]

Named = dict[str, Tensor]


def qk(*shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    """q and k of `call_support.qkv`."""
    q, k, _ = qkv(*shape, **options)
    return q, k


@dataclass(frozen=True)
class Oracle:
    """Exact results and gradients, those of eager code, and the largest score by absolute value."""

    inputs: Inputs
    exact: Named
    native: Named
    largest_score: float


def arguments(inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Any]]:
    (q, k, _), options = inputs.arguments()
    return q, k, options


def gradients(results: Named, inputs: Inputs) -> Named:
    """Of the results against random numbers, the same in every dtype; zeros where none arrives."""
    leaves = {name: leaf for name, leaf in inputs.leaves.items() if leaf.requires_grad and name != "v"}
    outputs = {name: results[name] for name in LOSSES if results[name].requires_grad}
    upstream = []
    for index, output in enumerate(outputs.values()):
        generator = torch.Generator().manual_seed(index)
        upstream.append(torch.randn(output.shape, generator=generator).to(output.dtype))
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream, allow_unused=True)
    return {
        f"d{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def kernel_results(inputs: Inputs, wanted: Wanted, **keywords: Any) -> Named:
    """What `summarize` finds on the CPU kernels."""
    q, k, options = arguments(inputs)
    options |= {"top_k": wanted.top_k, "pool_mode": wanted.pool_mode, **keywords}
    options["pool"] = None if 0 in wanted.pool else wanted.pool
    return {"pooled": q.new_empty(0)} | summarize(q, k, backend="cpu", **options).tensors()


def key_orders(keys: int) -> list[Tensor]:
    """Orders in which eager code may add up the keys: each has its own luck with rounding."""
    order = torch.arange(keys)
    return [order, order.flip(0), torch.cat([order[::2], order[1::2]])]


def dense(inputs: Inputs, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, scores and lse in the dtype in which kernels accumulate, keys added up in the given order."""
    q, k, options = arguments(inputs)
    dtype = accumulate_dtype(q.dtype)
    shape = MaskShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    visible = reference._visible(options.get("mask"), shape, q.device)
    bias = reference._bias(options.get("bias"), shape, q)
    q, k = q.to(dtype), k.to(dtype)
    if order is not None:
        k, visible = k[:, :, order], visible.expand(*visible.shape[:-1], shape.seqlen_k)[..., order]
        bias = None if bias is None else bias.expand(*bias.shape[:-1], shape.seqlen_k)[..., order]
    rest = {name: options.get(name) for name in ("scale", "softcap")}
    scores, visible = reference._masked_scores(q, k, visible, bias, **rest)
    weights, lse = reference._softmax(scores, visible, options.get("sinks"))
    if order is not None:
        weights, scores = (matrix[..., order.argsort()] for matrix in (weights, scores))
    return weights, scores, lse


def oracle(case: Case, wanted: Wanted) -> Oracle:
    """Of the definition: in float64, and in the case's dtype with the keys in the worst order of some."""
    inputs = make_inputs(case)

    def run(inputs: Inputs, order: Tensor | None = None) -> Named:
        inputs = inputs.requiring_grad()
        results = statistics(*dense(inputs, order), wanted)._asdict()
        grads = gradients(results, inputs) if case.grads else {}
        return {name: tensor.detach() for name, tensor in (results | grads).items()}

    exact = run(inputs.to(torch.float64))
    natives = [run(inputs, order) for order in key_orders(case.keys)]

    def worst(name: str) -> Tensor:
        return max((native[name] for native in natives), key=lambda value: max_error(value, exact[name]))

    weights, scores, _ = dense(inputs.to(torch.float64))
    scores = scores[weights > 0].abs()
    largest = scores.max().item() if scores.numel() else 0.0
    return Oracle(inputs, exact, {name: worst(name) for name in exact}, largest)


def compare(got: Named, expected: Oracle) -> None:
    """Reals within the bound, and indices where the weights are as large as the exact ones.

    A sum's rounding errors average out; a single weight has its score's. An absolute error of the score is a
    relative one of the weight, so units in its last place are those of the largest score.
    """
    case, exact, native = expected.inputs.case, expected.exact, expected.native
    dtype = accumulate_dtype(case.dtype)
    weights, _, _ = dense(expected.inputs.to(torch.float64))
    single = max(1.0, expected.largest_score) * (weights.max().item() if weights.numel() else 0.0)
    for name, got_one in got.items():
        if name in INDICES or got_one.numel() == 0:
            continue
        is_gradient = name.startswith("d") and name != "distance"
        check(
            name,
            got_one,
            exact[name],
            native[name],
            GRADIENT_FACTOR if is_gradient else FORWARD_FACTOR,
            case.dtype if is_gradient else dtype,
            single if name in SINGLE else None,
        )
    if weights.numel() == 0:
        assert (got["max_index"] == -1).all()
        assert (got["topk_indices"] == -1).all()
        return
    for index, name in ((got["max_index"][..., None], "max_weight"), (got["topk_indices"], "topk_weights")):
        at_index = weights.gather(-1, index.clamp(min=0)).masked_fill(index < 0, 0.0)
        want, eager = (x[name].view(index.shape) for x in (exact, native))
        check(f"weights at the indices of {name}", at_index, want, eager, FORWARD_FACTOR, dtype, single)
        check_links(index, got[name].view(index.shape))


def check_links(indices: Tensor, weights: Tensor) -> None:
    """Descending weights of different keys, those of weight 0 without index."""
    assert indices.dtype == torch.int64
    assert torch.equal(indices >= 0, weights > 0)
    assert not (weights.diff(dim=-1) > 0).any()
    found = indices.sort(-1).values
    assert not ((found.diff(dim=-1) == 0) & (found[..., 1:] >= 0)).any()


def attention_lse(inputs: Inputs) -> Tensor:
    """What a user has at hand: the lse of the call itself."""
    (q, k, v), options = inputs.arguments()
    with torch.no_grad():
        return fastattn.attention(q, k, v, return_lse=True, backend="cpu", **options)[1]
