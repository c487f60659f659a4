"""T5's position bias as the table that it is: BiasTensor passes for the N x N tensor that models hand on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.biases import Bias
from fastattn.masks.space import MaskShape

_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "is_cuda")
# What asks about a tensor without reading it.
_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}


class BiasTensor(Tensor):
    """A tensor [1, H, Lq, Lk] of which only the bias exists that says what is in it.

    What reads the tensor gets it built at that moment, with gradients to the bias's parameters.
    """

    bias: Bias

    @staticmethod
    def __new__(cls, bias: Bias, seqlen_q: int, seqlen_k: int) -> BiasTensor:
        size, parameter = (1, bias.heads, seqlen_q, seqlen_k), bias.parameter
        self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=parameter.dtype, device=parameter.device)
        self.bias = bias
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.detach:
            return BiasTensor(args[0].bias, *args[0].shape[2:])
        args, kwargs = pytree.tree_map_only(BiasTensor, BiasTensor.to_dense, (args, kwargs))
        return func(*args, **kwargs)

    def to_dense(self) -> Tensor:  # type: ignore[override]
        """The tensor itself, differentiable."""
        shape = MaskShape(*self.shape)
        return self.bias.to_dense(shape, self.device, self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"BiasTensor({self.bias!r}, shape={list(self.shape)})"
