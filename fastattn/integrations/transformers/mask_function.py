"""The mask function, which transformers calls once in each forward: its description of a mask as a Mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers.masking_utils import causal_mask_function

from fastattn.integrations.transformers.frame import EVERYTHING, Frame, Offset
from fastattn.integrations.transformers.mask_tensor import MaskTensor
from fastattn.integrations.transformers.symbolic import MaskFunction, both, read
from fastattn.mask_ops import block_lists
from fastattn.masks import LoweredMask, Mask, dense, predicate
from fastattn.masks.built import BuiltMask
from fastattn.masks.space import MaskShape


def fastattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Offset = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | Mask | None:
    """The mask of one forward in memory O(N + partial tiles).

    Args:
        batch_size, q_length, kv_length: the mask's shape is [batch_size, 1, q_length, kv_length].
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: tells whether (batch_idx, head_idx, q_idx, kv_idx), positions, is visible.
        attention_mask: bool [B, n], False = padding; keys from n on are padding too.
        allow_is_causal_skip: whether None may stand for a causal mask, or for all keys with one query.
        allow_is_bidirectional_skip: whether None may stand for a mask that hides nothing.
        use_vmap: whether mask_function may be unable to take tensors of indices.
        device: of the call.
        kwargs: what transformers tells other implementations.
    Returns:
        A MaskTensor, or None as allowed; within a compiled graph the mask itself.
    """
    device = torch.device(device)
    shape = MaskShape(batch_size, 1, q_length, kv_length)
    frame = Frame(shape, q_offset, kv_offset, device)
    mask = read(mask_function, frame)
    if mask is None:
        mask = predicate(_by_pairs(mask_function, frame, use_vmap))
    if attention_mask is not None:
        mask = both(mask, frame.keys(_keys(attention_mask, kv_length, kv_offset)))
    # A causal mask of several queries is never None: a model may drop queries that it needs no more, and the
    # attention function could not tell which ones are left.
    if mask == EVERYTHING and (allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == 1)):
        return None
    mask = _prepared(mask, shape, device)
    return mask if torch.compiler.is_compiling() else MaskTensor(mask, shape, device)


def _keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The mask's columns [B, Lk] for the keys at hand."""
    missing = kv_offset + kv_length - attention_mask.shape[1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def _prepared(mask: Mask, shape: MaskShape, device: torch.device) -> Mask:
    """The mask in the form that all layers of this forward read."""
    if not mask.needs_blocks:
        return mask
    if torch.compiler.is_compiling():
        lists = block_lists(mask, shape, device)
        batch = shape.batch if mask._varies(shape, device)[0] else None
        return BuiltMask(
            mask, LoweredMask(block=lists), shape.seqlen_q, shape.seqlen_k, batch, None, str(device)
        )
    if shape.seqlen_q == 1:  # a row of bools is no longer than a list of tiles
        return dense(mask.to_dense(shape, device))
    # A predicate would be asked again by every layer.
    return (
        mask
        if mask.is_constant
        else mask.build(shape.seqlen_q, shape.seqlen_k, batch=shape.batch, device=device)
    )


def _by_pairs(mask_function: MaskFunction, frame: Frame, use_vmap: bool) -> Any:
    """The function for `predicate`: raw indices to positions."""

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        h = torch.zeros_like(b)
        i, j = i + frame.q_offset, j + frame.kv_offset
        if not use_vmap:
            return mask_function(b, h, i, j)
        shape = torch.broadcast_shapes(b.shape, i.shape, j.shape)
        pairs = [index.expand(shape).flatten() for index in (b, h, i, j)]
        with TransformGetItemToIndex():  # indices without a value to read, as vmap gives them, still index
            return torch.vmap(mask_function)(*pairs).view(shape)

    return visible
