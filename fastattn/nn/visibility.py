"""One mask and one bias out of everything that nn.MultiheadAttention takes for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import Bias
from fastattn.masks import Align, Mask, MaskShape, causal, dense, padding
from fastattn.spec import dtype_name

# True = blocked in torch's two masks; everywhere else in fastattn True = attend.


def merge_masks(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | Mask | None,
    is_causal: bool,
    causal_align: Align,
    mask: Mask | Tensor | None,
    valid_lens: Tensor | Sequence[int] | None,
    bias: Bias | Tensor | None = None,
) -> tuple[Mask | Tensor | None, Bias | Tensor | None]:
    """(mask, bias) for `fastattn.attention`: a pair is visible where every argument lets it be.

    Kernels read one mask and one bias, each in place. So a key padding mask becomes a bias of -inf, [B, 1,
    1, S], where the mask's place is taken. Of size L x S there is only the inverse of a bool attn_mask,
    unless two such tensors meet, or a bias and a float mask.

    Args:
        shape: (B, Hq, L, S).
        dtype: of the query.
        key_padding_mask: [B, S], bool (True = blocked) or float (additive).
        attn_mask: [L, S], [B Hq, L, S] or broadcastable to [B, Hq, L, S], likewise; or a Mask.
        is_causal: attn_mask, if any, is the causal mask.
        causal_align: how that one is aligned.
        mask: a Mask or bool tensor broadcastable to [B, Hq, L, S], True = attend.
        valid_lens: [B] or [B, L]: how many of the first keys are visible.
        bias: what is added to the scores besides.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    """
    padded, key_bias = _split("key_padding_mask", _check_padding(key_padding_mask, shape), dtype)
    objects: list[Mask] = [] if valid_lens is None else [padding(valid_lens)]
    tensors: list[Tensor] = []
    added = None
    if is_causal:
        objects.append(causal(align=causal_align))
    elif isinstance(attn_mask, Mask):
        objects.append(attn_mask)
    else:
        blocked, added = _split("attn_mask", _to_4d(attn_mask, shape), dtype)
        if blocked is not None:
            tensors.append(_inverse(blocked))
    if isinstance(mask, Tensor):
        tensors.append(mask)
    elif mask is not None:
        objects.append(mask)
    if padded is not None:
        if not tensors and not objects:
            tensors.append(_inverse(padded))
        else:
            key_bias = torch.zeros(padded.shape, dtype=dtype, device=padded.device).masked_fill(
                padded, -torch.inf
            )
    if key_bias is not None:
        added = key_bias if added is None else added + key_bias
    if bias is not None and added is not None:
        # Kernels read one bias: of two, one is a tensor, so their sum is.
        if isinstance(bias, Bias):
            bias = bias.to_dense(MaskShape(*shape), added.device, added.dtype)
        added = added + bias
    return _intersection(objects, tensors), bias if added is None else added


def _intersection(objects: list[Mask], tensors: list[Tensor]) -> Mask | Tensor | None:
    if not objects and len(tensors) <= 1:
        return tensors[0] if tensors else None
    masks = [*objects, *map(dense, tensors)]
    merged = masks[0]
    for other in masks[1:]:
        merged = merged & other
    return merged


def _inverse(blocked: Tensor) -> Tensor:
    """~blocked, as small as its memory where it is expanded."""
    expanded = [
        size > 1 and stride == 0 for size, stride in zip(blocked.shape, blocked.stride(), strict=True)
    ]
    return ~blocked[tuple(slice(1) if each else slice(None) for each in expanded)]


def _split(name: str, tensor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The tensor as (blocked, additive), of which it is one."""
    if tensor is None:
        return None, None
    if tensor.dtype == torch.bool:
        return tensor, None
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be bool (True = blocked) or floating point, got {dtype_name(tensor.dtype)}"
        )
    return None, tensor if tensor.dtype in (dtype, torch.float32) else tensor.to(dtype)


def _check_padding(padded: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """As [B, 1, 1, S]."""
    if padded is None:
        return None
    batch, _, _, seqlen_k = shape
    _check_is_tensor("key_padding_mask", padded)
    if padded.shape != (batch, seqlen_k):
        raise ValueError(f"key_padding_mask must be [{batch}, {seqlen_k}], got shape {list(padded.shape)}")
    return padded[:, None, None]


def _to_4d(attn_mask: Any, shape: tuple[int, int, int, int]) -> Tensor | None:
    if attn_mask is None:
        return None
    batch, heads, seqlen_q, seqlen_k = shape
    _check_is_tensor("attn_mask", attn_mask)
    size = list(attn_mask.shape)
    if size == [seqlen_q, seqlen_k]:
        return attn_mask[None, None]
    if size == [batch * heads, seqlen_q, seqlen_k]:
        return attn_mask.unflatten(0, (batch, heads))
    if len(size) == 4 and all(n in (1, full) for n, full in zip(size, shape, strict=True)):
        return attn_mask
    raise ValueError(
        f"attn_mask must be [{seqlen_q}, {seqlen_k}], [{batch * heads}, {seqlen_q}, {seqlen_k}] or broadcast "
        f"from 4 dimensions to {list(shape)}, got shape {size}"
    )


def _check_is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
