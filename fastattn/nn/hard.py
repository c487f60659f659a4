"""HardAttention: each query attends to one key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.call import Call
from fastattn.hard import attend_hard, check_choices
from fastattn.masks import Mask
from fastattn.nn.layer import QueryLayer, is_transformed
from fastattn.validation import check_number


class HardAttention(QueryLayer):
    """v_{j(i)}, with j(i) drawn from softmax_j(scale q_i . k_j) in training, its largest weight in eval.

    >>> layer = HardAttention().eval()
    >>> out = layer(torch.eye(3)[[2, 0]], torch.eye(3), torch.arange(3.0)[:, None])
    >>> out.flatten().tolist(), layer.attention_weights.tolist()
    ([2.0, 0.0], [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])

    Args:
        mode: "sample": draw in training, take the largest score in eval; "argmax": always the largest.
        gradient: "straight_through": backward is that of soft attention; "reinforce": the call returns
            (out, log_prob), log_prob [B, Lq] the logarithms of the chosen keys' probabilities, for the loss.
        scale: of the scores; 1 / sqrt(D) where None.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Xu et al., "Show, Attend and Tell", ICML 2015, section 4.1.
    """

    def __init__(
        self, mode: str = "sample", gradient: str = "straight_through", scale: float | None = None
    ) -> None:
        super().__init__()
        check_choices(mode, gradient)
        self.mode, self.gradient = mode, gradient
        self.scale = None if scale is None else check_number("scale", scale)
        self._chosen: tuple[Tensor, int, torch.dtype] | None = None

    def _attend(self, call: Call, lens: Tensor | None, mask: Mask | Tensor | None) -> Any:
        call.scale, seqlen_k = self.scale, call.k.shape[-2]
        *results, index = attend_hard(call, self.mode if self.training else "argmax", self.gradient)
        self._chosen = None if is_transformed() else (index, seqlen_k, results[0].dtype)
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
