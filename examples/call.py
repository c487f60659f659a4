"""The function: grouped heads, a mask composed of three, and gradients.

python examples/call.py
"""

import torch

import fastattn
from fastattn.masks import causal, global_tokens, window

torch.manual_seed(0)
q = torch.randn(1, 8, 1024, 64, requires_grad=True)  # [batch, heads, length, head_dim]
k, v = torch.randn(1, 2, 1024, 64), torch.randn(1, 2, 1024, 64)  # two heads, shared by four of q's each
mask = causal() & (window(127, 0) | global_tokens([0]))  # the last 128 tokens, and the first one

out = fastattn.attention(q, k, v, mask=mask)
out.square().mean().backward()

print(f"out {list(out.shape)}, gradient of q {list(q.grad.shape)}")
print(fastattn.explain(q, k, v, mask=mask))  # which kernels ran, and why no other
