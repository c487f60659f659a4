"""torch.func transforms inside torch.compile; imported only there, because it imports the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import functorch, ops
from fastattn.lowering import Operands, Params

_COUNT = len(Operands._fields)


@torch.compiler.allow_in_graph
def attention(name: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of a lowered call, its operands and params one after the other.

    The compiler cannot look into Functions with rules for transforms. It calls this as it stands, on fake
    tensors, and sees the ops that the transforms leave.
    """
    operands, params = Operands(*rest[:_COUNT]), Params(*rest[_COUNT:])
    return functorch.attention(ops.Kernels(name), q, k, v, operands, params)
