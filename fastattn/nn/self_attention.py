"""Self-attention as lessons write it: x in, (output, weights) out, and masks in which 1 = blocked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn import leading
from fastattn.call import Call
from fastattn.checks import check_int
from fastattn.execution import has_values
from fastattn.masks import Mask
from fastattn.multi_head import multi_head_attention
from fastattn.nn.layer import AttentionLayer, ValidLens, check_ranks, is_transformed, visible_keys
from fastattn.nn.scores import check_dtype
from fastattn.validation import check_tensor
from fastattn.weights import attention_weights

_NAMES = {"q": "x", "k": "x", "v": "x"}


class _LessonLayer(AttentionLayer):
    """layer(x, mask, valid_lens) -> (output, weights), in which 1 = blocked."""

    d_model: int
    W_q: nn.Linear

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Mask | None = None,
        valid_lens: ValidLens | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(output [B, L, d_model], weights [B, L, L], or [B, H, L, L] of heads).

        Args:
            x: [B, L, d_model].
            mask: 1 (or True) = blocked: [L, L] or [B, L, L], with heads also [B, 1 or H, L, L]; or a
                fastattn.masks.Mask, of what is visible.
            valid_lens: int [B] or [B, L]: how many of the first tokens are visible.
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        check_ranks((3,), f"[B, L, {self.d_model}]", x=x)
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x must be [B, L, {self.d_model}], got shape {list(x.shape)}")
        check_dtype("x", x, self.W_q.weight)
        return self._attend(x, visible_keys(self._visible(mask), valid_lens, x, x.shape[1]))

    def _visible(self, mask: Tensor | Mask | None) -> Tensor | Mask | None:
        return _unblocked(mask)

    def _attend(self, x: Tensor, visible: Tensor | Mask | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class SingleHeadAttention(_LessonLayer):
    """softmax((x W_q) (x W_k)ᵀ / sqrt(d_k)) (x W_v), with d_v = d_model ≠ d_k and no biases.

    Blocked pairs get no weight, so a row that is blocked wholly is 0, output and weights. The usual
    `scores + mask * -1e9` is another thing there: near -1e9 the numbers of float32 lie 64 apart, so scores
    drown, all weights become 1 / L, and the row is the mean of the very values that were to stay hidden.

    >>> output, weights = SingleHeadAttention(d_model=16, d_k=4)(torch.randn(2, 5, 16))
    >>> list(output.shape), list(weights.shape)
    ([2, 5, 16], [2, 5, 5])

    Args:
        d_model: features of x and of the output.
        d_k: features of queries and keys.
        device, dtype: of the weights; torch's defaults where None.
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """

    def __init__(
        self,
        d_model: int = 512,
        d_k: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_k = check_int("d_model", d_model, 1), check_int("d_k", d_k, 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W_q = nn.Linear(d_model, d_k, bias=False, **factory)
        self.W_k = nn.Linear(d_model, d_k, bias=False, **factory)
        self.W_v = nn.Linear(d_model, d_model, bias=False, **factory)

    def _attend(self, x: Tensor, visible: Tensor | Mask | None) -> tuple[Tensor, Tensor]:
        call = Call("attention", self.W_q(x), self.W_k(x), self.W_v(x), mask=visible, names=_NAMES)
        output = leading.run(self._remember(call))  # which brings the call to four dimensions
        weights = attention_weights(call.q, call.k, mask=call.mask)
        return output, weights.to(output.dtype).squeeze(1)


class MultiHeadSelfAttention(_LessonLayer):
    """concat_h(softmax(q_h k_hᵀ / sqrt(d_k)) v_h) W_o with q, k, v = x W_q, x W_k, x W_v, d_k = d_model / H.

    Output and weights come from one pass. `nn.MultiheadAttention` is the general layer: other keys than
    queries, grouped heads, dropout, caches, PyTorch's state dicts.

    >>> output, weights = MultiHeadSelfAttention(d_model=16, num_heads=2)(torch.randn(2, 5, 16))
    >>> list(output.shape), list(weights.shape)
    ([2, 5, 16], [2, 2, 5, 5])

    Args:
        d_model: features of x and of the output.
        num_heads: H, which must divide d_model.
        bias: whether the four projections have biases.
        device, dtype: of the weights; torch's defaults where None.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
    """

    def __init__(
        self,
        d_model: int = 512,
        num_heads: int = 8,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.num_heads = check_int("d_model", d_model, 1), check_int("num_heads", num_heads, 1)
        if d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads={num_heads}, got {d_model}")
        for name in ("W_q", "W_k", "W_v", "W_o"):
            self.add_module(name, nn.Linear(d_model, d_model, bias, device, dtype))

    W_q: nn.Linear
    W_k: nn.Linear
    W_v: nn.Linear
    W_o: nn.Linear

    def _visible(self, mask: Tensor | Mask | None) -> Tensor | Mask | None:
        visible = _unblocked(mask)
        return visible.unsqueeze(1) if isinstance(visible, Tensor) and visible.dim() == 3 else visible

    def _attend(self, x: Tensor, visible: Tensor | Mask | None) -> tuple[Tensor, Tensor]:
        projections = (self.W_q, self.W_k, self.W_v)
        output, weights = multi_head_attention(
            x,
            in_proj_weight=[w.weight for w in projections],
            in_proj_bias=None if self.W_q.bias is None else torch.cat([w.bias for w in projections]),
            out_proj_weight=self.W_o.weight,
            out_proj_bias=self.W_o.bias,
            num_heads=self.num_heads,
            mask=visible,
            need_weights=True,
            average_weights=False,
        )
        self._last = None if is_transformed() else weights.detach()
        return output, weights


def _unblocked(mask: Any) -> Mask | Tensor | None:
    """What is visible, where a tensor says what is blocked."""
    if mask is None or isinstance(mask, Mask):
        return mask
    check_tensor("mask", mask)
    if mask.dtype != torch.bool and mask.numel() and has_values(mask):
        wrong = mask[(mask != 0) & (mask != 1)]
        if wrong.numel():
            raise ValueError(f"mask must hold 1 (blocked) and 0 (visible), got {wrong[0].item():g}")
    return mask == 0
