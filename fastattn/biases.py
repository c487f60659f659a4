"""Additive biases of position, read by kernels along diagonals instead of as N x N tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.checks import check_bool, check_int
from fastattn.masks.space import Align, MaskShape, check_align, check_device, describe
from fastattn.spec import accumulate_dtype, dtype_name

BiasType = TypeVar("BiasType", bound="Bias")

SUM_LENGTH = 4096


class Bias:
    """A bias by batch entry, head and r = j - i - offset, the key's position relative to the query's.

    offset = len_k - len_q for align "bottom_right", 0 for "top_left". Biases are immutable.
    A subclass is a frozen dataclass with a field `align` that defines `values` and `_check`.
    """

    align: Align

    def diagonals(self, heads: int, lo: int, hi: int, dtype: torch.dtype | None = None) -> Tensor:
        """The bias at relative positions lo <= r <= hi: [1|B, heads, hi - lo + 1], entry d at r = lo + d.

        Differentiable, O(heads * (hi - lo)), so that autograd carries gradients to the parameters.
        Of the given dtype; where None float32, or float64 where the parameters are.

        Raises:
            ValueError: the parameters are for another number of heads.
        """
        self._check_heads(heads)
        return self.values(torch.arange(lo, hi + 1, device=self.parameter.device), dtype)

    def to_dense(self, shape: MaskShape, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The definition: [1|B, heads, Lq, Lk] of the given dtype, differentiable.

        Args:
            shape: the index space, whose per-sequence lengths give each batch entry its own offset.
            device: of the call; the parameters must lie there.
            dtype: of the result.
        """
        device = torch.device(device)
        self.check(shape, device)
        i = torch.arange(shape.seqlen_q, device=device)[:, None]
        j = torch.arange(shape.seqlen_k, device=device)
        if not shape.is_ragged:
            offset = 0 if self.align == "top_left" else shape.seqlen_k - shape.seqlen_q
            return self.values(j - i - offset, dtype)
        entries = []
        for b in range(shape.batch):
            values = self.values(j - i - shape.offset(self.align, torch.tensor(b, device=device)), dtype)
            entries.append(values[b if values.shape[0] > 1 else 0])
        return torch.stack(entries) if entries else self.values(j - i, dtype)[:0]

    def check(self, shape: MaskShape, device: torch.device) -> None:
        """Raise ValueError where the parameters do not fit the call's heads and batch, or lie elsewhere."""
        check_device(f"bias {type(self).__name__}", self.parameter, device)
        self._check_heads(shape.heads)
        if self.batch not in (1, shape.batch):
            want = "1" if shape.batch == 1 else f"{shape.batch} (or 1)"
            raise ValueError(f"bias {type(self).__name__} must have batch size {want}, got {self.batch}")

    @property
    def parameter(self) -> Tensor:
        """The tensor that gradients reach."""
        raise NotImplementedError

    @property
    def batch(self) -> int:
        """Leading size of the values: 1 where all batch entries share them."""
        return 1

    @property
    def heads(self) -> int:
        """Number of heads that the parameters are for."""
        raise NotImplementedError

    def values(self, relative: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The bias at int64 relative positions: [1|B, heads, *relative.shape], of dtype or the default."""
        raise NotImplementedError

    def _check_heads(self, heads: int) -> None:
        if self.heads != heads:
            raise ValueError(f"bias {type(self).__name__} must be for {heads} heads, got {self.heads}")

    def _accumulation_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return accumulate_dtype(self.parameter.dtype) if dtype is None else dtype

    def __repr__(self) -> str:
        items = [describe(getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{n}={v}' for n, v in zip(names, items, strict=True))})"


def register(cls: type[BiasType]) -> type[BiasType]:
    """Make a bias class a pytree node: tensors are children, everything else is context."""

    def flatten(bias: BiasType) -> tuple[list[Any], tuple[Any, ...]]:
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        children = {name: getattr(bias, name) for name in names if isinstance(getattr(bias, name), Tensor)}
        rest = tuple((name, getattr(bias, name)) for name in names if name not in children)
        return list(children.values()), (tuple(children), rest)

    def unflatten(children: Iterable[Any], context: tuple[Any, ...]) -> BiasType:
        bias = object.__new__(cls)
        names, rest = context
        # Leaves may be anything while a pytree is mapped, so nothing is checked.
        for name, value in [*zip(names, children, strict=True), *rest]:
            object.__setattr__(bias, name, value)
        return bias

    pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=f"fastattn.biases.{cls.__name__}"
    )
    return cls


@register
@dataclass(frozen=True, eq=False, repr=False)
class ALiBi(Bias):
    """-slope * |i + offset - j|: attention with linear biases.

    Args:
        slopes: floating point [H] or [B, H] (B may be 1); see `alibi_slopes`.
        align: "bottom_right" (offset = seqlen_k - seqlen_q) or "top_left" (0).

    Raises:
        TypeError: slopes is not a floating-point tensor.
        ValueError: other dimensions, unknown align, or, when used, sizes that do not fit the call.

    Example: `ALiBi(alibi_slopes(8))`; with slope 0.5 on 2x2 it is [[0, -0.5], [-0.5, 0]].

    Source: Press et al., "Train Short, Test Long" (arXiv 2108.12409), section 3.
    """

    slopes: Tensor
    align: Align = "bottom_right"

    def __post_init__(self) -> None:
        _check_parameter("ALiBi slopes", self.slopes, (1, 2))
        check_align(self.align)

    @property
    def parameter(self) -> Tensor:
        return self.slopes

    @property
    def batch(self) -> int:
        return 1 if self.slopes.dim() == 1 else self.slopes.shape[0]

    @property
    def heads(self) -> int:
        return self.slopes.shape[-1]

    def values(self, relative: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = self._accumulation_dtype(dtype)
        slopes = self.slopes.to(dtype).reshape(self.batch, self.heads, 1, 1)
        # In rows, so that the slopes' gradient adds up row by row: torch may split one long sum by threads.
        length = relative.numel()
        rows = -(-length // SUM_LENGTH)
        distance = torch.nn.functional.pad(relative.flatten().abs(), (0, rows * SUM_LENGTH - length))
        values = -slopes.expand(-1, -1, rows, 1) * distance.view(rows, SUM_LENGTH).to(dtype)
        return values.flatten(2)[..., :length].unflatten(2, relative.shape)


def alibi_slopes(
    num_heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Slopes [num_heads]: the geometric sequence that starts at 2^(-8/n) with that ratio, n a power of two.

    For other head counts: the slopes of the largest power of two below, then every other slope of its double.

    Raises:
        TypeError: num_heads is not an int.
        ValueError: num_heads < 1.

    Example: `alibi_slopes(4)` is [2^-2, 2^-4, 2^-6, 2^-8].

    Source: Press et al., "Train Short, Test Long" (arXiv 2108.12409), section 3 and its reference code.
    """
    num_heads = check_int("num_heads", num_heads, 1)
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (n + 1) / below) for n in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * n + 1) / below) for n in range(num_heads - below)]
    return torch.tensor(slopes, dtype=dtype, device=device)


@register
@dataclass(frozen=True, eq=False, repr=False)
class RelativePosition(Bias):
    """table[bucket(j - i - offset), h]: T5's learned bias of bucketed distance.

    Half of a direction's buckets hold one distance each; the others grow logarithmically up to max_distance,
    beyond which all distances share the last bucket.

    Args:
        table: floating point [num_buckets, H], as T5's `relative_attention_bias.weight`.
        bidirectional: whether keys after the query have buckets of their own; if not, they share bucket 0.
        max_distance: distance from which on the last bucket is used.
        align: "bottom_right" (offset = seqlen_k - seqlen_q) or "top_left" (0).

    Raises:
        TypeError: table is not a floating-point tensor, bidirectional no bool, or max_distance no int.
        ValueError: other dimensions, too few buckets, a max_distance that the exact buckets already cover,
            unknown align, or, when used, another number of heads.

    Example: with 32 buckets, bidirectional, r = -3 has bucket 3, r = 3 bucket 19, r = -1000 bucket 15.

    Source: Raffel et al. (arXiv 1910.10683), section 2.1.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128
    align: Align = "bottom_right"

    def __post_init__(self) -> None:
        _check_parameter("RelativePosition table", self.table, (2,))
        check_align(self.align)
        check_bool("RelativePosition bidirectional", self.bidirectional)
        max_distance = check_int("RelativePosition max_distance", self.max_distance)
        object.__setattr__(self, "max_distance", max_distance)  # NumPy's ints become Python's
        least = 4 if self.bidirectional else 2
        if self.table.shape[0] < least:
            raise ValueError(
                f"RelativePosition table must have at least {least} buckets, got {self.table.shape[0]}"
            )
        exact = self.table.shape[0] // least
        if max_distance <= exact:
            raise ValueError(
                f"RelativePosition max_distance must exceed the {exact} exact distances, got {max_distance}"
            )

    @property
    def parameter(self) -> Tensor:
        return self.table

    @property
    def heads(self) -> int:
        return self.table.shape[1]

    def buckets(self, relative: Tensor) -> Tensor:
        """Bucket of each relative position j - i - offset: int64 of relative's shape."""
        count = self.table.shape[0] // 2 if self.bidirectional else self.table.shape[0]
        exact = count // 2
        distance = torch.arange(self.max_distance + 1, device=relative.device)
        # In float32 and this order, since the last bit decides into which bucket a boundary distance falls.
        ratio = torch.log(distance.float() / exact) / math.log(self.max_distance / exact)
        # The logarithm of 0 is cut off before it is made an integer; `where` then does not choose it.
        coarse = exact + (ratio * (count - exact)).clamp(min=0).long()
        bucket = torch.where(distance < exact, distance, coarse.clamp(max=count - 1))
        if not self.bidirectional:
            return bucket[(-relative).clamp(0, self.max_distance)]
        start = torch.where(relative > 0, count, 0)
        return start + bucket[relative.abs().clamp(max=self.max_distance)]

    def values(self, relative: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = self._accumulation_dtype(dtype)
        # Unlike an index, an embedding adds up its gradient in one order for any number of threads.
        chosen = torch.nn.functional.embedding(self.buckets(relative), self.table.to(dtype))
        return chosen.movedim(-1, 0)[None]


def _check_parameter(name: str, value: object, dims: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {dtype_name(value.dtype)}")
    if value.dim() not in dims:
        raise ValueError(
            f"{name} must have {' or '.join(map(str, dims))} dimensions, got shape {list(value.shape)}"
        )
