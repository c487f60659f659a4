"""Running a call: cast its arguments, check them, give it to the backend of choice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastattn import dispatch, watch
from fastattn.autocast import autocast_dtype, cast, cast_bias
from fastattn.call import Call
from fastattn.spec import DISTANCE_SCORES
from fastattn.validation import check_tensor, check_values, validate


def run(call: Call) -> Any:
    """Validate and run a call; out, or (out, lse) where the call asks for it."""
    prepare(call)
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


def prepare(call: Call) -> None:
    """Cast and check the arguments of a call, as far as they can be seen."""
    autocast(call)
    validate(call)
    if call.op == "attention" or not has_values(
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


def has_values(*tensors: Tensor | None) -> bool:
    """Whether the contents of the tensors may be read here: CPU tensors that no trace or transform watches.

    Where not, and the tensors turn out to have contents, kernels check them themselves.
    """
    if torch.compiler.is_compiling():
        return False
    return all(tensor is None or (tensor.is_cpu and is_concrete(tensor)) for tensor in tensors)


def is_concrete(tensor: Tensor) -> bool:
    """Whether a tensor has contents that no trace or transform watches; reading may wait for a device."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return False
    transforms = torch._C._are_functorch_transforms_active()
    return not (transforms and torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def autocast(call: Call) -> None:
    """Cast q, k, v (and a bias that is not float32) as PyTorch's call does under autocast.

    Distances stay as they are, as those of torch.cdist do: coordinates rounded to 8 bits would be others.
    """
    dtype = autocast_dtype(call.q)
    if dtype is not None and call.score not in DISTANCE_SCORES:
        call.q, call.k, call.v = cast((call.q, call.k, call.v), dtype)
        call.bias = cast_bias(call.bias, dtype)


def declared_length(given: int | None, name: str, cu_seqlens: Tensor | None, packed: Tensor) -> int:
    """The given maximal length, or the one in cu_seqlens; an upper bound where values cannot be read."""
    if given is not None:
        return given
    if has_values(check_tensor(name, cu_seqlens)):
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
