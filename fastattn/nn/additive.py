"""AdditiveAttention: Bahdanau's attention as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn import leading
from fastattn.call import Call
from fastattn.checks import check_int
from fastattn.masks import Mask
from fastattn.nn.layer import QueryLayer
from fastattn.nn.scores import check_features
from fastattn.validation import check_number


class AdditiveAttention(QueryLayer):
    """softmax_j(w_v . tanh(W_q q_i + W_k k_j)) v_j, summed over the visible keys: queries and keys may differ
    in size.

    Constructor, forward and parameters are those of "Dive into Deep Learning" (whose 1.0 leaves key_size and
    query_size to the first call). It differs where a row sees no key: the output is 0 there, not the mean of
    all values.

    >>> layer = AdditiveAttention(key_size=2, query_size=20, num_hiddens=8)
    >>> out = layer(torch.randn(3, 1, 20), torch.ones(3, 10, 2), torch.randn(3, 10, 4), valid_lens=[2, 6, 10])
    >>> list(out.shape), layer.attention_weights[0, 0, :3].tolist()
    ([3, 1, 4], [0.5, 0.5, 0.0])

    Args:
        key_size, query_size: features of a key and of a query.
        num_hiddens: H, the features that both are projected to.
        dropout: probability of dropping an attention weight in training.
        device, dtype: of the parameters W_q [H, query_size], W_k [H, key_size] and w_v [1, H].
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Bahdanau, Cho and Bengio, ICLR 2015, appendix A.1.2.
    """

    def __init__(
        self,
        key_size: int,
        query_size: int,
        num_hiddens: int,
        dropout: float = 0.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"key_size": key_size, "query_size": query_size, "num_hiddens": num_hiddens}
        for name, size in sizes.items():
            check_int(name, size, 1)
        if not 0 <= check_number("dropout", dropout) <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.dropout = dropout
        self.W_k = nn.Linear(key_size, num_hiddens, bias=False, device=device, dtype=dtype)
        self.W_q = nn.Linear(query_size, num_hiddens, bias=False, device=device, dtype=dtype)
        self.w_v = nn.Linear(num_hiddens, 1, bias=False, device=device, dtype=dtype)

    def _attend(self, call: Call, lens: Tensor | None, mask: Mask | Tensor | None) -> Tensor:
        check_features("queries", call.q, self.W_q.weight)
        check_features("keys", call.k, self.W_k.weight)
        call.q, call.k, call.scale = self.W_q(call.q), self.W_k(call.k), 1.0
        call.score, call.score_weights = "additive", self.w_v.weight[0]
        call.dropout_p = float(self.dropout) if self.training else 0.0
        return leading.run(self._remember(call))

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""
