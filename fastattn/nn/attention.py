"""Attention: score, softmax, weighted sum, with any score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import leading
from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.checks import not_a_bias
from fastattn.masks import Mask, MaskShape
from fastattn.nn.layer import (
    NAMES,
    AttentionLayer,
    ValidLens,
    check_ranks,
    check_versions,
    is_transformed,
    kept,
    versions,
    visible_keys,
)
from fastattn.nn.scores import SCORES, AdditiveScore, ProductScore
from fastattn.validation import check_number
from fastattn.weights import attention_weights

Score = Callable[[Tensor, Tensor], Tensor]

_LAYOUT = "[B, L, D], [B, H, L, D] or [L, D]"


class Attention(AttentionLayer):
    """out_i = sum_j softmax_j(score(q_i, k_j)) v_j: the three steps of attention, with any score.

    Each step can be looked at: `scores(queries, keys)`, `weights(queries, keys)`, and the call itself; and
    after a call `attention_scores` and `attention_weights`. All named scores run on fused
    kernels, which never make the matrix of scores; other modules' scores are a bias there.

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

    _seen: tuple[Tensor, Tensor] | None = None  # the last call's queries and keys
    _seen_versions: dict[str, list[tuple[Tensor, int]]] | None = None

    def __init__(self, score: str | Score = "scaled_dot", dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        if isinstance(score, str):
            if score not in SCORES:
                raise ValueError(f"score must be one of {', '.join(SCORES)}, or a module, got {score!r}")
            try:
                score = SCORES[score](**options)
            except TypeError as error:
                raise TypeError(f"options must fit the score {score!r}: {error}") from error
        elif isinstance(score, type):
            raise TypeError(f"score must be a name or a module, got the class {score.__name__}: make one")
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
        valid_lens: ValidLens | None = None,
        mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
    ) -> Tensor:
        """The values' weighted sums.

        Args:
            queries: [B, Lq, Dq], [B, H, Lq, Dq] with heads, or [Lq, Dq] without a batch.
            keys: [B, Lk, Dk] and so on; None: the queries, which is self-attention.
            values: [B, Lk, Dv] and so on; None: the keys.
            valid_lens: int [B] or [B, Lq]: how many of the first keys are visible.
            mask: a fastattn.masks.Mask, or bool, True = attend: [Lq, Lk], [B, Lq, Lk] or [B, H, Lq, Lk].
            bias: added to the scores: a tensor broadcastable to [B, H, Lq, Lk], or a fastattn.biases.Bias.
        Returns:
            [B, Lq, Dv] and so on; 0 for a query that sees no key.
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        keys = queries if keys is None else keys
        values = keys if values is None else values
        check_ranks((2, 3, 4), _LAYOUT, queries=queries, keys=keys, values=values)
        call = self._call(queries, keys, valid_lens, mask, bias)
        call.v = values
        call.dropout_p = float(self.dropout) if self.training else 0.0
        self._seen = self._seen_versions = None
        if not is_transformed():
            self._seen = kept(queries), kept(keys)
            self._seen_versions = versions(dict(zip(("queries", "keys"), self._seen, strict=True)))
        return leading.run(self._remember(call))

    def scores(self, queries: Tensor, keys: Tensor | None = None) -> Tensor:
        """The first step alone, [B, Lq, Lk] and so on, without bias or mask."""
        keys = queries if keys is None else keys
        check_ranks((2, 3, 4), _LAYOUT, queries=queries, keys=keys)
        scores = self.score(queries, keys)
        lead = torch.broadcast_shapes(queries.shape[:-2], keys.shape[:-2])
        want = (*lead, queries.shape[-2], keys.shape[-2])
        if not isinstance(scores, Tensor) or scores.shape != want:
            got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"score must return a tensor {list(want)} for these queries and keys, got {got}")
        return scores

    def weights(
        self,
        queries: Tensor,
        keys: Tensor | None = None,
        valid_lens: ValidLens | None = None,
        mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
    ) -> Tensor:
        """The first two steps, [B, Lq, Lk] and so on: rows sum to 1, or to 0 where no key is visible.

        Args: as for the call.
        Returns:
            Weights that are differentiable, as for a loss on them, in float32 (float64 for float64).
            `attention_weights`, without gradient, come from the kernels instead.
        """
        keys = queries if keys is None else keys
        check_ranks((2, 3, 4), _LAYOUT, queries=queries, keys=keys)
        call = self._call(queries, keys, valid_lens, mask, bias, fused=isinstance(self.score, ProductScore))
        call.v = call.k[..., :1]
        lead = leading.fold(call)
        found = attention_weights(call.q, call.k, mask=call.mask, bias=call.bias, scale=call.scale)
        return leading.unfold(found, lead)

    @property
    def attention_scores(self) -> Tensor | None:
        """The last call's scores without bias, mask and gradient, by the score as it is now; or None."""
        if self._seen is None:
            return None
        check_versions(self._seen_versions, "attention_scores")
        with torch.no_grad():
            return self.scores(*self._seen)

    def _call(
        self, queries: Tensor, keys: Tensor, valid_lens: Any, mask: Any, bias: Any, fused: bool = True
    ) -> Call:
        """The call, without values, that has this layer's scores.

        Args:
            fused: whether the kernels may compute the scores; otherwise they are made here, as a bias.
        """
        call = Call("attention", queries, keys, keys, scale=1.0, names=NAMES)
        call.mask = visible_keys(mask, valid_lens, queries, keys.shape[-2])
        call.bias = (
            bias.unsqueeze(1) if isinstance(bias, Tensor) and bias.dim() == queries.dim() == 3 else bias
        )
        if fused and isinstance(self.score, ProductScore):
            call.q, call.k, call.scale = self.score.operands(queries, keys)
        elif fused and isinstance(self.score, AdditiveScore):
            call.q, call.k, call.score_weights = self.score.operands(queries, keys)
            call.score = "additive"
        else:
            # Products of nothing: the scores are all bias, and the same kernels do the rest.
            nothing = queries.new_zeros(())
            call.q, call.k = (nothing.expand(*x.shape[:-1], 1) for x in (queries, keys))
            scores = self.scores(queries, keys)
            scores = scores if scores.dtype == torch.float32 else scores.to(queries.dtype)
            call.bias = _sum(scores.unsqueeze(1) if scores.dim() == 3 else scores, call.bias)
        return call

    def __getstate__(self) -> dict[str, Any]:
        seen = ("_seen", "_seen_versions")
        return {name: value for name, value in super().__getstate__().items() if name not in seen}


def _sum(scores: Tensor, bias: Bias | Tensor | None) -> Tensor:
    """Scores [B, H, Lq, Lk] or [Lq, Lk] and a bias, in one tensor."""
    if bias is None:
        return scores
    if isinstance(bias, Bias):
        batch, heads, seqlen_q, seqlen_k = scores[(None,) * (4 - scores.dim())].shape
        shape = MaskShape(batch, heads, seqlen_q, seqlen_k)
        bias = bias.to_dense(shape, scores.device, scores.dtype)
    elif not isinstance(bias, Tensor):
        raise not_a_bias("bias", bias)
    return scores + bias
