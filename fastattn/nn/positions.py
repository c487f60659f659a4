"""Encodings of position that are added to token embeddings."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.checks import check_bool, check_int
from fastattn.execution import has_values
from fastattn.masks.space import is_integer
from fastattn.spec import dtype_name
from fastattn.validation import check_floating, check_tensor


def sinusoids(max_len: int, d_model: int, base: float = 10000.0) -> Tensor:
    """PE(pos, 2i) = sin(pos / base^(2i/d)), PE(pos, 2i+1) = cos(pos / base^(2i/d)), with d = d_model.

    The angles carry about 75 bits, so that a large one is as exact as a small one: rounded to float32, every
    value is the float32 nearest to the formula.

    >>> sinusoids(2, 3)
    tensor([[0.0000, 1.0000, 0.0000],
            [0.8415, 0.5403, 0.0022]], dtype=torch.float64)

    Args:
        max_len: number of positions.
        d_model: width; where it is odd, the last sine has no cosine.
        base: the slowest wave is about base times as long as the fastest.
    Returns:
        float64 [max_len, d_model].
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
    """
    position = torch.arange(max_len, dtype=torch.float64, device="cpu")[:, None]
    high, low = _frequencies(d_model, base)
    angle, rest = position * high, position * low  # the first product is exact
    table = torch.empty(max_len, d_model, dtype=torch.float64, device="cpu")
    table[:, 0::2] = angle.sin() * rest.cos() + angle.cos() * rest.sin()
    table[:, 1::2] = (angle.cos() * rest.cos() - angle.sin() * rest.sin())[:, : d_model // 2]
    return table


def _frequencies(d_model: int, base: float) -> tuple[Tensor, Tensor]:
    """base^(-2i/d) as a sum of two; the first has 24 bits, so positions below 2^29 multiply it exactly."""
    with localcontext() as context:
        context.prec = 40
        exact = [Decimal(base) ** (Decimal(-2 * i) / d_model) for i in range((d_model + 1) // 2)]
        high = torch.tensor([float(x) for x in exact], dtype=torch.float32, device="cpu").double()
        low = [float(x - Decimal(part)) for x, part in zip(exact, high.tolist(), strict=True)]
    return high, torch.tensor(low, dtype=torch.float64, device="cpu")


def document_positions(ids: Tensor) -> Tensor:
    """The position of each token within its run of equal ids, which are packed documents.

    >>> document_positions(torch.tensor([[7, 7, 7, 8, 9, 9]]))
    tensor([[0, 1, 2, 0, 0, 1]])

    Args:
        ids: int [B, L], as for `fastattn.masks.documents`.
    Returns:
        int64 [B, L].
    Raises:
        TypeError, ValueError: ids that are no integers, or of another shape.
    """
    if not is_integer(check_tensor("ids", ids)):
        raise TypeError(f"ids must be integers, got {dtype_name(ids.dtype)}")
    if ids.dim() != 2:
        raise ValueError(f"ids must be [B, L], got shape {list(ids.shape)}")
    index = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    changes = torch.ones_like(ids, dtype=torch.bool)
    changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = torch.where(changes, index, 0).cummax(1).values
    return index - starts


def table_rows(
    table: Tensor, batch: int, length: int, offset: int = 0, positions: Tensor | None = None
) -> Tensor:
    """The rows of a table that belong to the tokens of a batch: [1, L, ...] or, by positions, [1|B, L, ...].

    Args:
        table: [max_len, ...], one row for each position.
        batch, length: B and L.
        offset: the position of the first token.
        positions: int [L] or [B, L] (B may be 1), instead of offset, offset + 1, ...
    Raises:
        TypeError, ValueError: positions that do not fit the batch or the table.
    """
    if positions is None:
        check_int("offset", offset, 0)
        if offset + length > len(table):
            raise ValueError(
                f"positions must be below max_len={len(table)}, got {length} from offset {offset}"
            )
        return table[None, offset : offset + length]
    if offset:
        raise ValueError(f"offset must be 0 where positions are given, got {offset}")
    if not is_integer(check_tensor("positions", positions)):
        raise TypeError(f"positions must be integers, got {dtype_name(positions.dtype)}")
    at = positions[None] if positions.dim() == 1 else positions
    if at.dim() != 2 or at.shape[0] not in (1, batch) or at.shape[1] != length:
        raise ValueError(
            f"positions must be [{length}] or [{batch}, {length}], got shape {list(positions.shape)}"
        )
    if at.numel() and has_values(at):
        low, high = (int(bound) for bound in at.aminmax())
        if low < 0 or high >= len(table):
            raise ValueError(
                f"positions must be from 0 to max_len - 1 = {len(table) - 1}, got {low} to {high}"
            )
    return table[at]


class _PositionalEncoding(nn.Module):
    """dropout(x + table[positions]): what both kinds of table share.

    Args:
        d_model: width; may be odd.
        max_len: number of positions; a longer input raises.
        dropout: probability, applied to the sum.
        batch_first: whether inputs are [B, L, d_model] rather than [L, B, d_model].
        device, dtype: of the table; torch's defaults where None.
    """

    table: Tensor

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = check_int("d_model", d_model, 1)
        self.max_len = check_int("max_len", max_len, 1)
        self.batch_first = check_bool("batch_first", batch_first)
        self.dropout = nn.Dropout(dropout)
        self._register_table(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def _register_table(self, table: Tensor) -> None:
        """Keep the uninitialised table, as `self.table`."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Fill the table."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}, batch_first={self.batch_first}"

    def forward(self, x: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """Add to each vector the encoding of its position, then drop.

        Args:
            x: [B, L, d_model], or [L, B, d_model] without batch_first.
            offset: the position of the first token, as when decoding goes on from a cache.
            positions: int [L] or [B, L] (B may be 1), also without batch_first: each token's own position,
                instead of offset, offset + 1, ...
        Returns:
            x's shape and dtype.
        Raises:
            TypeError, ValueError: another dtype or shape; a position that is negative or not below max_len.
        """
        if check_floating("x", x).dim() != 3 or x.shape[-1] != self.d_model:
            layout = "[B, L" if self.batch_first else "[L, B"
            raise ValueError(f"x must be {layout}, {self.d_model}], got shape {list(x.shape)}")
        batch, length = x.shape[:2] if self.batch_first else (x.shape[1], x.shape[0])
        rows = table_rows(self.table, batch, length, offset, positions)
        rows = rows if self.batch_first else rows.transpose(0, 1)
        return self.dropout(x + rows.to(x.dtype))


class SinusoidalPositionalEncoding(_PositionalEncoding):
    """dropout(x + PE) with PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d)).

    The table is a buffer, correctly rounded in the module's dtype, that state dicts leave out.

    >>> encode = SinusoidalPositionalEncoding(4, max_len=10)
    >>> encode(torch.zeros(1, 1, 4), offset=1)
    tensor([[[0.8415, 0.5403, 0.0100, 0.9999]]])

    Args:
        d_model: width; may be odd.
        max_len: number of positions; a longer input raises.
        dropout: probability, applied to the sum.
        batch_first: whether inputs are [B, L, d_model] rather than [L, B, d_model].
        device, dtype: of the table; torch's defaults where None.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
    """

    def _register_table(self, table: Tensor) -> None:
        self.register_buffer("table", table, persistent=False)

    def reset_parameters(self) -> None:
        """Compute the table again, as is needed where `to_empty` takes memory; from meta it is filled."""
        if not self.table.is_meta:
            self.table.copy_(sinusoids(self.max_len, self.d_model))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SinusoidalPositionalEncoding:
        before = self.table
        super()._apply(fn, recurse)
        # Values cast from another dtype would be rounded for that one; meta has none, nor has a state dict.
        if self.table.dtype != before.dtype or before.is_meta:
            self.reset_parameters()
        return self


class LearnedPositionalEncoding(_PositionalEncoding):
    """dropout(x + table[positions]) with a table of parameters, one vector for each position.

    >>> list(LearnedPositionalEncoding(4, max_len=10)(torch.zeros(1, 3, 4)).shape)
    [1, 3, 4]

    Args: as for SinusoidalPositionalEncoding; `max_len` vectors are learned.
    Source: Gehring et al. 2017, "Convolutional Sequence to Sequence Learning", section 3.1.
    """

    def _register_table(self, table: Tensor) -> None:
        self.table = nn.Parameter(table)

    def reset_parameters(self) -> None:
        """Draw the table from N(0, 0.02²)."""
        nn.init.normal_(self.table, std=0.02)
