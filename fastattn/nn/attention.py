"""Attention: score, softmax, weighted sum, with any score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.functional import run
from fastattn.masks import Mask, MaskShape
from fastattn.nn.scores import SCORES, ProductScore
from fastattn.nn.weighted import Weighted, check_ranks, merge_visible
from fastattn.validation import check_number
from fastattn.weights import attention_weights

Score = Callable[[Tensor, Tensor], Tensor]

_LAYOUT = "[B, L, D] or [B, H, L, D]"
_NAMES = {"q": "queries", "k": "keys", "v": "values"}


class Attention(Weighted):
    """out_i = sum_j softmax_j(score(q_i, k_j)) v_j: the three steps of attention, with any score.

    Each step can be looked at: `scores(queries, keys)`, `weights(queries, keys)`, and the call itself; and
    after a call `attention_scores` and `attention_weights`. Scores that are products run on the fused
    kernels, which never make the matrix of scores.

    >>> layer = Attention("cosine", temperature=0.1)
    >>> queries, keys, values = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    >>> out = layer(queries, keys, values, valid_lens=torch.tensor([2, 5]))
    >>> list(out.shape), list(layer.attention_weights.shape)
    ([2, 3, 4], [2, 3, 5])

    Args:
        score: "dot", "scaled_dot", "cosine" (temperature=1.0, learn_temperature=False), "bilinear"
            (query_size, key_size) or "additive" (query_size, key_size, num_hiddens); or a module, or any
            function, from queries [..., Lq, Dq] and keys [..., Lk, Dk] to scores [..., Lq, Lk].
        dropout: probability of dropping a weight in training.
        options: of the named score, as in brackets; see `fastattn.nn.scores`.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Bahdanau et al. 2015 (arXiv 1409.0473), equations 5 and 6; scores: Luong et al. 2015 (arXiv
    1508.04025), section 3.1.
    """

    def __init__(self, score: str | Score = "scaled_dot", dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        if isinstance(score, str):
            if score not in SCORES:
                raise ValueError(f"score must be one of {', '.join(SCORES)}, or a module, got {score!r}")
            score = SCORES[score](**options)
        elif options:
            raise TypeError(f"options must go with a score's name, got {', '.join(options)} beside a module")
        elif not callable(score):
            raise TypeError(f"score must be a name or a module, got {type(score).__name__}")
        if not 0 <= check_number("dropout", dropout) <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.score, self.dropout = score, dropout

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        valid_lens: Tensor | Sequence[int] | None = None,
        mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
    ) -> Tensor:
        """The values' weighted sums.

        Args:
            queries: [B, Lq, Dq], or [B, H, Lq, Dq] with heads (also grouped where the score is a product).
            keys: [B, Lk, Dk] and so on; None: the queries, which is self-attention.
            values: [B, Lk, Dv] and so on; None: the keys.
            valid_lens: int [B] or [B, Lq]: how many of the first keys are visible.
            mask: a fastattn.masks.Mask, or bool, True = attend: [Lq, Lk], [B, Lq, Lk] or [B, H, Lq, Lk].
            bias: added to the scores: a tensor broadcastable to [B, H, Lq, Lk], or a fastattn.biases.Bias.
        Returns:
            [B, Lq, Dv], or [B, H, Lq, Dv]; 0 for a query that sees no key.
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        keys = queries if keys is None else keys
        values = keys if values is None else values
        check_ranks((3, 4), _LAYOUT, queries=queries, keys=keys, values=values)
        self._last = (queries, keys, valid_lens, mask, bias)
        values = values if values.dim() == 4 else values.unsqueeze(1)
        q, k, options = self._operands(*self._last)
        dropout_p = float(self.dropout) if self.training else 0.0
        out = run(Call("attention", q, k, values, dropout_p=dropout_p, names=_NAMES, **options))
        return out if queries.dim() == 4 else out.squeeze(1)

    def scores(self, queries: Tensor, keys: Tensor | None = None) -> Tensor:
        """The first step alone, [B, Lq, Lk] or [B, H, Lq, Lk], without bias or mask."""
        keys = queries if keys is None else keys
        check_ranks((3, 4), _LAYOUT, queries=queries, keys=keys)
        scores = self.score(queries, keys)
        want = (*queries.shape[:-1], keys.shape[-2])
        if not isinstance(scores, Tensor) or scores.shape != want:
            got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"score must return a tensor {list(want)} for these queries and keys, got {got}")
        return scores

    def weights(
        self,
        queries: Tensor,
        keys: Tensor | None = None,
        valid_lens: Tensor | Sequence[int] | None = None,
        mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
    ) -> Tensor:
        """The first two steps, [B, Lq, Lk] or [B, H, Lq, Lk]: rows sum to 1, or to 0 where no key is visible.

        Args: as for the call. Differentiable.
        """
        keys = queries if keys is None else keys
        check_ranks((3, 4), _LAYOUT, queries=queries, keys=keys)
        q, k, options = self._operands(queries, keys, valid_lens, mask, bias)
        weights = attention_weights(q, k, **options).to(queries.dtype)
        return weights if queries.dim() == 4 else weights.squeeze(1)

    @property
    def attention_scores(self) -> Tensor:
        """The scores of the last call, without bias or mask.

        Raises:
            RuntimeError: there was no call yet.
        """
        if self._last is None:
            raise RuntimeError("attention_scores are those of the last call, and this layer was not called")
        return self.scores(*self._last[:2])

    def _operands(
        self, queries: Tensor, keys: Tensor, valid_lens: Any, mask: Any, bias: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """q, k and options of `fastattn.attention` whose scores are this layer's."""
        scale = 1.0
        if isinstance(self.score, ProductScore):
            q, k, scale = self.score.operands(queries, keys)
        else:
            # No features, so no products: the scores are all bias, and the same kernels do the rest.
            q, k = queries[..., :0], keys[..., :0]
            scores = self.scores(queries, keys)
            scores = scores.to(q.dtype) if scores.dtype != torch.float32 else scores
            bias = _sum(scores if scores.dim() == 4 else scores.unsqueeze(1), bias)
        if q.dim() == 3:
            q, k = q.unsqueeze(1), k.unsqueeze(1)
        return q, k, {"mask": merge_visible(mask, valid_lens), "bias": bias, "scale": scale}


def _sum(scores: Tensor, bias: Bias | Tensor | None) -> Tensor:
    """Scores [B, H, Lq, Lk] and a bias, in one tensor."""
    if bias is None:
        return scores
    if isinstance(bias, Bias):
        bias = bias.to_dense(MaskShape(*scores.shape), scores.device, scores.dtype)
    elif not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor or a fastattn.biases.Bias, got {type(bias).__name__}")
    return scores + bias
