"""The calls of scaled_dot_product_attention that PyTorch makes from C++ on CPU.

Kernels for PyTorch's dispatcher, which go to the override of the calling thread, or on to PyTorch's own. They
stand where autograd has not yet been entered, so gradients are those of the function that runs.
See docs/decisions/0007-override-sdpa-is-a-call-and-reaches-cpp.md.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from fastattn.autograd import is_traced

_StandIn = Callable[..., Tensor]

# PyTorch functions that call attention in C++, as operators of whatever library may.
_native_multihead, _native_layer = torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd
_OPERATORS = (OpOverload, OpOverloadPacket)
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


class _Thread(threading.local):
    stand_in: _StandIn | None = None  # of the override in whose handler this thread calls into C++


_thread = _Thread()
_lock = threading.Lock()
_libraries: list[torch.library.Library] = []  # kept alive: its kernels go with it


def may_call_sdpa(func: Any) -> bool:
    """Whether a function that a mode handles, while it is off, may call attention from C++."""
    return isinstance(func, _OPERATORS) or func is _native_multihead or func is _native_layer


def inside(stand_in: _StandIn) -> AbstractContextManager[None]:
    """C++ calls of this thread go to `stand_in`, whose mode is off, or to that of a mode further in."""
    return _going_to(_thread.stand_in or stand_in)


@contextmanager
def _going_to(stand_in: _StandIn | None) -> Iterator[None]:
    before, _thread.stand_in = _thread.stand_in, stand_in
    try:
        yield
    finally:
        _thread.stand_in = before


def install(innermost: Callable[[], _StandIn | None]) -> None:
    """Register the kernels, once per process.

    They stay: PyTorch reads its dispatch tables without a lock, so taking a kernel out while another thread
    is in it frees what that thread runs.

    Args:
        innermost: the stand-in of the calling thread's override, None where it has none.
    """
    if _libraries:
        return
    with _lock:
        if _libraries:
            return
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            # At the key where PyTorch's own is: with a kernel at any other, torch.export would no longer
            # take the operator apart.
            _register(
                library, "scaled_dot_product_attention", "CompositeImplicitAutograd", _attention, innermost
            )
            _register(library, "_native_multi_head_attention", "CPU", _multihead, innermost)
        _libraries.append(library)


def _register(
    library: torch.library.Library,
    op: str,
    key: str,
    ours: Callable[..., Any],
    innermost: Callable[[], _StandIn | None],
) -> None:
    """Put `ours` before PyTorch's kernel of that operator and dispatch key."""
    theirs = torch.library.get_kernel(f"aten::{op}", "CPU").call_boxed

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        stand_in = _thread.stand_in or innermost()
        if stand_in is not None and args[0].is_cpu and not _is_watched(*args[:3]):
            # What a stand-in leaves to PyTorch, or has it do, must not come back here. Below autograd the
            # gradient is the business of whoever called from there.
            grad = torch.is_grad_enabled() and not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
            with torch._C.DisableTorchFunction(), _going_to(None), torch.set_grad_enabled(grad):
                result = ours(stand_in, *args, **kwargs)
            if result is not None:
                return result
        return theirs(keys, *args, **kwargs)

    library.impl(op, kernel, key, with_keyset=True)


def _is_watched(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a tracer or a transform looks on, which knows PyTorch's operators only."""
    return torch._C._are_functorch_transforms_active() or is_traced(query, key, value)


def _attention(stand_in: _StandIn, *args: Any, **kwargs: Any) -> Tensor:
    return stand_in(*args, **kwargs)


def _multihead(
    stand_in: _StandIn,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, None] | None:
    """(out, no weights) of the inference path of PyTorch's encoder layers; None leaves the call to PyTorch.

    Args:
        query, key, value: [B, L, E]; qkv_weight: [3 E, E]; proj_weight: [E, E].
        mask: nonzero = blocked; [L, L] of mask_type 0, [B, L] (keys) of 1, [B, H, L, L] of 2.
    """
    if need_weights or query.shape[-1] != embed_dim or embed_dim % num_heads:
        return None
    q, k, v = (
        F.linear(x, weight, bias).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    )
    visible = None
    if mask is not None:
        visible = mask == 0
        if mask_type == 1:
            visible = visible[:, None, None, :]
    out = stand_in(q, k, v, visible)
    return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), None
