"""Self-attention of nested tensors, which nn.TransformerEncoder makes of padded batches in eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_nested_self_attention(query: Any, key: Any, value: Any, masks: Sequence[Any], is_causal: bool) -> bool:
    """Whether query is a nested tensor that attends to the whole of itself."""
    if not isinstance(query, Tensor) or not query.is_nested or is_causal:
        return False
    return key is query and value is query and all(mask is None for mask in masks)


def attend_to_nested(
    layer: nn.MultiheadAttention, x: Tensor, need_weights: bool, average_attn_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """(output, weights) of a batch of sequences of different lengths.

    Args:
        layer: a fastattn.nn.MultiheadAttention with batch_first.
        x: nested [B, *, E].
    Returns:
        The output, nested like x, and weights padded with zeros, [B, L, L] or [B, Hq, L, L], or None.
    """
    lengths = [len(sequence) for sequence in x.unbind()]
    padded = torch.nested.to_padded_tensor(x, 0.0)
    valid_lens = torch.tensor(lengths, device=x.device)
    out, weights = layer(
        padded, valid_lens=valid_lens, need_weights=need_weights, average_attn_weights=average_attn_weights
    )
    if weights is not None:
        rows = torch.arange(padded.shape[1], device=x.device) < valid_lens[:, None]
        weights = weights * (rows[:, :, None] if average_attn_weights else rows[:, None, :, None])
    outs = [sequence[:length] for sequence, length in zip(out, lengths, strict=True)]
    return torch.nested.as_nested_tensor(outs, layout=x.layout), weights
