"""A backend whose kernels go forward alone, with the backward pass of another, which reads the same lse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastattn.backends import cuda, triton
from fastattn.lowering import Operands, Params
from fastattn.spec import AttentionSpec


@dataclass(frozen=True)
class Joined:
    """Kernels of two backends as one, under the name of the first."""

    ahead: Any
    back: Any

    @property
    def name(self) -> str:
        return str(self.ahead.name)

    def supports(self, spec: AttentionSpec) -> str | None:
        """None, or every reason why one of the two cannot run its part of the call."""
        reason = self.ahead.supports(spec)
        missing = self.back.supports(spec) if spec.needs_grad and reason is None else None
        if missing is not None:
            return f"its gradients come from the {self.back.name} backend: {missing}"
        return str(reason) if reason is not None else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, need_lse: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """See the first backend's."""
        result: tuple[Tensor, Tensor | None] = self.ahead.forward(q, k, v, operands, params, need_lse)
        return result

    def backward(self, *args: Any) -> tuple[Tensor | None, ...]:
        """See the second backend's."""
        gradients: tuple[Tensor | None, ...] = self.back.backward(*args)
        return gradients


CUDA = Joined(cuda, triton)
