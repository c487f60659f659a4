"""A model that you already have, whatever library it is from: one call, a report, and undo.

python examples/patch.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import fastattn

torch.manual_seed(0)


class Block(nn.Module):
    """Attention as many repositories write it: a product, a softmax and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 16**0.5
        weights = F.dropout(scores.softmax(dim=-1), 0.1, self.training)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class CausalBlock(Block):
    """Attention by PyTorch's function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
model = nn.Sequential(Block(), CausalBlock(), layer).eval()
x = torch.randn(2, 50, 64)
want = model(x)

report = fastattn.patch(model)  # or: with fastattn.patch(model) as report: ...
print(report)
print(f"differs by {(model(x) - want).abs().max().item():.0e}")

report.undo()
print(f"undone, by {(model(x) - want).abs().max().item():.0e}")
