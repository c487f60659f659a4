"""additive_attention: Bahdanau's score, on the fused kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn import leading
from fastattn.call import Call
from fastattn.masks import Mask


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """out_i = sum_j p_ij v_j with p_i = softmax_j(w . tanh(q_i + k_j)) over visible j.

    No [..., Lq, Lk, H] tensor is made, forward or backward, where the CPU kernels run.

    >>> q, k, v = torch.randn(2, 4, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 3)
    >>> out, lse = additive_attention(q, k, v, torch.randn(8), return_lse=True)
    >>> list(out.shape), list(lse.shape)
    ([2, 4, 3], [2, 4])

    Args:
        q: [..., Lq, H], queries already projected to H hidden units; float32, bfloat16, float16 or float64.
        k: [..., Lk, H], keys likewise, q's dtype.
        v: [..., Lk, Dv], q's dtype. The leading dimensions of q, k and v broadcast.
        w: [H], any of these dtypes.
        mask: a fastattn.masks.Mask (the first leading dimension is its batch, a second its heads), or bool
            broadcastable to [..., Lq, Lk], True = attend.
        dropout_p, dropout_seed, backend: as in `attention`.
        return_lse: whether to return lse too.
    Returns:
        out [..., Lq, Dv] in q's dtype; with return_lse also lse [..., Lq], float32 (float64 for float64). A
        row with no visible key has out 0, gradients 0 and lse -inf.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got.
    Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate",
    ICLR 2015, appendix A.1.2.
    """
    call = Call(
        "attention",
        q,
        k,
        v,
        mask=mask,
        scale=1.0,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        backend=backend,
        score="additive",
        score_weights=w,
        names={"score_weights": "w"},
    )
    return leading.run(call)
