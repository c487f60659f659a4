"""A model that you already have: its modules replaced, or the function beneath it.

python examples/swap.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from fastattn.integrations.torch import override_sdpa, replace_modules

torch.manual_seed(0)

# Models made of torch.nn layers: replace their attention modules, weights and all.
layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
model = nn.TransformerEncoder(layer, num_layers=2).eval()
x = torch.randn(2, 50, 64)
with torch.no_grad():
    want = model(x)
    report = replace_modules(model)
    got = model(x)
print(report)
print(f"encoder differs by {(got - want).abs().max().item():.0e}")
report.undo()  # or: with replace_modules(model): ...


# Models that call F.scaled_dot_product_attention themselves: change what that means.
def attend(x: torch.Tensor) -> torch.Tensor:
    heads = x.unflatten(-1, (4, 16)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


want = attend(x)
with override_sdpa():
    got = attend(x)
print(f"function differs by {(got - want).abs().max().item():.0e}")

override = override_sdpa()  # without a block it holds until undo()
attend(x)
override.undo()
