"""The public calls that run attention: dense, packed (varlen) and cached (decode)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils._pytree import tree_leaves

from fastattn import autograd, dispatch, watch
from fastattn.autocast import autocast_dtype, cast, cast_bias
from fastattn.backends import cpu
from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.dispatch import Explanation
from fastattn.lowering import lower
from fastattn.masks import Mask
from fastattn.plain import mask_options, plain_views
from fastattn.spec import DISTANCE_SCORES
from fastattn.validation import check_tensor, check_values, validate, validate_options

_FLOAT32_MAX = torch.finfo(torch.float32).max


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """out_i = sum_j p_ij v_j with p_i = softmax_j(softcap(scale q_i . k_j) + bias_ij) over visible j.

    >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
    >>> attention(q, k, v, mask=torch.tensor([[True, False], [True, True]]), scale=0.0)
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.5000]]]])

    Args:
        q: [B, Hq, Lq, D], float32, bfloat16, float16 or float64. Any strides; a last dimension that is not
            contiguous costs a copy.
        k: [B, Hkv, Lk, D], q's dtype. Hq must be a multiple of Hkv: query head h reads head h // (Hq / Hkv).
        v: [B, Hkv, Lk, Dv], q's dtype.
        mask: a fastattn.masks.Mask, or bool broadcastable to [B, Hq, Lq, Lk], True = attend.
        bias: a tensor of q's dtype or float32, broadcastable to [B, Hq, Lq, Lk], neither scaled nor capped,
            whose -inf masks; or a fastattn.biases.Bias.
        scale: any finite number; 1 / sqrt(D) where None.
        softcap: positive; scores become softcap * tanh(score / softcap).
        sinks: [Hq], one more logit in each row's softmax that carries no value.
        dropout_p: probability with which each weight is dropped after the softmax.
        dropout_seed: int64, one element, on q's device; drawn from the device's default generator where it
            is needed and absent.
        return_lse: whether to return lse too.
        backend: force one of fastattn.dispatch.BACKENDS; None chooses.
    Returns:
        out [B, Hq, Lq, Dv] in q's dtype and stride order; with return_lse also lse [B, Hq, Lq], float32
        (float64 for float64), the natural logarithm of each row's softmax denominator, not changed by
        dropout. A row with no visible key has out 0, gradients 0, and lse = its sink, or -inf without sinks.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got.
    """
    views = plain_views(q, k, v) if backend is None else None
    if views is not None:
        return plain_attention(
            views, q, k, v, mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, return_lse
        )
    if has_torch_function_variadic(q, k, v):
        return handle_torch_function(
            attention,
            (q, k, v),
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            return_lse=return_lse,
            backend=backend,
        )
    return run(
        Call(
            "attention",
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            return_lse=return_lse,
            backend=backend,
        )
    )


def plain_attention(
    views: cpu.Views,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    bias: Bias | Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
) -> Any:
    """`attention` where `plain_views` found nothing to check about q, k and v."""
    if (
        bias is None
        and softcap is None
        and sinks is None
        and dropout_seed is None
        and not return_lse
        and type(dropout_p) is float
        and dropout_p == 0.0
    ):
        if scale is None:
            scale = 1.0 / math.sqrt(views[1][1][3])
        if type(scale) is float and -_FLOAT32_MAX <= scale <= _FLOAT32_MAX:  # finite in every dtype's kernels
            if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
                if mask is None:
                    return autograd.plain(q, k, v, views, scale)
            else:
                options = None if mask is None else mask_options(mask, views)
                if mask is None or options is not None:
                    return cpu.small(q, views, scale, options=options)
    call = Call("attention", q, k, v, mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, return_lse)
    validate_options(call)
    if call.dropout_p == 1:
        return run(call)
    dispatch.seed(call)
    operands, params = lower(call)
    out, lse = autograd.eager(cpu, q, k, v, operands, params, return_lse)
    return (out, lse) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` of each sequence of a packed batch by itself.

    Sequence s has the tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1. Mask, bias and dropout are read at each
    sequence's own row and column indices, with the sequence as the batch entry.

    Args:
        q: [total_q, Hq, D]; k: [total_k, Hkv, D]; v: [total_k, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1], from 0, never decreasing, to the number of tokens.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; computed where None (in compiled code,
            which may not look at values, the number of tokens stands in).
        mask: a fastattn.masks.Mask; a dense tensor raises NotImplementedError.
        bias: a fastattn.biases.Bias; a tensor raises NotImplementedError.
        scale, softcap, sinks, dropout_p, dropout_seed, return_lse, backend: as in `attention`.
    Returns:
        out [total_q, Hq, Dv]; with return_lse also lse [Hq, total_q]. Empty rows as in `attention`.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got. Rules on
        the values of cu_seqlens raise on CPU.
    """
    call = Call(
        "varlen",
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        backend=backend,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=_declared(max_seqlen_q, "cu_seqlens_q", cu_seqlens_q, q),
        max_seqlen_k=_declared(max_seqlen_k, "cu_seqlens_k", cu_seqlens_k, k),
    )
    return run(call)


def _declared(given: int | None, name: str, cu_seqlens: Tensor | None, packed: Tensor) -> int:
    """The given maximal length, or the one in cu_seqlens; an upper bound where values cannot be read."""
    if given is not None:
        return given
    if _has_values(check_tensor(name, cu_seqlens)):
        return _longest(cu_seqlens)
    return packed.shape[0] if isinstance(packed, Tensor) and packed.dim() else 0


def _longest(cu_seqlens: Tensor | None) -> int:
    """The longest sequence, 0 where there is none."""
    # validate() names what is wrong with a tensor of another kind.
    if cu_seqlens is None or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        return 0
    if cu_seqlens.shape[0] < 2:
        return 0
    return max(0, int((cu_seqlens[1:] - cu_seqlens[:-1]).max()))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of the last Lq tokens of each entry over the first lengths[b] keys of its cache.

    The cache already holds the new tokens' keys and values: query i stands at position lengths[b] - Lq + i.
    No mask is implied beyond the lengths: with Lq > 1, pass mask=causal() so that a new token does not see
    those after it.

    Args:
        q: [B, Hq, Lq, D].
        k_cache, v_cache: [B, Hkv, Lmax, D] and [B, Hkv, Lmax, Dv]; with a block_table, pages [pages, Hkv,
            page, D] and [pages, Hkv, page, Dv].
        lengths: int32 or int64 [B], from 0 to the capacity (Lmax, or max_pages * page).
        block_table: int32 [B, max_pages]; entry n of row b names the page of keys n * page to (n + 1) * page
            - 1. Entries beyond a length are never read.
        mask: a fastattn.masks.Mask (bottom-right alignment counts from lengths[b]), or bool broadcastable to
            [B, Hq, Lq, capacity].
        bias: a fastattn.biases.Bias, or a tensor broadcastable to [B, Hq, Lq, capacity].
        scale, softcap, sinks, dropout_p, dropout_seed, return_lse, backend: as in `attention`.
    Returns:
        out [B, Hq, Lq, Dv]; with return_lse also lse [B, Hq, Lq]. Empty rows as in `attention`.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got. Rules on
        the values of lengths and block_table raise on CPU.
    """
    call = Call(
        "decode",
        q,
        k_cache,
        v_cache,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        backend=backend,
        lengths=lengths,
        block_table=block_table,
    )
    return run(call)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend runs a call, and why each other one does not; nothing is computed.

    Args:
        q, k, v: as in `attention`; with cu_seqlens_q and cu_seqlens_k (and max_seqlen_q, max_seqlen_k) as in
            `varlen_attention`; with lengths (and block_table) as in `decode_attention`.
        mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, return_lse, backend: as in that function.
    Returns:
        An Explanation, whose str() is a small table.
    Raises:
        TypeError, ValueError, NotImplementedError: as the call itself would.
    """
    call = Call(
        "attention",
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        backend=backend,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        lengths=lengths,
        block_table=block_table,
    )
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        call.op = "varlen"
        call.max_seqlen_q = _declared(max_seqlen_q, "cu_seqlens_q", cu_seqlens_q, q)
        call.max_seqlen_k = _declared(max_seqlen_k, "cu_seqlens_k", cu_seqlens_k, k)
    elif lengths is not None or block_table is not None:
        call.op = "decode"
    _prepare(call)
    return dispatch.explain(call)


def run(call: Call) -> Any:
    """Validate and run a call; out, or (out, lse) where the call asks for it."""
    _prepare(call)
    return watch.run(call, execute) if watch.is_watched() else execute(call)


def execute(call: Call) -> Any:
    """`run` of a validated call that nobody watches; the call may be changed."""
    head_dim_v = call.v.shape[-1]
    if call.q.shape[-1] == 0:  # no products: every score is zero, as with one zero component
        call.scale = call.scale_value()
        call.q, call.k = F.pad(call.q, (0, 1)), F.pad(call.k, (0, 1))
        if call.score_weights is not None:
            call.score_weights = F.pad(call.score_weights, (0, 1))
    if head_dim_v == 0:
        call.v = F.pad(call.v, (0, 1))
    drops_all = call.dropout_p == 1
    if drops_all:
        call.dropout_p = 0.0
    dispatch.seed(call)
    out, lse = dispatch.run(call)
    if head_dim_v == 0:
        out = out[..., :0]
    if drops_all:
        # Zeros that keep their place in the graph; unlike a product with 0 it passes no NaN.
        out = out.masked_fill(torch.ones((), dtype=torch.bool, device=out.device), 0)
    return (out, lse) if call.return_lse else out


def _prepare(call: Call) -> None:
    """Cast and check the arguments of a call, as far as they can be seen."""
    autocast(call)
    validate(call)
    if call.op == "attention" or not _has_values(
        call.cu_seqlens_q, call.cu_seqlens_k, call.lengths, call.block_table
    ):
        return
    check_values(call)
    call.checked = True
    if call.op == "varlen" and not _is_sized(call.mask):
        # Work on masks and biases grows with the declared maxima, which nothing keeps from being too large.
        call.max_seqlen_q = min(call.max_seqlen_q, _longest(call.cu_seqlens_q))
        call.max_seqlen_k = min(call.max_seqlen_k, _longest(call.cu_seqlens_k))


def _is_sized(mask: Any) -> bool:
    """Whether the mask may hold tensors whose sizes are the declared lengths."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(mask))


def _has_values(*tensors: Tensor | None) -> bool:
    """Whether the contents of the tensors may be read here: CPU tensors that no trace or transform watches.

    Where not, and the tensors turn out to have contents, kernels check them themselves.
    """
    if torch.compiler.is_compiling():
        return False
    transforms = torch._C._are_functorch_transforms_active()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.is_cpu:
            return False
        if transforms and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
    return True


def autocast(call: Call) -> None:
    """Cast q, k, v (and a bias that is not float32) as PyTorch's call does under autocast.

    Distances stay as they are, as those of torch.cdist do: coordinates rounded to 8 bits would be others.
    """
    dtype = autocast_dtype(call.q)
    if dtype is not None and call.score not in DISTANCE_SCORES:
        call.q, call.k, call.v = cast((call.q, call.k, call.v), dtype)
        call.bias = cast_bias(call.bias, dtype)
