"""HardAttention: each query attends to one key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.hard import GRADIENTS, MODES, hard_attention
from fastattn.masks import Mask
from fastattn.nn.layer import AttentionLayer, ValidLens, is_transformed, visible_keys
from fastattn.validation import check_number


class HardAttention(AttentionLayer):
    """v_{j(i)}, with j(i) drawn from softmax_j(scale q_i . k_j) in training, its largest weight in eval.

    >>> layer = HardAttention().eval()
    >>> out = layer(torch.eye(3)[[2, 0]], torch.eye(3), torch.arange(3.0)[:, None])
    >>> out.flatten().tolist(), layer.attention_weights.tolist()
    ([2.0, 0.0], [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])

    Args:
        mode: "sample": draw in training, take the largest score in eval; "argmax": always the largest.
        gradient: "straight_through": backward is that of soft attention; "reinforce": forward also returns
            the logarithm of the chosen keys' probabilities, for the loss.
        scale: of the scores; 1 / sqrt(D) where None.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Xu et al., "Show, Attend and Tell", ICML 2015, section 4.1.
    """

    def __init__(
        self, mode: str = "sample", gradient: str = "straight_through", scale: float | None = None
    ) -> None:
        super().__init__()
        for name, value, names in (("mode", mode, MODES), ("gradient", gradient, GRADIENTS)):
            if value not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")
        self.mode, self.gradient = mode, gradient
        self.scale = None if scale is None else check_number("scale", scale)
        self._chosen: tuple[Tensor, int, torch.dtype] | None = None

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        valid_lens: ValidLens | None = None,
        mask: Mask | Tensor | None = None,
    ) -> Any:
        """[B, Lq, Dv]; with gradient="reinforce" also log_prob [B, Lq].

        Args:
            queries: [B, Lq, D], or without a batch [Lq, D], or [B, heads, Lq, D]; keys and values likewise.
            keys: [B, Lk, D].
            values: [B, Lk, Dv].
            valid_lens: int [B] or [B, Lq]: how many of the first keys are visible.
            mask: a fastattn.masks.Mask, or bool broadcastable to [B, Lq, Lk], True = attend.
        """
        *results, index = hard_attention(
            queries,
            keys,
            values,
            mode=self.mode if self.training else "argmax",
            gradient=self.gradient,
            mask=visible_keys(mask, valid_lens, queries),
            scale=self.scale,
            return_index=True,
        )
        self._chosen = None if is_transformed() else (index, keys.shape[-2], results[0].dtype)
        return results[0] if len(results) == 1 else tuple(results)

    @property
    def attention_weights(self) -> Tensor | None:
        """The weights of the last call, [B, Lq, Lk]: 1 at the chosen key; 0 in a row that sees none."""
        if self._chosen is None:
            return None
        index, seqlen_k, dtype = self._chosen
        return (index.unsqueeze(-1) == torch.arange(seqlen_k, device=index.device)).to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_chosen": None}

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, gradient={self.gradient!r}"
