"""summarize: what each query attends to and what each key receives, without the matrix of weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch, reference
from fastattn.autocast import without_autocast
from fastattn.autograd import wants_gradient
from fastattn.backends import cpu, cpu_summary
from fastattn.backends.triton import summary as triton_summary
from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.checks import check_int
from fastattn.execution import autocast
from fastattn.inspect import fused
from fastattn.inspect.definition import statistics
from fastattn.lowering import NO_OPERANDS, lower
from fastattn.masks import Mask
from fastattn.plain import is_plain, mask_options
from fastattn.spec import accumulate_dtype, dtype_name, spec_of
from fastattn.validation import check_tensor, validate, validate_options
from fastattn.weight_statistics import POOL_MODES, Results, Wanted
from fastattn.weights import Index, attention_weights

MAX_TOP_K = 256

_warned: set[str] = set()  # backends whose memory was mentioned


@dataclass(frozen=True, eq=False, repr=False)
class AttentionSummary:
    """Statistics of the weights p_ij that query i gives key j, by batch entry and head.

    Weights are those before dropout. With sinks a row of them adds up to less than 1, and every statistic is
    of these weights as they are: the sink's share has no part in entropy or distance. A row that sees no key
    has entropy, max_weight and distance 0 and max_index -1. A row with a visible NaN is NaN, its indices -1.
    Floating tensors are float32, or float64 for float64 inputs; indices are int64.

    Attributes:
        entropy: [B, Hq, Lq], -sum_j p_ij ln p_ij in nats, from 0 (one key) to ln(number of visible keys).
        max_weight: [B, Hq, Lq], the largest weight of each query.
        max_index: [B, Hq, Lq], its key, which has the greatest score, the first of equal ones; -1 where the
            weight is 0.
        received: [B, Hq, Lk], sum_i p_ij: how much attention each key gets. Their sum is Lq where every
            query sees a key and there are no sinks.
        distance: [B, Hq, Lq], sum_j p_ij |i + Lk - Lq - j|: how far away a query looks, in tokens, with the
            last query standing at the last key.
        lse: [B, Hq, Lq], as `attention` returns it.
        topk_weights: [B, Hq, Lq, top_k], the largest weights of each query, descending; 0 where it gives
            weight to fewer keys. None where top_k is 0.
        topk_indices: [B, Hq, Lq, top_k], their keys, in the order of their scores, the lower index first
            among equal ones; -1 where the weight is 0. (So weights that differ by less than a float can tell
            are still in the right order.)
        pooled: [B, Hq, rows, cols], the weights on a coarser grid: query i falls into row
            floor(i * rows / Lq), keys likewise, and a cell holds the mean (or sum, or maximum) of its pairs,
            hidden pairs counting as 0. None without pool.
        pool_mode: "mean", "sum" or "max": what a cell of `pooled` holds.
    """

    entropy: Tensor
    max_weight: Tensor
    max_index: Tensor
    received: Tensor
    distance: Tensor
    lse: Tensor
    topk_weights: Tensor | None = None
    topk_indices: Tensor | None = None
    pooled: Tensor | None = None
    pool_mode: str = "mean"
    _inputs: tuple[Tensor, Tensor, dict[str, Any]] | None = field(default=None)

    @property
    def top_k(self) -> int:
        """How many links each query has in topk_weights."""
        return 0 if self.topk_weights is None else self.topk_weights.shape[-1]

    def weights(self, rows: Index | None = None, cols: Index | None = None) -> Tensor:
        """The exact weights of chosen queries and keys, as `fastattn.attention_weights` computes them.

        Args:
            rows: the queries: int tensor, sequence of ints, slice or one int; None for all.
            cols: the keys, likewise. All rows and all columns are the whole matrix.
        Returns:
            [B, Hq, number of rows, number of columns], differentiable where q and k are.
        Raises:
            RuntimeError: the summary was detached or loaded, so that it has no q and k.
        """
        if self._inputs is None:
            raise RuntimeError("weights needs q and k, which a detached or loaded summary no longer has")
        q, k, options = self._inputs
        return attention_weights(q, k, rows=rows, cols=cols, **options)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name, in the order of the attributes."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def detach(self) -> AttentionSummary:
        """The same numbers without their graph, and without q and k, whose memory can then be freed."""
        cut: dict[str, Any] = {name: tensor.detach() for name, tensor in self.tensors().items()}
        return replace(self, _inputs=None, **cut)

    def __repr__(self) -> str:
        """One line: the shape, the mean entropy, and what was asked for.

        >>> q = torch.zeros(1, 2, 4, 8)
        >>> summarize(q, q, top_k=2)
        AttentionSummary(batch 1, 2 heads, 4 queries, 4 keys, mean entropy 1.386 nats, top_k=2)
        """
        batch, heads, queries = self.entropy.shape
        parts = [f"batch {batch}", f"{heads} heads", f"{queries} queries", f"{self.received.shape[2]} keys"]
        if self.entropy.numel() and not self.entropy.is_meta and type(self.entropy) is Tensor:
            parts.append(f"mean entropy {self.entropy.detach().mean().item():.3f} nats")
        if self.top_k:
            parts.append(f"top_k={self.top_k}")
        if self.pooled is not None:
            parts.append(f"pooled {self.pooled.shape[2]}x{self.pooled.shape[3]} by {self.pool_mode}")
        return f"AttentionSummary({', '.join(parts)})"


def summarize(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    top_k: int = 0,
    pool: int | Sequence[int] | None = None,
    pool_mode: str = "mean",
    lse: Tensor | None = None,
    backend: str | None = None,
) -> AttentionSummary:
    """Statistics of the weights p_ij = exp(s_ij - lse_i) that `attention` gives key j in query i.

    The same arguments mean the same as in `attention`. Entropy, received, distance, lse and pooled (mean or
    sum) are differentiable in q, k, bias and sinks: they may serve as losses. Kernels need O(Lq + Lk) memory
    beside their results.

    >>> q = torch.zeros(1, 1, 2, 4)
    >>> summary = summarize(q, q, mask=torch.tensor([[True, False], [True, True]]), top_k=1)
    >>> summary.entropy, summary.received
    (tensor([[[0.0000, 0.6931]]]), tensor([[[1.5000, 0.5000]]]))

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D].
        mask, bias, scale, softcap, sinks: as in `attention`.
        top_k: how many of each query's largest weights to return, up to 256.
        pool: (rows, cols) of the grid `pooled`, or one number for both; a shorter sequence has one cell for
            each position.
        pool_mode: "mean", "sum" or "max"; the maximum carries no gradient.
        lse: [B, Hq, Lq], what `attention` returned with return_lse for these arguments, which saves its
            computation. The result, gradients too, is as if it had been computed here: none flows into lse.
            Rows whose |lse| is 16 or more save nothing, since rounding took too much of it. One of another
            call raises where a row's weights would not add up to 1. Only the CPU's kernels read it: to the
            reference and to Triton's, which find it beside the statistics, it saves nothing.
        backend: "triton", "cpu" or "reference"; None chooses. The reference holds the whole matrix.
    Returns:
        An AttentionSummary, which documents the statistics.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got.
    """
    call = Call("attention", q, k, k, mask, bias, scale, softcap, sinks, backend=backend)
    checked = backend is None and is_plain(q, k, k)  # eager, on CPU, nothing to check
    if checked:
        validate_options(call)
    else:
        autocast(call)
        validate(call)
    wanted = _wanted(top_k, pool, pool_mode, call)
    if lse is not None and not (checked and cpu.is_lse_of(lse, q)):
        _check_lse(lse, call)
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sinks": sinks}
    if checked:
        found = _plain(call, wanted, lse)
    else:
        with without_autocast(q.device):
            found = _run(call, wanted, lse)
    return AttentionSummary(
        entropy=found.entropy,
        max_weight=found.max_weight,
        max_index=found.max_index,
        received=found.received,
        distance=found.distance,
        lse=found.lse,
        topk_weights=found.topk_weights if top_k else None,
        topk_indices=found.topk_indices if top_k else None,
        pooled=None if pool is None else found.pooled,
        pool_mode=pool_mode,
        _inputs=(q, k, options),
    )


def _plain(call: Call, wanted: Wanted, lse: Tensor | None) -> Results:
    """The statistics of a call of which `is_plain` and `validate_options` have found nothing amiss."""
    q, k, mask = call.q, call.k, call.mask
    is_simple = call.bias is None and call.softcap is None and call.sinks is None
    if is_simple and not wants_gradient(q, k, k, NO_OPERANDS):
        options = None if mask is None else mask_options(mask, q, k)
        if mask is None or options is not None:
            return cpu_summary.small(q, k, fused.constant(lse), call.scale_value(), options, wanted)
    return fused.eager(cpu_summary, q, k, lse, *lower(call), wanted)


def _run(call: Call, wanted: Wanted, lse: Tensor | None) -> Results:
    """The statistics on the backend of choice.

    Raises:
        NotImplementedError: a backend was forced that cannot compute them.
    """
    forced = dispatch.forced_backend(call.backend)
    if forced is None and call.q.is_cpu and cpu.available():
        return _fused("cpu", call, wanted, lse)  # it supports all of these: no spec is needed to know
    spec = spec_of(call)
    reasons = {"triton": triton_summary.supports(spec), "cpu": cpu.supports(spec), "reference": None}
    name = forced or dispatch.able(spec, reasons)[0]
    reason = reasons.get(name, "it has no summary kernels")
    if reason is not None:
        raise NotImplementedError(f"backend {name!r} cannot summarize {spec}: {reason}")
    if name == "reference":
        if forced is None:
            _warn_once(reasons["cpu"])
        return _defined(call, wanted)
    return _fused(name, call, wanted, lse)


def _fused(name: str, call: Call, wanted: Wanted, lse: Tensor | None) -> Results:
    """The statistics by a backend's kernels."""
    if call.q.shape[-1] == 0:  # no products: every score is zero, as with one zero component
        call.scale = call.scale_value()
        call.q, call.k = F.pad(call.q, (0, 1)), F.pad(call.k, (0, 1))
    operands, params = lower(call)
    return fused.run(fused._KERNELS[name], call.q, call.k, lse, operands, params, wanted)


def _warn_once(reason: str | None) -> None:
    if _warned:
        return
    _warned.add("reference")
    warnings.warn(
        f"fastattn.inspect.summarize holds the whole matrix of weights (cpu: {reason}). This is said once.",
        stacklevel=4,
    )


def _defined(call: Call, wanted: Wanted) -> Results:
    """The statistics by their definition, from the whole matrix."""
    dtype = accumulate_dtype(call.q.dtype)
    q, k = call.q.to(dtype), call.k.to(dtype)
    shape = call.mask_shape()
    if k.shape[1] == 0:  # no heads: no ratio of head counts
        k = k.sum(1, keepdim=True)
    scores, visible = reference._masked_scores(
        q,
        k,
        reference._visible(call.mask, shape, q.device),
        reference._bias(call.bias, shape, q),
        call.scale_value(),
        call.softcap,
    )
    weights, lse = reference._softmax(scores, visible, call.sinks)
    return statistics(weights.to(dtype), scores, lse, wanted)


def _wanted(top_k: int, pool: Any, pool_mode: str, call: Call) -> Wanted:
    top_k = check_int("top_k", top_k, 0)
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k must be at most {MAX_TOP_K}, got {top_k}")
    if pool_mode not in POOL_MODES:
        raise ValueError(f"pool_mode must be one of {', '.join(POOL_MODES)}, got {pool_mode!r}")
    if pool is None:
        return Wanted(top_k, (0, 0), pool_mode)
    sizes = tuple(pool) if isinstance(pool, Sequence) and not isinstance(pool, str) else (pool, pool)
    if len(sizes) != 2:
        raise ValueError(f"pool must be (rows, cols) or one int, got {pool!r}")
    rows, cols = (
        check_int(name, n, 1) for name, n in zip(("pool's rows", "pool's cols"), sizes, strict=True)
    )
    seqlen_q, seqlen_k = call.seqlens()
    return Wanted(top_k, (min(rows, seqlen_q), min(cols, seqlen_k)), pool_mode)


def _check_lse(lse: Any, call: Call) -> None:
    check_tensor("lse", lse, call.q.device)
    want = accumulate_dtype(call.q.dtype)
    if lse.dtype != want:
        raise TypeError(f"lse must be {dtype_name(want)}, got {dtype_name(lse.dtype)}")
    if lse.shape != call.q.shape[:3]:
        raise ValueError(f"lse must have shape {list(call.q.shape[:3])}, got {list(lse.shape)}")
