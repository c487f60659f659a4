"""Biases of relative position as modules: learned, or fixed, and passed as `bias=` to any attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.biases import ALiBi, RelativePosition, alibi_slopes
from fastattn.checks import check_bool, check_int
from fastattn.masks import Align


class RelativePositionBias(nn.Module):
    """T5's bias: s_ij += table[bucket(j - i), h], the buckets exact nearby and logarithmic far away.

    >>> bias = RelativePositionBias(num_heads=2)
    >>> q = k = v = torch.randn(1, 2, 5, 8)
    >>> list(fastattn.attention(q, k, v, bias=bias()).shape)
    [1, 2, 5, 8]

    Args:
        num_heads: H.
        num_buckets: rows of the table.
        max_distance: distance from which on the last bucket is used.
        bidirectional: whether keys after the query have buckets of their own.
        align: "bottom_right" counts positions from the end of queries and keys, "top_left" from the start.
        device, dtype: of the table; torch's defaults where None.
    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (arXiv 1910.10683), section 2.1.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        align: Align = "bottom_right",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("num_heads", num_heads, 1)
        check_int("num_buckets", num_buckets, 1)
        self.max_distance, self.bidirectional, self.align = max_distance, bidirectional, align
        self.table = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        self()  # raises where the numbers do not fit together
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from N(0, 0.02²)."""
        nn.init.normal_(self.table, std=0.02)

    def forward(self) -> RelativePosition:
        """The bias, for `bias=` of `fastattn.attention` and `nn.Attention`; gradients reach the table."""
        return RelativePosition(self.table, self.bidirectional, self.max_distance, self.align)

    def extra_repr(self) -> str:
        buckets, heads = self.table.shape
        return f"{heads}, num_buckets={buckets}, max_distance={self.max_distance}"


class ALiBiBias(nn.Module):
    """s_ij -= slope_h |i - j|, with the paper's slopes, fixed or learned.

    >>> bias = ALiBiBias(num_heads=2)
    >>> q = k = v = torch.randn(1, 2, 5, 8)
    >>> list(fastattn.attention(q, k, v, mask=fastattn.masks.causal(), bias=bias()).shape)
    [1, 2, 5, 8]

    Args:
        num_heads: H.
        learned: whether the slopes are a parameter, not a buffer.
        align: "bottom_right" counts positions from the end of queries and keys, "top_left" from the start.
        device, dtype: of the slopes; torch's defaults where None.
    Source: Press et al. 2022, "Train Short, Test Long" (arXiv 2108.12409), section 3.
    """

    slopes: Tensor

    def __init__(
        self,
        num_heads: int,
        learned: bool = False,
        align: Align = "bottom_right",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.align = align
        slopes = alibi_slopes(num_heads, dtype=dtype or torch.get_default_dtype(), device=device)
        if check_bool("learned", learned):
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes)
        self()  # raises for an unknown align

    def forward(self) -> ALiBi:
        """The bias, for `bias=` of `fastattn.attention` and `nn.Attention`."""
        return ALiBi(self.slopes, self.align)

    def extra_repr(self) -> str:
        return f"{len(self.slopes)}, learned={isinstance(self.slopes, nn.Parameter)}"
