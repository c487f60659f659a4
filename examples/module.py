"""The module: fastattn.nn.MultiheadAttention where torch.nn.MultiheadAttention stood.

python examples/module.py
"""

import torch
from torch import nn

import fastattn.nn
from fastattn.masks import causal

torch.manual_seed(0)
theirs = nn.MultiheadAttention(64, 4, batch_first=True)
ours = fastattn.nn.MultiheadAttention(64, 4, batch_first=True)
ours.load_state_dict(theirs.state_dict())  # the same parameters by the same names

x = torch.randn(2, 50, 64)
hidden = torch.ones(50, 50, dtype=torch.bool).triu(1)  # torch's masks: True = blocked
want, want_weights = theirs(x, x, x, attn_mask=hidden)
got, got_weights = ours(x, x, x, attn_mask=hidden)
again, _ = ours(x, mask=causal(), need_weights=False)  # the same, shorter; nothing of 50 x 50 is made

print(f"output differs by {(got - want).abs().max().item():.0e}")
print(f"weights differ by {(got_weights - want_weights).abs().max().item():.0e}")
print(f"with mask=causal() by {(again - want).abs().max().item():.0e}")
