"""What the tests of records share: models, their input, and the weights that a record must hold."""

from __future__ import annotations

import torch
from torch import nn

from fastattn.models import Transformer

HEADS, LENGTH = 4, 9


class Block(nn.Module):
    """A model whose forward calls a function of the caller's choice on its heads."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)
        self.attend = attend

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        return self.attend(*self.heads(x))


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, LENGTH, 16)


def small_transformer():
    torch.manual_seed(2)
    return Transformer(20, 20, d_model=16, num_layers=2, num_heads=HEADS, d_ff=32, dropout=0.0).eval()


def softmax_weights(q, k, visible=None):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1)


TRIANGLE = torch.ones(LENGTH, LENGTH).tril() > 0


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
