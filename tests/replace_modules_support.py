"""Models that `replace_modules` is tried on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastattn.nn

B, L, S, E = 2, 6, 5, 16
SIZES = {"d_model": E, "nhead": 2, "dim_feedforward": 24, "dropout": 0.0}


def padding(batch: int, length: int, hidden: int) -> Tensor:
    """The last `hidden` keys of the first sequence are blocked."""
    blocked = torch.zeros(batch, length, dtype=torch.bool)
    blocked[0, length - hidden :] = True
    return blocked


def new_model() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(**SIZES, num_encoder_layers=1, num_decoder_layers=1, batch_first=True)


NAMES = (
    "encoder.layers.0.self_attn",
    "decoder.layers.0.self_attn",
    "decoder.layers.0.multihead_attn",
)


def types(model: nn.Module) -> list[type]:
    return [type(model.get_submodule(name)) for name in NAMES]


OURS, TORCHS = [fastattn.nn.MultiheadAttention] * 3, [nn.MultiheadAttention] * 3


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight
