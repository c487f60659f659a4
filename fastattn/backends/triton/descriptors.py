"""Descriptors of keys and values, by which Hopper's copy engine (TMA) loads a tile with one instruction.

Never run on a device: FASTATTN_TRITON_TMA=1 asks for them. They are made on the host, so that they need no
memory of their own and a CUDA graph keeps them with the launch.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from torch import Tensor

VARIABLE = "FASTATTN_TRITON_TMA"
ASKED = os.environ.get(VARIABLE, "0") not in ("", "0")
ALIGNMENT = 16  # bytes, of addresses and of strides
ARCHITECTURES = (90,)  # of those after it, none has been looked at
ITEM_SIZES = (2,)  # float32 is multiplied from registers, which the copy engine does not fill


def tiles_of(tensor: Tensor, block_n: int, block: int) -> Any:
    """A descriptor of tiles [block_n, block] of keys or values; None where the copy engine takes none.

    Args:
        tensor: [B, H, L, D], or packed [tokens, H, D], not empty, with a contiguous last dimension.
    """
    whole = tensor.transpose(0, 1)[None] if tensor.dim() == 3 else tensor
    sizes, unit = list(whole.shape), tensor.element_size()
    # The stride of a dimension of one is never used, and may break the rules.
    strides = [s if size > 1 else ALIGNMENT for size, s in zip(sizes[:-1], whole.stride(), strict=False)]
    fits = all(stride > 0 and stride * unit % ALIGNMENT == 0 for stride in strides)
    if not fits or tensor.data_ptr() % ALIGNMENT:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, sizes, [*strides, 1], [1, 1, block_n, block])


def is_descriptor(value: Any) -> bool:
    """Whether an argument of a kernel is a descriptor."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return isinstance(value, TensorDescriptor)


class _Address:
    """Memory of which a descriptor asks no more than where it is."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def moved(descriptor: Any, address: int) -> Any:
    """The descriptor of a tensor of the same form at another address."""
    other = copy.copy(descriptor)
    other.base = _Address(address)
    return other
