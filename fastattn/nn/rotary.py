"""Rotary positions: queries and keys turned by their position, so that products see the distance alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastattn.checks import check_int
from fastattn.nn.positions import sinusoids, table_rows
from fastattn.validation import check_floating, check_number

RotaryLayout = Literal["half", "interleaved"]


class RotaryEmbedding(nn.Module):
    """(a, b) -> (a cos mθ - b sin mθ, a sin mθ + b cos mθ), θ = base^(-2i/r), for each pair i at position m.

    With both q and k turned, their product sees the distance alone: (R_m q)·(R_n k) = q·(R_(n-m) k).

    >>> rotary = RotaryEmbedding(4, max_len=10)
    >>> rotary(torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]]), offset=1)
    tensor([[[[0.5403, 0.9999, 0.8415, 0.0100]]]])

    Args:
        head_dim: features of each head.
        max_len: number of positions; a longer input raises.
        base: of the frequencies; 10000 in the paper, more for long contexts.
        rotary_dim: r, even: only the first r features are turned, as in GPT-J and GPT-NeoX. None: all.
        layout: which features make pair i: "half" (i, i + r/2), as GPT-NeoX and Llama, or "interleaved"
            (2i, 2i + 1), as the paper and GPT-J.
        device: of the table.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Su et al. 2021, "RoFormer" (arXiv 2104.09864), equation 34.
    """

    table: Tensor

    def __init__(
        self,
        head_dim: int,
        max_len: int = 5000,
        *,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        layout: RotaryLayout = "half",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = check_int("head_dim", head_dim, 1)
        self.max_len = check_int("max_len", max_len, 1)
        self.base = check_number("base", base)
        if self.base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        name = "head_dim" if rotary_dim is None else "rotary_dim"
        self.rotary_dim = head_dim if rotary_dim is None else check_int("rotary_dim", rotary_dim, 2)
        if self.rotary_dim % 2:
            raise ValueError(f"{name} must be even, got {self.rotary_dim}")
        if self.rotary_dim > head_dim:
            raise ValueError(f"rotary_dim must be at most head_dim={head_dim}, got {rotary_dim}")
        if layout not in get_args(RotaryLayout):
            raise ValueError(f"layout must be one of {', '.join(get_args(RotaryLayout))}, got {layout!r}")
        self.layout = layout
        table = torch.empty(max_len, 2, self.rotary_dim // 2, device=device, dtype=torch.float32)
        self.register_buffer("table", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the table again, as is needed where `to_empty` takes memory; from meta it is filled."""
        if not self.table.is_meta:
            waves = sinusoids(self.max_len, self.rotary_dim, self.base)
            self.table.copy_(torch.stack([waves[:, 1::2], waves[:, 0::2]], 1))  # cos, sin

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RotaryEmbedding:
        before = self.table
        super()._apply(fn, recurse)
        # Narrow angles would lose far positions; meta has no values, and no state dict brings them.
        if self.table.dtype != before.dtype or before.is_meta:
            wide = torch.promote_types(self.table.dtype, torch.float32)
            self.table = torch.empty_like(self.table, dtype=wide)
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        parts = [f"{self.head_dim}, max_len={self.max_len}, base={self.base:g}, layout={self.layout!r}"]
        if self.rotary_dim != self.head_dim:
            parts.append(f"rotary_dim={self.rotary_dim}")
        return ", ".join(parts)

    def forward(self, x: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """Queries or keys, each turned by its position.

        Args:
            x: [B, H, L, head_dim].
            offset: the position of the first token, as when decoding goes on from a cache.
            positions: int [L] or [B, L] (B may be 1): each token's own position instead.
        Returns:
            x's shape and dtype; turned in float32 at least.
        Raises:
            TypeError, ValueError: another shape; a position that is negative or not below max_len.
        """
        if check_floating("x", x).dim() != 4 or x.shape[-1] != self.head_dim:
            raise ValueError(f"x must be [B, H, L, {self.head_dim}], got shape {list(x.shape)}")
        rows = table_rows(self.table, x.shape[0], x.shape[2], offset, positions)
        cos, sin = rows[:, None].unbind(-2)  # [1|B, 1, L, r/2]
        turned, rest = x.split([self.rotary_dim, self.head_dim - self.rotary_dim], -1)
        at = -2 if self.layout == "half" else -1
        pairs = (2, self.rotary_dim // 2) if at == -2 else (self.rotary_dim // 2, 2)
        a, b = turned.unflatten(-1, pairs).to(torch.promote_types(x.dtype, self.table.dtype)).unbind(at)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], at).flatten(-2)
        return torch.cat([turned.to(x.dtype), rest], -1)
