"""Modules that attend in every way that `fastattn.patch` tells apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from patch_support import rand
from torch import Tensor, nn

E, HEADS = 16, 2


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(2))


class Calls(Base):
    """Attention by PyTorch's function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), is_causal=True))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class CallsByAFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(attend(*self.heads(x)))


class WritesOut(Base):
    """Attention as many repositories have it."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(self.attend(q @ k.transpose(-1, -2) * (E // HEADS) ** -0.5) @ v)


class ReturnsWeights(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.heads(x)
        weights = torch.matmul(q, k.mT).softmax(-1)
        return self.merge(torch.matmul(weights, v)), weights


class Mixes(Base):
    """No call of attention has these weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.mT).softmax(-1)
        return self.merge((weights + weights.flip(1)) @ v)


class LinearAttention(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(F.elu(q) * (F.elu(k) * v).cumsum(-2))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class HasItsOwnGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(Double.apply(q @ k.mT).softmax(-1) @ v)


@torch.jit.script
def scripted_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@torch.jit.script
def scripted_softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores * 0.5, -1)


@torch.jit.script
def scripted_scale(scores: Tensor) -> Tensor:
    return scores * 0.5


class CallsAScript(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(scripted_attention(*self.heads(x)))


class HasAScriptedSoftmax(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(scripted_softmax(q @ k.mT) @ v)


class HasAScriptInBetween(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(scripted_scale(q @ k.mT).softmax(-1) @ v)


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(E, HEADS, 2 * E, dropout=0.0, batch_first=True)
    return nn.Sequential(encoder, Calls(), CallsByAFunction(), WritesOut(), Mixes())


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad((out * rand(*out.shape, seed=1)).sum(), [x, *model.parameters()])]


X = rand(2, 6, E)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
