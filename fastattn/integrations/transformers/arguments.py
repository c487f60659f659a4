"""The arguments of a layer's call, told in fastattn's terms."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.biases import Bias
from fastattn.execution import is_concrete
from fastattn.integrations.transformers.frame import Frame
from fastattn.integrations.transformers.mask_tensor import MaskTensor
from fastattn.integrations.transformers.position_bias import BiasTensor, KeysOf
from fastattn.masks import Mask, as_mask, causal, dense, documents, window
from fastattn.masks.band import Band
from fastattn.masks.dense import Dense
from fastattn.masks.space import MaskShape


def same_batch(*tensors: Tensor) -> list[Tensor]:
    """The tensors, those of batch size 1 expanded to the others'."""
    batch = tensors[0].shape[0]
    if all(tensor.shape[0] == batch for tensor in tensors):
        return list(tensors)
    batch = max(tensor.shape[0] for tensor in tensors)
    return [t if t.shape[0] == batch else t.expand(batch, *t.shape[1:]) for t in tensors]


def split_mask(
    attention_mask: Tensor | Mask, dtype: torch.dtype
) -> tuple[Mask | Tensor | None, Tensor | None]:
    """(mask, additive bias), of which attention_mask is one."""
    if isinstance(attention_mask, MaskTensor):
        mask = attention_mask.mask
        return mask.tensor if isinstance(mask, Dense) else mask, None
    if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():
        return None, _as_bias(attention_mask, dtype)
    return attention_mask, None


def implied_mask(seqlen_q: int, is_causal: bool, sliding_window: int | None) -> Mask | None:
    """What None stands for as attention_mask: the last of all positions alone, or the first of them."""
    left = None if sliding_window is None else sliding_window - 1
    if seqlen_q == 1:
        return None if left is None else window(left, None)
    if is_causal:
        return causal(align="top_left") if left is None else window(left, 0, align="top_left")
    return None if left is None else window(left, left, align="top_left")


def is_constant(position_bias: Tensor) -> bool:
    """Whether it is the same number for all scores, which a softmax does not see."""
    return position_bias.numel() == 1 and not position_bias.requires_grad


def add_position_bias(
    mask: Mask | Tensor | None, bias: Tensor | None, position_bias: Tensor, dtype: torch.dtype
) -> tuple[Mask | Tensor | None, Bias | Tensor]:
    """(mask, bias) with position_bias added to bias; a table of relative positions stays one if it can."""
    if isinstance(position_bias, BiasTensor):
        visible = None if bias is None else _visible_keys(bias, position_bias)
        if visible is not None:
            mask, bias = both(mask, visible), None
        if bias is None:
            return mask, position_bias.bias
        position_bias = position_bias.to_dense()
    position_bias = _as_bias(position_bias, dtype)
    return mask, position_bias if bias is None else bias + position_bias


def _visible_keys(bias: Tensor, table: BiasTensor) -> Mask | None:
    """The mask that bias [B, 1, 1, 1|Lk] is, if it is 0 and the least number alone; else None.

    Added to a table such a row would make an N x N tensor. Reading it waits for a GPU, so it is read once for
    all layers that share the table.
    """
    if bias.dim() != 4 or bias.shape[1:3] != (1, 1) or bias.requires_grad or not is_concrete(bias):
        return None
    version = None if bias.is_inference() else bias._version  # without a count it may have been written into
    known = table.keys_of
    if known is not None and known.bias is bias and known.version == version is not None:
        return known.visible
    visible = _read_keys(bias[:, 0, 0], *table.shape[2:])
    table.keys_of = KeysOf(bias, version, visible)
    return visible


def _read_keys(bias: Tensor, seqlen_q: int, seqlen_k: int) -> Mask | None:
    """The mask that bias [B, 1|Lk] is, or None."""
    visible = bias == 0
    if not (visible | (bias <= torch.finfo(bias.dtype).min)).all():
        return None
    return Frame(MaskShape(len(visible), 1, seqlen_q, seqlen_k), 0, 0, bias.device).keys(visible)


def both(mask: Mask | Tensor | None, other: Mask) -> Mask:
    return other if mask is None else as_mask(mask) & other


def chosen_keys(indices: Tensor, seqlen_k: int) -> Mask:
    """Keys that indices [B, Lq, n] name, each query its own."""
    visible = torch.zeros(*indices.shape[:2], seqlen_k, dtype=torch.bool, device=indices.device)
    return dense(visible.scatter(-1, indices.long(), True)[:, None])


def packed(
    mask: Mask | Tensor | None, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, seqlens: tuple[int, int]
) -> Mask:
    """The mask within the sequences that begin at cu_seq_lens."""
    ids = [
        torch.bucketize(torch.arange(length, device=starts.device), starts[1:].long(), right=True)
        for starts, length in zip((cu_seq_lens_q, cu_seq_lens_k), seqlens, strict=True)
    ]
    return both(mask, documents(*ids))


def is_local(mask: Mask | Tensor | None) -> bool:
    """Whether it says of each packed sequence what it says of their concatenation."""
    return mask is None or isinstance(mask, Band)


def _as_bias(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype in (dtype, torch.float32) else tensor.to(dtype)
