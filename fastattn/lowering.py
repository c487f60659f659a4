"""From a Call to what kernels read: flat tensors (Operands) and plain numbers (Params)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastattn.call import Call
from fastattn.masks import LoweredMask, Mask, MaskShape
from fastattn.masks.band import Band
from fastattn.masks.built import BuiltMask
from fastattn.spec import accumulate_dtype


class Operands(NamedTuple):
    """Every tensor of a kernel call beside q, k and v; None = absent. Gradients reach the first four.

    B is the batch size, or the number of sequences S of a varlen call, whose lengths are maxima.
    """

    bias: Tensor | None = None  # q's dtype or float32, 4-D, broadcasts to [B, Hq, Lq, Lk]
    diag: Tensor | None = None  # accumulate dtype, [1|B, Hq, n]; entry of r = j - i - offset at r - diag_lo
    sinks: Tensor | None = None  # accumulate dtype, [Hq]
    score_weights: Tensor | None = None  # accumulate dtype, [D]; w of the additive score
    seed: Tensor | None = None  # int64, one element
    mask: Tensor | None = None  # bool, 4-D, broadcasts to [B, Hq, Lq, Lk]
    key_starts: Tensor | None = None  # int32 [1|B, 1|Lq]
    key_ends: Tensor | None = None  # int32 [1|B, 1|Lq]
    row_ptr: Tensor | None = None  # the seven tensors of a BlockMask
    row_tiles: Tensor | None = None
    row_bits: Tensor | None = None
    col_ptr: Tensor | None = None
    col_tiles: Tensor | None = None
    col_bits: Tensor | None = None
    bits: Tensor | None = None
    cu_seqlens_q: Tensor | None = None  # int32 [S + 1]
    cu_seqlens_k: Tensor | None = None  # int32 [S + 1]
    seqlens_k: Tensor | None = None  # int32 [B]
    block_table: Tensor | None = None  # int32 [B, max_pages]


DIFFERENTIABLE = 4  # leading fields of Operands that gradients reach
BLOCK_FIELDS = Operands._fields[8:15]
NO_OPERANDS = Operands()

Bounds = tuple[int | None, int | None, int | None, int | None]


class Params(NamedTuple):
    """Every number of a kernel call.

    band is (lo_top, hi_top, lo_bottom, hi_bottom): i + lo_top <= j <= i + hi_top, and the same about
    i + offset for the bottom pair; None = unbounded. max_seqlen_q and max_seqlen_k are read in varlen calls
    only. `checked`: the contents of the index tensors are known to be right, so kernels need not look.
    """

    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    band: Bounds | None = None
    diag_lo: int = 0
    diag_bottom_right: bool = True
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    checked: bool = False
    score: str = "dot"


def lower(call: Call) -> tuple[Operands, Params]:
    """Kernel form of a validated call; builds block lists and bias diagonals where the call needs them."""
    scale = call.scale_value()
    tensors: dict[str, Tensor | None] = {}
    if call.dropout_p > 0:
        tensors["seed"] = call.dropout_seed
    band = None if call.mask is None else lower_mask(call, call.mask, tensors)
    if call.op == "attention" and call.bias is None and call.sinks is None and call.score == "dot":
        operands = Operands(**tensors) if tensors else NO_OPERANDS
        return operands, Params(scale, call.softcap, call.dropout_p, band)
    diag_lo, bottom_right = _lower_bias(call, tensors)
    if call.sinks is not None:
        tensors["sinks"] = call.sinks.to(accumulate_dtype(call.q.dtype)).contiguous()
    if call.score_weights is not None:
        tensors["score_weights"] = call.score_weights.to(accumulate_dtype(call.q.dtype)).contiguous()
    if call.lengths is not None:
        tensors["seqlens_k"] = call.lengths.to(torch.int32).contiguous()
    for name in ("cu_seqlens_q", "cu_seqlens_k", "block_table") if call.op != "attention" else ():
        index = getattr(call, name)
        tensors[name] = None if index is None else index.contiguous()
    params = Params(
        scale,
        call.softcap,
        call.dropout_p,
        band,
        diag_lo,
        bottom_right,
        call.max_seqlen_q,
        call.max_seqlen_k,
        call.checked,
        call.score,
    )
    return Operands(**tensors) if tensors else NO_OPERANDS, params


def to_4d(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (4 - tensor.dim())] if tensor.dim() < 4 else tensor


def lower_mask(call: Call, mask: Mask | Tensor, tensors: dict[str, Tensor | None]) -> Bounds | None:
    """Put the mask's tensors into `tensors` and return its band."""
    if isinstance(mask, Tensor):
        tensors["mask"] = to_4d(mask)
        return None
    if type(mask) is Band:  # the form of most calls, and the same for every shape
        lo, hi = mask.lo, mask.hi
        return (None, None, lo, hi) if mask.align == "bottom_right" else (lo, hi, None, None)
    if mask.needs_blocks and records_sizes():
        if call.op == "varlen":
            raise NotImplementedError(
                "torch.jit.trace cannot record the lists of tiles of a mask on packed sequences: "
                "trace the call on padded ones, or without this mask"
            )
        tensors["mask"] = mask.to_dense(call.mask_shape(), call.q.device)
        return None
    lowered = _lowered(mask, call.mask_shape(), call.q.device)
    if lowered.key_starts is not None:
        tensors["key_starts"] = lowered.key_starts
    if lowered.key_ends is not None:
        tensors["key_ends"] = lowered.key_ends
    if lowered.dense is not None:
        tensors["mask"] = lowered.dense
    if lowered.block is not None:
        for name in BLOCK_FIELDS:
            tensors[name] = getattr(lowered.block, name)
    band = (lowered.lo_top, lowered.hi_top, lowered.lo_bottom, lowered.hi_bottom)
    return None if all(bound is None for bound in band) else band


def records_sizes() -> bool:
    """Whether torch.jit.trace watches, to which numbers that follow from sizes are constants.

    Lists of tiles and the places of diagonals are such numbers; dense masks and biases hold at any size.
    """
    return torch.jit.is_tracing()


def _lowered(mask: Mask, shape: MaskShape, device: torch.device) -> LoweredMask:
    if mask.needs_blocks and _is_mapped(mask):
        raise NotImplementedError(
            f"mask {type(mask).__name__} needs block lists, whose size differs from entry to entry of a "
            "vmap over its tensors: give those and q, k, v a batch dimension instead of the vmap"
        )
    is_watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if not is_watched or not mask.needs_blocks or isinstance(mask, BuiltMask):
        return mask.lower(shape, device)
    from fastattn.mask_ops import block_lists

    return LoweredMask(block=block_lists(mask, shape, device))


def _is_mapped(mask: Mask) -> bool:
    """Whether a vmap maps over a tensor of the mask, under whatever other transforms."""
    functorch = torch._C._functorch
    if not torch._C._are_functorch_transforms_active():
        return False
    for tensor in tree_leaves(mask):
        while isinstance(tensor, Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False


def _lower_bias(call: Call, tensors: dict[str, Tensor | None]) -> tuple[int, bool]:
    """Put the bias's tensor into `tensors`; returns (diag_lo, diag_bottom_right)."""
    bias = call.bias
    if bias is None:
        return 0, True
    if not isinstance(bias, Tensor) and records_sizes() and call.op != "varlen":
        bias = bias.to_dense(call.mask_shape(), call.q.device, accumulate_dtype(call.q.dtype))
    if isinstance(bias, Tensor):
        # Kernels read a bias of q's dtype or of their accumulators: float32 beside float64 is neither.
        tensors["bias"] = to_4d(bias.double() if call.q.dtype == torch.float64 else bias)
        return 0, True
    seqlen_q, seqlen_k = call.seqlens()
    bottom_right = bias.align == "bottom_right"
    lo, hi = diagonal_range(seqlen_q, seqlen_k, bottom_right)
    dtype = accumulate_dtype(call.q.dtype)
    # In double, so that the parameter's gradient, a sum over all of them, is no worse than its terms.
    diagonals = bias.diagonals(call.num_heads(), lo, hi, torch.float64)
    tensors["diag"] = diagonals.to(dtype).contiguous()
    return lo, bottom_right


def diagonal_range(seqlen_q: int, seqlen_k: int, bottom_right: bool) -> tuple[int, int]:
    """The smallest and largest r = j - i - offset of a call.

    The smallest is at the last row of the first key, the largest at the first row of the last key. With
    offset = len_k - len_q they are 1 - len_k and len_q - 1, and longest where the lengths are.
    """
    lo, hi = (1 - seqlen_k, seqlen_q - 1) if bottom_right else (1 - seqlen_q, seqlen_k - 1)
    return lo, max(lo, hi)  # without queries and keys there is no position, but one does no harm
