"""PositionwiseFeedForward: the network that a Transformer applies to every position by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.checks import check_int

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class PositionwiseFeedForward(nn.Module):
    """FFN(x) = W2 dropout(max(0, W1 x + b1)) + b2.

    Weights are Xavier-uniform, biases zeros.

    >>> list(PositionwiseFeedForward(4, d_ff=16)(torch.zeros(2, 3, 4)).shape)
    [2, 3, 4]

    Args:
        d_model: width of inputs and outputs.
        d_ff: width in between.
        dropout: probability, on the activations; the paper has none there.
        activation: "relu", "gelu" or "silu".
        device, dtype: of the weights; torch's defaults where None.
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 2.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        dropout: float = 0.0,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("d_model", d_model, 1)
        check_int("d_ff", d_ff, 1)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation = activation
        self.linear1 = nn.Linear(d_model, d_ff, device=device, dtype=dtype)
        self.linear2 = nn.Linear(d_ff, d_model, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

    def reset_parameters(self) -> None:
        """Draw the weights again."""
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_model]; returns the same shape."""
        return self.linear2(self.dropout(ACTIVATIONS[self.activation](self.linear1(x))))
