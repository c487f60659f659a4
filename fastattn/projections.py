"""From inputs to heads and back: the input projections of multi-head attention, laid out for the kernels.

Inputs that are one tensor share one product with the rows of a packed weight. The heads of q, k and v are
strided views of what the products leave; their gradients are written into tensors of the same layout, which
the backward products then read whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.call import Call
from fastattn.spec import FLOAT_DTYPES, dtype_name
from fastattn.validation import check_tensor

_NAMES = ("query", "key", "value")
_CALL_NAMES = {"q": "query", "k": "key", "v": "value"}
_TOGETHER = ((0, 1, 2),)  # the groups of packed self-attention: the whole weight is one product's


class HeadLayout(NamedTuple):
    """The numbers of a projection.

    Args:
        num_heads, num_heads_kv, head_dim: of q and out; of k and v; of each head.
        batch_first: whether inputs are [B, L, E], not [L, B, E].
        groups: which of q (0), k (1) and v (2) come out of which product, in order.
    """

    num_heads: int
    num_heads_kv: int
    head_dim: int
    batch_first: bool
    groups: tuple[tuple[int, ...], ...]

    def heads(self, which: int) -> int:
        return self.num_heads if which == 0 else self.num_heads_kv

    def rows(self) -> list[tuple[int, int]]:
        """The rows of the packed weight that belong to each group."""
        ends = [0]
        for group in self.groups:
            ends.append(ends[-1] + sum(map(self.heads, group)) * self.head_dim)
        return list(pairwise(ends))

    def split(self, packed: Sequence[Tensor]) -> list[Tensor]:
        """q [B, Hq, L, D], k and v [B, Hkv, S, D] as views of the groups' products."""
        views: list[Tensor] = []
        for group, tensor in zip(self.groups, packed, strict=True):
            heads = self.to_heads(tensor)
            counts = [self.heads(which) for which in group]
            views.extend(heads.split_with_sizes(counts, 1) if len(counts) > 1 else (heads,))
        return views

    def to_heads(self, packed: Tensor) -> Tensor:
        """[B, H, L, D] of [B, L, H D] or [L, B, H D]."""
        a, b, rows = packed.shape
        heads = packed.view(a, b, rows // self.head_dim, self.head_dim)
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def from_heads(self, heads: Tensor) -> Tensor:
        """The inverse of `to_heads`: a view where the heads lie side by side, as kernels leave them."""
        packed = heads.transpose(1, 2) if self.batch_first else heads.permute(2, 0, 1, 3)
        return packed.flatten(2)


class Projections(NamedTuple):
    """The inputs and weights of one call.

    Args:
        layout: its numbers.
        inputs: one for each group, [B, L, E] or [L, B, E].
        weights: one packed weight, or one for each group.
        bias: [(Hq + 2 Hkv) D] or None.
    """

    layout: HeadLayout
    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    bias: Tensor | None

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        weights: Tensor | tuple[Tensor, ...],
        bias: Tensor | None,
        num_heads: int,
        num_heads_kv: int,
        head_dim: int,
        batch_first: bool,
    ) -> Projections:
        key = query if key is None else key
        value = key if value is None else value
        packed = isinstance(weights, Tensor)
        groups: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,))
        inputs: tuple[Tensor, ...] = (query, key, value)
        if packed and value is key:
            groups, inputs = (_TOGETHER, (query,)) if key is query else (((0,), (1, 2)), (query, key))
        layout = HeadLayout(num_heads, num_heads_kv, head_dim, batch_first, groups)
        return Projections(layout, inputs, (weights,) if isinstance(weights, Tensor) else weights, bias)

    def parts(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(input, weight, bias) of each group's product."""
        if self.layout.groups == _TOGETHER:
            return [(self.inputs[0], self.weights[0], self.bias)]
        rows = self.layout.rows()
        packed = self._is_packed
        return [
            (
                x,
                self.weights[0][begin:end] if packed else self.weights[n],
                None if self.bias is None else self.bias[begin:end],
            )
            for n, (x, (begin, end)) in enumerate(zip(self.inputs, rows, strict=True))
        ]

    @property
    def _is_packed(self) -> bool:
        # The rows of a weight of its own begin at 0, as those of a packed one do for the first group.
        return len(self.weights) == 1

    def project(self) -> list[Tensor]:
        """Each group's product, [B, L, rows] or [L, B, rows]."""
        return [F.linear(*part) for part in self.parts()]

    def split(self) -> list[Tensor]:
        """q [B, Hq, L, D], k and v [B, Hkv, S, D], or those of them that there are."""
        return self.layout.split(self.project())

    def without(self, *dropped: int) -> Projections:
        """The same for q, k and v but the dropped ones, which must come last."""
        layout, kept = self.layout, []
        groups = []
        for n, group in enumerate(layout.groups):
            if rest := tuple(which for which in group if which not in dropped):
                groups.append(rest)
                kept.append(n)
        weights = self.weights if self._is_packed else tuple(self.weights[n] for n in kept)
        inputs = tuple(self.inputs[n] for n in kept)
        return Projections(layout._replace(groups=tuple(groups)), inputs, weights, self.bias)

    def backward(
        self, grads: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
        """Gradients of the inputs, of the weights and of the bias from those of the products.

        Args:
            grads: contiguous, in the layout of `project`.
            needs: whether each input, each weight and the bias wants its gradient.
        """
        count = len(self.inputs)
        need_weights, need_bias = needs[count : count + len(self.weights)], needs[-1]
        flat = [grad.flatten(0, 1) for grad in grads]
        parts = self.parts()
        dinputs = [
            (grad @ weight).view(x.shape) if need else None
            for grad, (x, weight, _), need in zip(flat, parts, needs[:count], strict=True)
        ]
        dweights: list[Tensor | None] = [
            torch.empty_like(weight, memory_format=torch.contiguous_format) if need else None
            for weight, need in zip(self.weights, need_weights, strict=True)
        ]
        targets = dweights
        if self._is_packed:
            whole = dweights[0]
            rows = self.layout.rows()
            targets = [None if whole is None else whole[begin:end] for begin, end in rows]
        for grad, x, into in zip(flat, self.inputs, targets, strict=True):
            if into is not None:
                torch.mm(grad.mT, x.flatten(0, 1), out=into)
        dbias = None
        if need_bias and self.bias is not None:
            sums = [grad.sum(0) for grad in flat]
            dbias = sums[0] if len(sums) == 1 else torch.cat(sums)
        return dinputs, dweights, dbias

    def call(self, **options: Any) -> Call:
        """The attention call on the heads, with stand-ins of their shapes in place of q, k and v."""
        layout, query, key = self.layout, self.inputs[0], self.inputs[min(1, len(self.inputs) - 1)]

        def stand_in(x: Tensor, heads: int) -> Tensor:
            batch, seqlen = x.shape[:2] if layout.batch_first else (x.shape[1], x.shape[0])
            return x.new_empty(()).expand(batch, heads, seqlen, layout.head_dim)

        q = stand_in(query, layout.num_heads)
        is_like_q = key is query and layout.num_heads_kv == layout.num_heads
        k = q if is_like_q else stand_in(key, layout.num_heads_kv)
        return Call("attention", q, k, k, names=_CALL_NAMES, **options)


def check_projections(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    weights: Tensor | tuple[Tensor, ...],
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    num_heads_kv: int,
    batch_first: bool,
) -> int:
    """The head_dim of a call whose tensors fit together.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    """
    key = query if key is None else key
    value = key if value is None else value
    inputs = (query, key, value)
    device = query.device if isinstance(query, Tensor) else None
    for name, x in zip(_NAMES, inputs, strict=True):
        if x is query and name != "query":
            continue
        check_tensor(name, x, device, "query")
        if x.dim() != 3:
            layout = "[B, L, E]" if batch_first else "[L, B, E]"
            raise ValueError(f"{name} must be 3-D {layout}, got shape {list(x.shape)}")
    if query.dtype not in FLOAT_DTYPES:
        raise TypeError(f"query must be floating point, got {dtype_name(query.dtype)}")
    _check_sizes(inputs, 0 if batch_first else 1)
    head_dim = _check_in_proj(weights, inputs, num_heads, num_heads_kv)
    if head_dim == 0:
        raise ValueError("in_proj_weight must have rows, got none")
    _check_vector("in_proj_bias", bias, (num_heads + 2 * num_heads_kv) * head_dim)
    check_tensor("out_proj_weight", out_weight, device, "query")
    if out_weight.dim() != 2 or out_weight.shape[1] != num_heads * head_dim:
        raise ValueError(
            f"out_proj_weight must be [E', {num_heads * head_dim}], got shape {list(out_weight.shape)}"
        )
    _check_vector("out_proj_bias", out_bias, out_weight.shape[0])
    given = weights if isinstance(weights, tuple) else (weights,)
    for name, tensor in (
        ("key", key),
        ("value", value),
        *(("in_proj_weight", weight) for weight in given),
        ("in_proj_bias", bias),
        ("out_proj_weight", out_weight),
        ("out_proj_bias", out_bias),
    ):
        if tensor is not None and tensor.dtype != query.dtype:
            found = dtype_name(tensor.dtype)
            raise TypeError(f"{name} must have query's dtype {dtype_name(query.dtype)}, got {found}")
    return head_dim


def _check_sizes(inputs: tuple[Tensor, ...], batch: int) -> None:
    """That the inputs, whose batch is that dimension, have the same batch size, and keys as many values."""
    query, key, value = inputs
    if key is query and value is query:
        return
    for name, x in zip(_NAMES[1:], inputs[1:], strict=True):
        if x.shape[batch] != query.shape[batch]:
            want, got = query.shape[batch], x.shape[batch]
            raise ValueError(f"{name} must have query's batch size {want}, got {got}")
    if key.shape[:2] != value.shape[:2]:
        want, got = key.shape[1 - batch], value.shape[1 - batch]
        raise ValueError(f"value must have key's length {want}, got {got}")


def _check_vector(name: str, vector: Any, size: int) -> None:
    if vector is None:
        return
    if check_tensor(name, vector).shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(vector.shape)}")


def _check_in_proj(
    weights: Tensor | tuple[Tensor, ...], inputs: tuple[Tensor, ...], num_heads: int, num_heads_kv: int
) -> int:
    """The head_dim."""
    total = num_heads + 2 * num_heads_kv
    name = "in_proj_weight"
    if isinstance(weights, Tensor):
        if weights.dim() != 2 or weights.shape[0] % total != 0:
            raise ValueError(
                f"{name} must be [{total} * head_dim, E] for {num_heads} heads and {num_heads_kv} of keys "
                f"and values, got shape {list(weights.shape)}"
            )
        _check_widths(inputs, [weights.shape[1]] * 3)
        return weights.shape[0] // total
    if len(weights) != 3:
        raise ValueError(f"{name} must be one tensor or three, got {len(weights)}")
    for weight in weights:
        if check_tensor(name, weight).dim() != 2:
            raise ValueError(f"{name} must hold 2-D tensors, got shape {list(weight.shape)}")
    _check_widths(inputs, [weight.shape[1] for weight in weights])
    if weights[0].shape[0] % num_heads != 0:
        raise ValueError(f"{name}[0] must have a multiple of {num_heads} rows, got {weights[0].shape[0]}")
    head_dim = weights[0].shape[0] // num_heads
    for n in (1, 2):
        if weights[n].shape[0] != num_heads_kv * head_dim:
            raise ValueError(
                f"{name}[{n}] must have {num_heads_kv * head_dim} rows, got {weights[n].shape[0]}"
            )
    return head_dim


def _check_widths(inputs: tuple[Tensor, ...], widths: list[int]) -> None:
    for name, x, width in zip(_NAMES, inputs, widths, strict=True):
        if x.shape[2] != width:
            raise ValueError(f"{name} must have {width} features, got shape {list(x.shape)}")
