"""torch.nn.functional.scaled_dot_product_attention with our kernels beneath."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastattn.call import Call
from fastattn.execution import run
from fastattn.masks import causal
from fastattn.plain import is_plain, plain_attention
from fastattn.spec import dtype_name
from fastattn.validation import check_broadcast, check_tensor

_CAUSAL = causal(align="top_left")
_NAMES = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "bias": "attn_mask"}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """PyTorch's call of the same name: signature, shapes and meaning.

    Deliberate differences: attn_mask together with is_causal=True always raises; a NaN or infinity in a
    masked key or value does not reach the rows that mask it; scale <= 0 is right with is_causal too; dropout
    drops other elements (with the same probability); no case falls back to an N x N path.

    Args:
        query: [..., Hq, L, E], two dimensions or more.
        key: [..., H, S, E]; value: [..., H, S, Ev]. Leading dimensions broadcast.
        attn_mask: bool (True = attend), query's dtype or float32 (additive), broadcastable to [..., Hq, L,
            S]; or torch.nn.attention.bias.causal_upper_left / causal_lower_right.
        dropout_p: applied whenever it is positive, as in PyTorch.
        is_causal: top-left aligned where L and S differ.
        scale: 1 / sqrt(E) where None.
        enable_gqa: let Hq be a multiple of H; without it the head counts must be equal or 1.
        backend: force one of fastattn.dispatch.BACKENDS; None chooses. Not in PyTorch's signature.
    Returns:
        [..., Hq, L, Ev] in query's dtype; rows that see no key are 0.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got.
    """
    if type(dropout_p) is bool:  # as in `dropout_p=self.training and p`, which PyTorch takes
        dropout_p = float(dropout_p)
    is_bare = attn_mask is None and backend is None and is_plain(query, key, value)
    if is_bare and (enable_gqa or query.size(1) == key.size(1)):
        mask = _CAUSAL if is_causal else None
        return plain_attention(query, key, value, mask, None, scale, None, None, dropout_p, None, False)
    causal_bias = type(attn_mask).__module__ == "torch.nn.attention.bias"
    others = () if attn_mask is None or causal_bias else (attn_mask,)
    if has_torch_function_variadic(query, key, value, *others):
        return handle_torch_function(
            scaled_dot_product_attention,
            (query, key, value, *others),
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            backend=backend,
        )
    _check(query, key, value, attn_mask, is_causal)
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "backend": backend}
    if is_causal:
        options["mask"] = _CAUSAL
    elif causal_bias:
        options["mask"] = _causal_variant(attn_mask, query, key)
        attn_mask = None
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        if attn_mask is not None:
            want = (*query.shape[:3], key.shape[2])
            options["mask" if attn_mask.dtype == torch.bool else "bias"] = _broadcastable(attn_mask, want)
        return _attention(query, key, value, options)
    return _any_shape(query, key, value, attn_mask, enable_gqa, options)


def _attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """`attention`, with messages that name this function's arguments."""
    if options["backend"] is not None or not is_plain(q, k, v):
        return run(Call("attention", q, k, v, names=_NAMES, **options))
    mask, bias = options.get("mask"), options.get("bias")
    return plain_attention(
        q, k, v, mask, bias, options["scale"], None, None, options["dropout_p"], None, False
    )


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, is_causal: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, query.device if isinstance(query, Tensor) else None, "query")
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, got shape {list(tensor.shape)}")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("attn_mask must be None with is_causal=True: combine them into one mask")
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(attn_mask).__name__}")
    if type(attn_mask).__module__ == "torch.nn.attention.bias":
        return
    check_tensor("attn_mask", attn_mask, query.device, "query")
    allowed = (torch.bool, query.dtype, torch.float32)
    # Under autocast the query's dtype is not yet the one in force: run() casts both.
    is_cast = attn_mask.dtype.is_floating_point and torch._C._is_any_autocast_enabled()
    if attn_mask.dtype not in allowed and not is_cast:
        names = ", ".join(dtype_name(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"attn_mask must be one of {names}, got {dtype_name(attn_mask.dtype)}")


def _causal_variant(attn_mask: Any, query: Tensor, key: Tensor) -> Any:
    from torch.nn.attention.bias import CausalVariant

    got, want = [attn_mask.seq_len_q, attn_mask.seq_len_kv], [query.shape[-2], key.shape[-2]]
    if got != want:
        raise ValueError(f"attn_mask must be for lengths {want}, got {got}")
    return causal(align="top_left" if attn_mask.variant == CausalVariant.UPPER_LEFT else "bottom_right")


def _broadcastable(attn_mask: Tensor, want: tuple[int, ...]) -> Tensor:
    check_broadcast("attn_mask", attn_mask, want)
    return attn_mask


def _any_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    enable_gqa: bool,
    options: dict[str, Any],
) -> Tensor:
    """The call with any number of dimensions and broadcasting ones, brought to [B, H, L, E] and back."""
    dims = max(query.dim(), key.dim(), value.dim())
    query, key, value = (t[(None,) * (dims - t.dim())] for t in (query, key, value))
    lead = _broadcast_batch(query, key, value)
    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    if dims >= 4:
        query, key, value = _match_heads(query, key, value, enable_gqa)
        want: tuple[int, ...] = (*lead, query.shape[-3], seqlen_q, seqlen_k)
    else:
        want = (*lead, seqlen_q, seqlen_k)
    q, k, v = (_to_4d(t, lead, dims) for t in (query, key, value))
    if attn_mask is not None:
        mask = _broadcastable(attn_mask, want)
        mask = mask[(None,) * (dims - mask.dim())]
        shared = all(n == 1 for n in mask.shape[: len(lead)])
        mask = _to_4d(mask, (1,) * len(lead) if shared else lead, dims)
        options["mask" if mask.dtype == torch.bool else "bias"] = mask
    out = _attention(q, k, v, options)
    if dims < 4:
        return out.reshape(*lead, seqlen_q, value.shape[-1])
    return out.reshape(*lead, q.shape[1], seqlen_q, value.shape[-1])


def _broadcast_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """Common leading dimensions: all before the heads, or before the length where there are none."""
    last = 2 if query.dim() < 4 else 3
    shapes = [list(t.shape[:-last]) for t in (query, key, value)]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        text = ", ".join(map(str, shapes))
        raise ValueError(
            f"query, key and value must have batch dimensions that broadcast, got {text}"
        ) from None


def _match_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Head counts that attention() takes: Hq a multiple of one H."""
    heads, heads_k, heads_v = query.shape[-3], key.shape[-3], value.shape[-3]
    if enable_gqa:
        for name, count in (("key", heads_k), ("value", heads_v)):
            if count == 0 or heads % count != 0:
                raise ValueError(
                    f"{name}'s heads must divide query's {heads} with enable_gqa=True, got {count}"
                )
        if heads_k != heads_v:
            key = key.repeat_interleave(heads // heads_k, -3)
            value = value.repeat_interleave(heads // heads_v, -3)
        return query, key, value
    total = max(heads, heads_k, heads_v) if 0 not in (heads, heads_k, heads_v) else 0
    if any(count not in (1, total) for count in (heads, heads_k, heads_v)):
        got = f"{heads}, {heads_k} and {heads_v}"
        raise ValueError(
            f"query, key and value must have head counts that are equal or 1, or enable_gqa=True, got {got}"
        )
    if heads_k != heads_v:
        key, value = _with_heads(key, total), _with_heads(value, total)
    return _with_heads(query, total), key, value


def _with_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.expand(*tensor.shape[:-3], heads, *tensor.shape[-2:])


def _to_4d(tensor: Tensor, lead: tuple[int, ...], dims: int) -> Tensor:
    if dims < 4:
        tensor = tensor.expand(*lead, *tensor.shape[-2:])
        return tensor[(None,) * (4 - dims)] if dims == 2 else tensor.unsqueeze(1)
    tensor = tensor.expand(*lead, *tensor.shape[-3:])
    return tensor if dims == 4 else tensor.flatten(0, dims - 4)
