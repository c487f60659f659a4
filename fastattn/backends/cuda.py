"""The CUDA C++ kernels for Hopper on tensors: allocate, describe, call fastattn._cuda; nothing waits.

There is a forward pass alone; `fastattn.joined` puts the backward pass of another backend beside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.common import device_of, filled, parts_of
from fastattn.backends.cpu_views import DTYPE_CODES, Layout
from fastattn.lowering import Operands, Params
from fastattn.spec import AttentionSpec
from fastattn.strides import dense_last

name = "cuda"

CAPABILITY = 90
MAX_HEAD_DIM = 256
LONGEST = 2**30 - 1  # positions are 32-bit numbers, of which kernels add two
ALIGNMENT = 16  # bytes, of addresses and strides that the copy engine takes


@cache
def library() -> Any:
    """fastattn._cuda, or a text that says why it is not there."""
    try:
        from fastattn import _cuda  # type: ignore[attr-defined]
    except ImportError as error:
        return f"the extension fastattn._cuda is not built: install with FASTATTN_CUDA=1 ({error})"
    return _cuda


def _against_the_machine(device: str) -> str:
    """Why the kernels do not run here on tensors of a device type, or an empty text."""
    module = library()
    runs_on = "cuda" if isinstance(module, str) else module.device_type()
    reasons = [module] if isinstance(module, str) else []
    if device != runs_on:
        reasons.append(f"it runs on {runs_on} tensors, not {device}")
    elif not reasons and (problem := state()):
        reasons.append(problem)
    return "; ".join(reasons)


# What torch.compiler.assume_constant_result sets, which would import the compiler: a trace calls the function
# and keeps its result.
_against_the_machine._dynamo_marked_constant = True  # type: ignore[attr-defined]


def state() -> str:
    """What speaks against running the kernels on the current device, or an empty text.

    Asked only where a tensor is on one: it starts the driver, after which a process cannot be forked.
    """
    module = library()
    if isinstance(module, str):
        return module
    return _problem(module) or _against_the_device(
        module, torch.cuda.current_device() if module.device_type() == "cuda" else 0
    )


@cache
def _problem(module: Any) -> str:
    if problem := module.problem():
        return str(problem)
    usable = module.device_type() == "cpu" or torch.cuda.is_available()
    return "" if usable else "this PyTorch finds no CUDA device"


@cache
def _against_the_device(module: Any, device: int) -> str:
    got = module.capability(device)
    return (
        ""
        if got == CAPABILITY
        else f"its kernels are for compute capability {CAPABILITY / 10}, not {got / 10}"
    )


def supports(spec: AttentionSpec) -> str | None:
    """None, or every reason why this backend cannot run the forward pass of a call."""
    reasons = []
    if machine := _against_the_machine(spec.device):
        reasons.append(machine)
    if spec.dtype not in ("bfloat16", "float16"):
        reasons.append(f"it has bfloat16 and float16, not {spec.dtype}")
    dims = (spec.head_dim, spec.head_dim_v)
    if any(dim % 8 or not 0 < dim <= MAX_HEAD_DIM for dim in dims):
        wanted = f"head_dim and head_dim_v must be multiples of 8 up to {MAX_HEAD_DIM}"
        reasons.append(f"{wanted}, got {dims[0]} and {dims[1]}")
    if spec.score != "dot":
        reasons.append(f"it has no {spec.score} score")
    if spec.paged:
        reasons.append("it has no paged caches")
    if max(spec.seqlen_q, spec.seqlen_k) > LONGEST:
        reasons.append(f"lengths go up to {LONGEST}, not {max(spec.seqlen_q, spec.seqlen_k)}")
    return "; ".join(reasons) or None


def forward(
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, need_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """out and lse of a lowered call.

    Args:
        q, k, v: as in fastattn.call.Call.
        operands, params: see fastattn.lowering.
        need_lse: whether lse is wanted.
    Returns:
        out in q's dtype and stride order; lse float32, [B, Hq, Lq] or [Hq, total_q], or None.
    Raises:
        RuntimeError: the kernel could not be launched.
    """

    def fill(operands: Operands, out: Tensor, lse: Tensor | None) -> None:
        _launch(q, k, v, operands, params, out, lse)

    return filled(q, k, v, operands, params, need_lse, fill)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, out: Tensor, lse: Tensor | None
) -> None:
    rows = range(q.dim() - 1)
    q = _aligned(q, rows)
    k, v = (_aligned(t, rows[-1:] if t.dim() == 4 else rows[:1]) for t in (k, v))
    seq = Layout(q, k, operands, params)
    totals = (q.shape[0], k.shape[0]) if seq.packed else (0, 0)
    rooms: list[Tensor] = []  # until the kernels are in the stream, behind which their memory is used again

    def room(tiles: int, multiprocessors: int, size: int) -> tuple[int, int]:
        parts = parts_of(tiles, seq.seqlen_q, seq.seqlen_k, multiprocessors)
        if parts == 1:
            return 1, 0
        rooms.append(q.new_empty(parts * size, dtype=torch.float32))
        return parts, rooms[0].data_ptr()

    with device_of(q):
        try:
            library().attention_fwd(
                DTYPE_CODES[q.dtype],
                seq.query(q),
                seq.key(k),
                seq.key(v),
                seq.query(out),
                None if lse is None else seq.rows(lse),
                params.scale,
                totals,
                q.device.index or 0,
                torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0,
                room,
                seq.options(operands, params),
            )
        except RuntimeError as error:
            shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, {q.dtype}"
            raise RuntimeError(f"{error} (backend 'cuda', {shapes}, {params})") from None


def _aligned(tensor: Tensor, distinct: range) -> Tensor:
    """The tensor itself where the copy engine takes it as it lies, otherwise a contiguous copy.

    Args:
        distinct: dimensions whose elements must not share memory.
    """
    tensor = dense_last(tensor)
    size = tensor.element_size()
    fits = tensor.data_ptr() % ALIGNMENT == 0
    for dim, (length, stride) in enumerate(zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)):
        if length > 1:
            fits = fits and stride * size % ALIGNMENT == 0 and (stride > 0 or dim not in distinct)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
