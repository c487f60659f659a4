"""Scores: how well each query matches each key. `nn.Attention` makes weights of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.autocast import autocast_dtype
from fastattn.checks import check_bool, check_int
from fastattn.spec import dtype_name
from fastattn.validation import check_number


class ProductScore(nn.Module):
    """s = scale * q'·k' with q' and k' made of q and k each by itself: what fused kernels compute.

    A subclass defines `operands`; `nn.Attention` then never makes the matrix of scores.
    """

    def operands(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, float]:
        """(q', k', scale)."""
        raise NotImplementedError

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The scores [..., Lq, Lk] of queries [..., Lq, Dq] and keys [..., Lk, Dk]."""
        q, k, scale = self.operands(queries, keys)
        return scale * (q @ k.mT)


class DotScore(ProductScore):
    """s = q·k.

    >>> DotScore()(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[11.]])

    Source: Luong et al. 2015, "Effective Approaches to Attention-based NMT" (arXiv 1508.04025), "dot".
    """

    def operands(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, float]:
        return queries, keys, 1.0


class ScaledDotScore(ProductScore):
    """s = q·k / sqrt(D): of variance 1 where the features of q and k are independent and have variance 1.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """

    def operands(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, float]:
        return queries, keys, 1 / math.sqrt(max(queries.shape[-1], 1))


class CosineScore(ProductScore):
    """s = q·k / (|q| |k| τ), with a temperature τ, given or learned; 0 where q or k is 0.

    >>> CosineScore(temperature=0.5)(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 9.0]]))
    tensor([[1.6000]])

    Args:
        temperature: τ > 0; where it is learned, its first value.
        learn_temperature: whether log τ is a parameter.
        device, dtype: of that parameter; torch's defaults where None.
    Source: Graves et al. 2014, "Neural Turing Machines" (arXiv 1410.5401), equations 5 and 6 (β = 1/τ).
    """

    def __init__(
        self,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.log_temperature: nn.Parameter | None
        if check_number("temperature", temperature) <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self._temperature = float(temperature)
        learned = None
        if check_bool("learn_temperature", learn_temperature):
            learned = nn.Parameter(torch.tensor(math.log(temperature), device=device, dtype=dtype))
        self.register_parameter("log_temperature", learned)

    @property
    def temperature(self) -> float | Tensor:
        """τ, a tensor where it is learned."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def operands(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, float]:
        q, k = _unit(queries), _unit(keys)
        if self.log_temperature is None:
            return q, k, 1 / self._temperature
        return (q * (-self.log_temperature).exp()).to(q.dtype), k, 1.0

    def extra_repr(self) -> str:
        if self.log_temperature is None:
            return f"temperature={self._temperature:g}, learn_temperature=False"
        value = "?" if self.log_temperature.is_meta else f"{self.log_temperature.exp().item():g}"
        return f"temperature={value}, learn_temperature=True"


def _unit(x: Tensor) -> Tensor:
    # In float32 at least: float16 rounds the guard against division by 0 to 0.
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)


class BilinearScore(ProductScore):
    """s = qᵀ W k; query and key may differ in size.

    Args:
        query_size, key_size: features of each; key_size is query_size where None.
        device, dtype: of the weight; torch's defaults where None.
    Source: Luong et al. 2015, "Effective Approaches to Attention-based NMT" (arXiv 1508.04025), "general".
    """

    def __init__(
        self,
        query_size: int,
        key_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("query_size", query_size, 1)
        key_size = query_size if key_size is None else check_int("key_size", key_size, 1)
        self.weight = nn.Parameter(torch.empty(query_size, key_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight again, Xavier-uniform."""
        nn.init.xavier_uniform_(self.weight)

    def operands(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, float]:
        check_features("queries", queries, self.weight, 0)
        check_features("keys", keys, self.weight)
        return queries @ self.weight, keys, 1.0

    def extra_repr(self) -> str:
        return f"query_size={self.weight.shape[0]}, key_size={self.weight.shape[1]}"


class AdditiveScore(nn.Module):
    """s = wᵀ tanh(W_q q + W_k k); query and key may differ in size.

    Called by itself it makes [..., Lq, Lk, num_hiddens]; `nn.Attention` does not, but calls
    `fastattn.additive_attention`.

    Args:
        query_size, key_size: features of each; key_size is query_size where None.
        num_hiddens: features of the sum; query_size where None.
        device, dtype: of the weights; torch's defaults where None.
    Source: Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate"
    (arXiv 1409.0473), section 3.1.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int | None = None,
        num_hiddens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("query_size", query_size, 1)
        key_size = query_size if key_size is None else check_int("key_size", key_size, 1)
        hiddens = query_size if num_hiddens is None else check_int("num_hiddens", num_hiddens, 1)
        self.W_q = nn.Linear(query_size, hiddens, bias=False, device=device, dtype=dtype)
        self.W_k = nn.Linear(key_size, hiddens, bias=False, device=device, dtype=dtype)
        self.w_v = nn.Linear(hiddens, 1, bias=False, device=device, dtype=dtype)

    def operands(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(W_q q, W_k k, w) for `fastattn.additive_attention`."""
        check_features("queries", queries, self.W_q.weight)
        check_features("keys", keys, self.W_k.weight)
        return self.W_q(queries), self.W_k(keys), self.w_v.weight[0]

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The scores [..., Lq, Lk] of queries [..., Lq, Dq] and keys [..., Lk, Dk]."""
        q, k, w = self.operands(queries, keys)
        return torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) @ w.to(q.dtype)


def check_features(name: str, x: Tensor, weight: Tensor, dim: int = 1) -> None:
    """Raise unless vectors x [..., features] have as many features as `weight` in `dim`, and its dtype."""
    if x.shape[-1] != weight.shape[dim]:
        raise ValueError(f"{name} must have {weight.shape[dim]} features, got shape {list(x.shape)}")
    check_dtype(name, x, weight)


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise unless x has the dtype of the layer's weight, or autocast sees to it."""
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        want, got = dtype_name(weight.dtype), dtype_name(x.dtype)
        raise TypeError(f"{name} must have the layer's dtype {want}, got {got}: x.to(...) or layer.to(...)")


SCORES: dict[str, type[nn.Module]] = {
    "dot": DotScore,
    "scaled_dot": ScaledDotScore,
    "cosine": CosineScore,
    "bilinear": BilinearScore,
    "additive": AdditiveScore,
}
