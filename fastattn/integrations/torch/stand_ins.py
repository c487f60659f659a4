"""What stands in for PyTorch's functions under `override_sdpa`, and which calls are left to PyTorch."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch
from fastattn.backends import cpu
from fastattn.sdpa import scaled_dot_product_attention
from fastattn.spec import FLOAT_DTYPES, AttentionSpec, dtype_name

torch_sdpa = F.scaled_dot_product_attention
torch_mha = F.multi_head_attention_forward
tensor_backward, unflatten = Tensor.backward, Tensor.unflatten
autograd_backward, autograd_grad = torch.autograd.backward, torch.autograd.grad

_warned: set[str] = set()  # reasons that were mentioned


def _functions(backend: str | None) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """Stand-ins for F.scaled_dot_product_attention and F.multi_head_attention_forward."""

    def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forced = backend is not None or dispatch.forced_by_environment() is not None
        reason = None if forced else _why_not(query, key, value, *args, **kwargs)
        if reason is None:
            return scaled_dot_product_attention(query, key, value, *args, backend=backend, **kwargs)
        warn_once(reason)
        return torch_sdpa(query, key, value, *args, **kwargs)

    return sdpa, _rebound(torch_mha, f"_functional_{backend}", scaled_dot_product_attention=sdpa)


def _rebound(function: Any, name: str, **names: Any) -> Callable[..., Any]:
    """The same code reading other globals: `names`, and modes unseen.

    Nothing shared is patched, so other threads see no change. The globals live in a module of that name
    because torch.compile finds a function's globals by their module's name.
    """
    module = types.ModuleType(f"{__name__}.{name}", f"The globals of {function.__qualname__}, with changes.")
    inherited = {key: value for key, value in function.__globals__.items() if not key.startswith("__")}
    builtins = function.__globals__["__builtins__"]
    modes = {"has_torch_function": _never, "has_torch_function_unary": _never}
    module.__dict__.update(inherited, __builtins__=builtins, **modes, **names)
    sys.modules[module.__name__] = module
    copy = types.FunctionType(function.__code__, module.__dict__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _never(tensors: Any) -> bool:
    return False


def warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"override_sdpa leaves a call to PyTorch's scaled_dot_product_attention: {reason}. "
            "This is said once for each reason.",
            stacklevel=4,
        )


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Why no kernel of fastattn takes a call; None where one does, or where the call is wrong anyway."""
    for name, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_nested:
            return f"{name} is a nested tensor (fastattn.varlen_attention takes packed sequences)"
        if tensor.layout != torch.strided:
            return f"{name} has layout {tensor.layout}"
        if has_own_behaviour(type(tensor)):
            return f"{name} is a {type(tensor).__name__}, which has a behaviour of its own"
    if not isinstance(query, Tensor) or query.dim() < 2:
        return None
    if query.dtype not in FLOAT_DTYPES:
        return f"query has dtype {dtype_name(query.dtype)}"
    if query.is_cpu and cpu.available():
        return None
    heads, heads_kv = (t.shape[-3] if t.dim() > 2 else 1 for t in (query, key))
    return missing_kernels(
        AttentionSpec(
            op="attention",
            batch=1,
            num_heads=heads,
            num_heads_kv=heads_kv,
            seqlen_q=query.shape[-2],
            seqlen_k=key.shape[-2],
            head_dim=query.shape[-1],
            head_dim_v=value.shape[-1],
            dtype=dtype_name(query.dtype),
            device=query.device.type,
            scale=1.0,
            dropout_p=dropout_p,
            needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)),
        )
    )


def has_own_behaviour(kind: type) -> bool:
    """Whether a tensor type does more with functions or ops than Tensor's own rules say."""
    if kind is Tensor or kind.__module__ in _KNOWN_SUBCLASSES:
        return False
    function: Any = kind.__torch_function__  # type: ignore[attr-defined]
    is_default = function is torch._C._disabled_torch_function_impl or (
        getattr(function, "__func__", None) is Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    )
    return not is_default or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__  # type: ignore[attr-defined]


# Causal biases, which our function reads; parameters and buffers; fake tensors, which our ops know.
_KNOWN_SUBCLASSES = frozenset(
    {
        "torch.nn.attention.bias",
        "torch.nn.parameter",
        "torch._subclasses.fake_tensor",
        "torch._subclasses.functional_tensor",
    }
)


def missing_kernels(spec: AttentionSpec) -> str | None:
    """None where a backend with kernels of its own takes the call, else each one's reason."""
    reasons = dispatch.reasons(spec)
    own = {name: reason for name, reason in reasons.items() if name not in ("torch", "reference")}
    if not own.keys().isdisjoint(dispatch.able(spec, reasons)):
        return None
    told = "; ".join(f"{name}: {reason or 'only interpreted'}" for name, reason in own.items())
    return f"no kernel for {spec.device} ({told})"


# Made once, not on entry: torch.compile can trace entering a mode, but not making functions and modules.
FUNCTIONS = {backend: _functions(backend) for backend in (None, *dispatch.BACKENDS)}
BACKWARD = {
    function: _rebound(function, f"_{function.__qualname__}")
    for function in (tensor_backward, autograd_backward, autograd_grad)
}
