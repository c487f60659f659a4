"""LocalAttention: each query attends to a window of keys around a centre."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import leading
from fastattn.call import Call
from fastattn.checks import check_int
from fastattn.execution import autocast
from fastattn.hard import choose_keys
from fastattn.masks import Mask, as_mask, padding, window
from fastattn.masks.space import Pairs
from fastattn.nn.layer import AttentionLayer, ValidLens, is_transformed, visible_keys
from fastattn.spec import accumulate_dtype
from fastattn.validation import check_number, check_tensor, validate

CENTRES = ("monotonic", "predictive", "argmax")


class LocalAttention(AttentionLayer):
    """Attention over the keys j with |j - p_i| <= window, the only ones that are computed.

    The centre p_i is the query's own position i ("monotonic", Luong's local-m); predicted, S sigmoid(v_p .
    tanh(W_p q_i)) with S the number of valid keys, the weights then being multiplied by exp(-(j - p_i)^2 /
    (2 s^2)), s = window / 2, and adding up to less than 1 ("predictive", local-p); or the key of the largest
    score ("argmax": locate hard, then look softly). Time grows with Lq * window, but that finding the largest
    score looks at every key once; memory is that of the arguments, times the window for "predictive".

    >>> layer = LocalAttention(window=1)
    >>> out = layer(torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 3))
    >>> list(out.shape), (layer.attention_weights[0] > 0).int().tolist()[1]
    ([2, 5, 3], [1, 1, 1, 0, 0])

    Args:
        window: D, the keys on each side of the centre.
        centre: "monotonic", "predictive" or "argmax".
        query_size: features of a query; needed by "predictive" alone.
        scale: of the scores scale q_i . k_j; 1 / sqrt(features) where None.
        device, dtype: of the parameters W_p [query_size, query_size] and v_p [1, query_size].
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation",
    EMNLP 2015, section 3.2, equations 9 and 10.
    """

    def __init__(
        self,
        window: int,
        centre: str = "monotonic",
        query_size: int | None = None,
        scale: float | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if centre not in CENTRES:
            raise ValueError(f"centre must be one of {', '.join(CENTRES)}, got {centre!r}")
        # A window of no width has no Gaussian.
        self.window = check_int("window", window, 1 if centre == "predictive" else 0)
        self.centre = centre
        self.scale = None if scale is None else check_number("scale", scale)
        if centre == "predictive":
            if query_size is None:
                raise ValueError('query_size must be given with centre="predictive", got None')
            size = check_int("query_size", query_size, 1)
            self.W_p = nn.Linear(size, size, bias=False, device=device, dtype=dtype)
            self.v_p = nn.Linear(size, 1, bias=False, device=device, dtype=dtype)
        self._weights: tuple[Tensor, Tensor, Tensor, int, torch.Size] | None = None

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        valid_lens: ValidLens | None = None,
        mask: Mask | Tensor | None = None,
    ) -> Tensor:
        """[B, Lq, Dv].

        Args:
            queries: [B, Lq, features], or [Lq, features] without a batch, as keys and values then are.
            keys: [B, Lk, features].
            values: [B, Lk, Dv].
            valid_lens: int [B] or [B, Lq]: how many of the first keys are visible.
            mask: a fastattn.masks.Mask, or bool broadcastable to [B, Lq, Lk], True = attend.
        """
        for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
            if check_tensor(name, tensor).dim() not in (2, 3):
                raise ValueError(f"{name} must be [B, length, features], got shape {list(tensor.shape)}")
        visible = visible_keys(mask, valid_lens, queries)
        names = {"q": "queries", "k": "keys", "v": "values"}
        call = Call("attention", queries, keys, values, mask=visible, scale=self.scale, names=names)
        if self.centre == "predictive":
            return self._around_predictions(call, valid_lens)
        if self.centre == "argmax":
            nearby = self._around_largest(call)
        else:
            nearby = window(self.window, self.window, align="top_left")
        if isinstance(visible, Tensor) and visible.dim() == 3:
            visible = visible.unsqueeze(1)
        call.mask = nearby if visible is None else nearby & visible
        return leading.run(self._remember(call))

    def _around_largest(self, call: Call) -> Mask:
        """The windows around each query's key of the largest score."""
        located = replace(call)
        leading.fold(located)
        autocast(located)
        validate(located)
        index = choose_keys(located, None)[:, 0]
        return padding(index + self.window + 1, (index - self.window).clamp(min=0))

    def _around_predictions(self, call: Call, valid_lens: ValidLens | None) -> Tensor:
        """Luong's local-p, on copies of each query's window of keys and values."""
        lead = leading.fold(call)
        autocast(call)
        validate(call)
        seqlen_k, dtype = call.k.shape[2], accumulate_dtype(call.q.dtype)
        centre = self._predict(call.q, valid_lens, seqlen_k).to(dtype)
        first = torch.ceil(centre.detach() - self.window).long()
        j = first.unsqueeze(-1) + torch.arange(2 * self.window + 1, device=first.device)
        seen = (j >= 0) & (j < seqlen_k) & (j <= centre.detach().unsqueeze(-1) + self.window)
        j = j.clamp(0, max(seqlen_k - 1, 0))
        seen = seen & _visible(call, j)
        distance = (j - centre.unsqueeze(-1)) / (self.window / 2)
        score = call.scale_value() * (call.q.unsqueeze(-2) * _windows(call.k, j, seen)).sum(-1).to(dtype)
        empty = ~seen.any(-1, keepdim=True)  # must not reach softmax: its gradient would be NaN
        weights = torch.where(seen | empty, score, -math.inf).softmax(-1) * torch.exp(-(distance**2) / 2)
        weights = torch.where(empty, 0.0, weights)
        self._weights = None if is_transformed() else (weights.detach(), j, seen, seqlen_k, lead)
        out = (weights.to(call.v.dtype).unsqueeze(-1) * _windows(call.v, j, seen)).sum(-2)
        return leading.unfold(out, lead)

    def _predict(self, queries: Tensor, valid_lens: ValidLens | None, seqlen_k: int) -> Tensor:
        """The centre of each query [B, 1, Lq, features], between 0 and its number of valid keys."""
        if queries.shape[-1] != self.W_p.in_features:
            raise ValueError(f"queries must have {self.W_p.in_features} features, got {queries.shape[-1]}")
        share = torch.sigmoid(self.v_p(torch.tanh(self.W_p(queries)))).squeeze(-1)
        if valid_lens is None:
            return seqlen_k * share
        lens = torch.as_tensor(valid_lens, device=queries.device).clamp(0, seqlen_k)
        return lens.reshape(share.shape[0], 1, -1) * share

    @property
    def attention_weights(self) -> Tensor | None:
        """The weights of the last call, [B, Lq, Lk]; of "predictive" they add up to less than 1."""
        if self._weights is None:
            return super().attention_weights
        weights, j, seen, seqlen_k, lead = self._weights
        whole = weights.new_zeros(*weights.shape[:3], seqlen_k)
        return leading.unfold(whole.scatter_add_(3, j, torch.where(seen, weights, 0.0)), lead)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_weights": None}

    def extra_repr(self) -> str:
        return f"window={self.window}, centre={self.centre!r}"


def _visible(call: Call, j: Tensor) -> Tensor:
    """Whether the call's mask lets each query see its keys j [B, 1, Lq, W]."""
    if call.mask is None:
        return torch.ones_like(j, dtype=torch.bool)
    shape, device = call.mask_shape(), call.q.device
    mask = as_mask(call.mask)
    mask._check(shape, device)
    b = torch.arange(shape.batch, device=device).view(-1, 1, 1, 1)
    i = torch.arange(shape.seqlen_q, device=device).view(1, 1, -1, 1)
    return mask._visible(Pairs(shape, b, torch.zeros_like(b[:1]), i, j))


def _windows(x: Tensor, j: Tensor, seen: Tensor) -> Tensor:
    """x [B, 1, Lk, n] at j [B, 1, Lq, W]: [B, 1, Lq, W, n], 0 where not seen."""
    if x.shape[2] == 0:
        return x.new_zeros(*j.shape, x.shape[3])
    at = j.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[3])
    return x.gather(2, at).unflatten(2, j.shape[2:]).masked_fill(~seen.unsqueeze(-1), 0)
