"""LocalAttention: each query attends to a window of keys around a centre."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import execution, leading
from fastattn.autocast import without_autocast
from fastattn.call import Call
from fastattn.checks import check_int
from fastattn.hard import choose_keys
from fastattn.masks import Mask, as_mask, padding, window
from fastattn.masks.reordered import Reordered
from fastattn.nn.layer import QueryLayer, is_transformed, join_lens
from fastattn.nn.scores import check_features
from fastattn.spec import accumulate_dtype
from fastattn.validation import check_number, validate

CENTRES = ("monotonic", "predictive", "argmax")


class LocalAttention(QueryLayer):
    """Attention over the keys j with |j - p_i| <= window, the only ones that are computed.

    The centre p_i is the query's own position i ("monotonic", Luong's local-m); predicted, S sigmoid(v_p .
    tanh(W_p q_i)) with S the number of valid keys, the weights then being multiplied by exp(-(j - p_i)^2 /
    (2 s^2)), s = window / 2, and adding up to less than 1 ("predictive", local-p); or the key of the largest
    score ("argmax": locate hard, then look softly). Time grows with Lq * window, but that finding the largest
    score looks at every key once; memory is that of the arguments.

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

    _ranks = (2, 3)
    # Of the last call, where its queries were sorted: their places, what the weights are multiplied by, and
    # the leading dimensions.
    _sorted: tuple[Tensor, Tensor | None, torch.Size] | None = None

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

    def _attend(self, call: Call, lens: Tensor | None, mask: Mask | Tensor | None) -> Tensor:
        call.scale, self._sorted = self.scale, None
        if self.centre != "monotonic":
            return self._around_centres(call, lens, mask)
        nearby, seen = window(self.window, self.window, align="top_left"), call.mask
        if isinstance(seen, Tensor) and seen.dim() == 3:
            seen = seen.unsqueeze(1)
        call.mask = nearby if seen is None else nearby & as_mask(seen)
        return leading.run(self._remember(call))

    def _around_centres(self, call: Call, lens: Tensor | None, mask: Mask | Tensor | None) -> Tensor:
        """The queries sorted by their windows: kernels skip keys that none of 64 neighbours sees."""
        if self.centre == "predictive":
            check_features("queries", call.q, self.W_p.weight)
        lead = leading.fold(call)
        execution.autocast(call)
        validate(call)
        centres = self._centres(call, lens)
        at = centres.detach().nan_to_num(0.0)  # a NaN query has a window too, to show itself in
        first = torch.ceil(at - self.window).long()
        ends = torch.floor(at + self.window).long() + 1
        ends = ends if lens is None else ends.minimum(lens.view(len(lens), -1))
        order = torch.argsort(first, dim=-1, stable=True)
        seen = join_lens(mask, None, call.q)
        if seen is not None:
            seen = as_mask(seen)
            if torch.compiler.is_compiling() or is_transformed():  # where a mask cannot be reordered
                order = torch.arange(first.shape[1], device=first.device).expand_as(first)
            else:
                seen = Reordered(seen, order)
        centres, first, ends = (x.gather(1, order) for x in (centres, first, ends))
        nearby = padding(ends, first.clamp(min=0))
        call.q, call.mask = _rows(call.q, order), nearby if seen is None else nearby & seen
        out, share = self._run(call, centres, first)
        back = order.argsort(-1)
        if not is_transformed():
            self._sorted = back, share, lead
        return leading.unfold(_rows(out, back), lead)

    def _centres(self, call: Call, lens: Tensor | None) -> Tensor:
        """p_i [B, Lq], differentiable where predicted; -1 for a query that sees no key."""
        if self.centre == "argmax":
            return choose_keys(call, None)[:, 0].to(accumulate_dtype(call.q.dtype))
        share = torch.sigmoid(self.v_p(torch.tanh(self.W_p(call.q)))).flatten(1)
        share = share.to(accumulate_dtype(call.q.dtype))
        return share * (call.k.shape[2] if lens is None else lens.view(len(lens), -1))

    def _run(self, call: Call, centres: Tensor, first: Tensor) -> tuple[Tensor, Tensor | None]:
        """out [B, 1, Lq, Dv] of sorted queries, and what their weights, detached, are to be multiplied by."""
        if self.centre == "argmax":
            return execution.run(self._remember(call)), None
        narrow, dtype = call.q.dtype, centres.dtype
        call.q, call.k, call.v = call.q.to(dtype) * call.scale_value(), call.k.to(dtype), call.v.to(dtype)
        call.scale, call.return_lse = 1.0, True
        with without_autocast(call.q.device):  # its casts are made; positions want more digits
            _, whole = execution.run(replace(call, v=torch.zeros_like(call.v[..., :1])))
            constant = _add_gaussian(call, centres, first, self.window)
            out, lse = execution.run(self._remember(call))
        # The kernels' weights, with the Gaussian in their scores, add up to 1; Luong's to this.
        share = torch.where(whole == -torch.inf, 0.0, lse + constant.unsqueeze(1) - whole)
        share = share.exp().unsqueeze(-1)
        return (out * share).to(narrow), share.detach()

    @property
    def attention_weights(self) -> Tensor | None:
        """The weights of the last call, [B, Lq, Lk]; of "predictive" they add up to less than 1."""
        if self._sorted is None or self._last is None:
            return super().attention_weights
        back, share, lead = self._sorted
        with without_autocast(back.device):
            weights = super().attention_weights
        return leading.unfold(_rows(weights if share is None else weights * share, back), lead)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_sorted"}

    def extra_repr(self) -> str:
        return f"window={self.window}, centre={self.centre!r}"


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows `order` [B, Lq] of x [B, 1, Lq, n]."""
    return x.gather(2, order[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3]))


def _add_gaussian(call: Call, centres: Tensor, first: Tensor, reach: int) -> Tensor:
    """Have the call add -(j - p)^2 / (2 s^2), s = reach / 2, to its scores, but for a number for each row.

    The square is 2 j p - j^2 - p^2, so that products of a few features more make it, and gradients of p are
    theirs. Large positions would cancel: so they are counted from within 2 reach, f(j) = j mod 4 reach -
    2 reach, and for a window that this cuts in two from half a period further on.

    Args:
        call: q [B, 1, Lq, D] and k [B, 1, Lk, D], which become wider by 4; its scale is 1.
        centres: p [B, Lq]; first: int [B, Lq], the first j with j >= p - reach.
    Returns:
        [B, Lq], to be added to the call's lse.
    """
    half, inverse = 2 * reach, 4.0 / reach**2  # 1 / s^2
    phases = torch.tensor([0, half], device=first.device)
    j = torch.arange(call.k.shape[2], device=first.device)
    f = ((j[:, None] + phases).remainder(2 * half) - half).to(call.k.dtype)  # [Lk, 2]
    features = torch.stack([f * f, f], -1).flatten(1)
    begin = first.remainder(2 * half)
    is_cut = begin >= half
    p = (torch.where(is_cut, begin - half, begin) - half) + (centres - first)
    slopes = torch.stack([torch.full_like(p, -0.5 * inverse), p * inverse], -1)
    chosen = torch.stack([~is_cut, is_cut], -1)  # [B, Lq, 2]
    slopes = torch.where(chosen.unsqueeze(-1), slopes.unsqueeze(-2), 0.0).flatten(-2)  # [B, Lq, 4]
    call.q = torch.cat([call.q, slopes.unsqueeze(1)], -1)
    call.k = torch.cat([call.k, features.expand(*call.k.shape[:2], -1, -1)], -1)
    return -0.5 * inverse * p * p
