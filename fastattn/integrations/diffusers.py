"""diffusers: attention processors on our kernels, for `model.set_attn_processor` or by `fastattn.patch`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.functional import attention
from fastattn.integrations.needed import need

need("diffusers", (0, 32), "diffusers")  # the oldest whose modules have all that our processors read

from diffusers.models import attention_processor as stock  # noqa: E402

__all__ = ["FastAddedKVAttnProcessor", "FastAttnProcessor", "Processor", "processor_for"]


class Processor:
    """What the processors share.

    Heads are read as views of the projections, [B, S, H, D] as they lie, and a mask is never repeated for
    the heads. Dropout, as in diffusers, is the output's alone.

    Args:
        scale: of the scores; 1 / sqrt(head_dim) where None, as the stock processors of PyTorch 2 have it
            whatever the module's `scale_qk` says.
    """

    def __init__(self, scale: float | None = None) -> None:
        self.scale = scale

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.scale})"


class FastAttnProcessor(Processor):
    """diffusers' AttnProcessor2_0 on `fastattn.attention`: self- and cross-attention, with masks.

    >>> unet.set_attn_processor(FastAttnProcessor())  # doctest: +SKIP

    Args:
        scale: as in Processor.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The module's output.

        Args:
            attn: the diffusers Attention that this processor belongs to.
            hidden_states: [B, L, C] or [B, C, height, width].
            encoder_hidden_states: [B, S, C_cross]; hidden_states where None.
            attention_mask: bool (True = attend) or additive, [B, S], [B, 1|L, S] or [B H, 1|L, S].
            temb: condition of a spatial norm.
        Returns:
            Of hidden_states' shape.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        is_image = hidden_states.dim() == 4
        if is_image:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = _context(attn, hidden_states, encoder_hidden_states)
        query = _heads(attn, attn.to_q(hidden_states))
        key, value = _heads(attn, attn.to_k(context)), _heads(attn, attn.to_v(context))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        hidden_states = _attend(attn, query, key, value, attention_mask, context.shape[1], self.scale)
        if is_image:
            hidden_states = hidden_states.transpose(1, 2).reshape(residual.shape[0], -1, *residual.shape[2:])
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


class FastAddedKVAttnProcessor(Processor):
    """diffusers' AttnAddedKVProcessor2_0 on ours: a text's keys and values, then the image's.

    Args:
        scale: as in Processor.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The module's output, [B, C, ...] as hidden_states; other arguments as in FastAttnProcessor."""
        residual = hidden_states
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = _context(attn, hidden_states, encoder_hidden_states)
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = _heads(attn, attn.to_q(hidden_states))
        key, value = _heads(attn, attn.add_k_proj(context)), _heads(attn, attn.add_v_proj(context))
        if not attn.only_cross_attention:
            key = torch.cat([key, _heads(attn, attn.to_k(hidden_states))], dim=2)
            value = torch.cat([value, _heads(attn, attn.to_v(hidden_states))], dim=2)
        seqlen = hidden_states.shape[1]
        hidden_states = _attend(attn, query, key, value, attention_mask, seqlen, self.scale)
        return hidden_states.transpose(1, 2).reshape(residual.shape) + residual


def processor_for(module: Any) -> Any:
    """The processor of ours that does what a module's own does; None where there is none."""
    processor = getattr(module, "processor", None)
    if type(processor) is stock.AttnProcessor2_0:
        return FastAttnProcessor()
    if type(processor) is stock.AttnAddedKVProcessor2_0:
        return FastAddedKVAttnProcessor()
    # Those from before PyTorch had a function of its own take the module's scale, and leave out its norms.
    if type(processor) is stock.AttnProcessor and module.norm_q is None and module.norm_k is None:
        return FastAttnProcessor(module.scale)
    if type(processor) is stock.AttnAddedKVProcessor:
        return FastAddedKVAttnProcessor(module.scale)
    return None


def _context(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
    """What keys and values are projected from, [B, S, C]."""
    if encoder_hidden_states is None:
        return hidden_states
    if attn.norm_cross:
        return attn.norm_encoder_hidden_states(encoder_hidden_states)
    return encoder_hidden_states


def _heads(attn: Any, x: Tensor) -> Tensor:
    """[B, S, H D] as a view [B, H, S, D]."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _attend(
    attn: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    length: int,
    scale: float | None,
) -> Tensor:
    """Attention and the output projection, [B, L, C].

    Args:
        length: of a mask that needs no padding.
    """
    options: dict[str, Any] = {}
    if attention_mask is not None:
        if attention_mask.shape[-1] != length:
            # As diffusers does it: the mask is for a text, and all that follows is visible.
            is_bool = attention_mask.dtype == torch.bool
            attention_mask = F.pad(attention_mask, (0, length), value=1 if is_bool else 0)
        heads = 1 if attention_mask.shape[0] == query.shape[0] else attn.heads
        attention_mask = attention_mask.reshape(query.shape[0], heads, -1, attention_mask.shape[-1])
        options["mask" if attention_mask.dtype == torch.bool else "bias"] = attention_mask
    out = attention(query, key, value, scale=scale, **options)
    to_out, dropout = attn.to_out[0], attn.to_out[1]
    return dropout(to_out(out.transpose(1, 2).flatten(2).to(query.dtype)))
