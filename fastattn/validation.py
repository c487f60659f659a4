"""Every rule on the arguments of a call, with an error that names the argument, the rule and the value."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.checks import check_int, not_a_bias, not_a_mask
from fastattn.masks import Mask
from fastattn.spec import DISTANCE_SCORES, FLOAT_DTYPES, accumulate_dtype, dtype_name

_DTYPES = ", ".join(dtype_name(dtype) for dtype in FLOAT_DTYPES)
_LAYOUTS = {
    "attention": ("[batch, heads, length, head_dim]",) * 3,
    "varlen": ("[tokens, heads, head_dim]",) * 3,
    "decode": ("[batch, heads, length, head_dim]",) * 3,
    "paged": ("[batch, heads, length, head_dim]",) + ("[pages, heads, page, head_dim]",) * 2,
}


def validate(call: Call) -> None:
    """Check shapes, dtypes, devices and numbers of one call; normalise `dropout_p`, `scale` and `softcap` to
    float.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device or number that breaks a rule.
        NotImplementedError: a combination that has no meaning yet (dense masks in varlen calls).
    """
    _check_qkv(call)
    if call.op == "varlen":
        _check_cu_seqlens(call)
    elif call.op == "decode":
        _check_cache(call)
    validate_options(call)


def validate_options(call: Call) -> None:
    """The part of `validate` that is left once q, k, v and the lengths are known to be right."""
    _check_numbers(call)
    if call.mask is not None:
        _check_mask(call)
    if call.bias is not None:
        _check_bias(call)
    if call.sinks is not None:
        check_sinks(call.sinks, call.num_heads(), call.q)
    if call.score == "additive":
        _check_score_weights(call.name("score_weights"), call.score_weights, call.q)
    if call.dropout_seed is not None:
        check_seed("dropout_seed", call.dropout_seed, call.q.device)


def check_tensor(name: str, value: Any, device: torch.device | None = None, owner: str = "q") -> Tensor:
    """`value` as a dense tensor on `device`, that of the argument called `owner`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise NotImplementedError(f"{name} must be a dense tensor, got a nested one: use varlen_attention")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {value.layout}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {owner}'s device {device}, got {value.device}")
    return value


def check_floating(name: str, value: Any) -> Tensor:
    """`value` as a dense tensor of one of the dtypes that there are kernels for."""
    if check_tensor(name, value).dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be one of {_DTYPES}, got {dtype_name(value.dtype)}")
    return value


def _check_qkv(call: Call) -> None:
    layouts = _LAYOUTS["paged" if call.block_table is not None else call.op]
    device = call.q.device if isinstance(call.q, Tensor) else None
    names = tuple(map(call.name, ("q", "k", "v") if call.op != "decode" else ("q", "k_cache", "v_cache")))
    for name, layout, value in zip(names, layouts, (call.q, call.k, call.v), strict=True):
        check_tensor(name, value, device, names[0])
        dims = layout.count(",") + 1
        if value.dim() != dims:
            raise ValueError(f"{name} must be {dims}-D {layout}, got shape {_shape(value)}")
        if name == names[0]:
            if value.dtype not in FLOAT_DTYPES:
                raise TypeError(f"{name} must be one of {_DTYPES}, got {dtype_name(value.dtype)}")
        elif value.dtype != call.q.dtype:
            want = dtype_name(call.q.dtype)
            raise TypeError(f"{name} must have {names[0]}'s dtype {want}, got {dtype_name(value.dtype)}")
    _check_qkv_shapes(call, *names)


def _check_qkv_shapes(call: Call, name_q: str, name_k: str, name_v: str) -> None:
    q, k, v = call.q, call.k, call.v
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{name_k} must have {name_q}'s head_dim {q.shape[-1]}, got {k.shape[-1]}")
    if call.op != "varlen" and call.block_table is None:
        for name, value in ((name_k, k), (name_v, v)):
            if value.shape[0] != q.shape[0]:
                raise ValueError(f"{name} must have {name_q}'s batch size {q.shape[0]}, got {value.shape[0]}")
    if k.shape[:-1] != v.shape[:-1]:
        want = ", ".join(map(str, (*k.shape[:-1], "head_dim_v")))
        raise ValueError(f"{name_v} must have shape [{want}] like {name_k}, got {_shape(v)}")
    heads, heads_kv = call.num_heads(), call.num_heads_kv()
    if heads_kv == 0 or heads == 0:
        if heads != heads_kv:
            raise ValueError(
                f"{name_q} and {name_k} must both have heads, or neither: got {heads} and {heads_kv}"
            )
    elif heads % heads_kv != 0:
        raise ValueError(f"{name_q}'s heads must be a multiple of {name_k}'s {heads_kv}, got {heads}")


def check_number(name: str, value: Any, dtype: torch.dtype = torch.float64) -> float:
    """`value` as a Python float that is finite in `dtype`."""
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite in {dtype_name(dtype)}, got {value}") from None
    # A traced number has no value yet.
    if not torch.compiler.is_compiling() and not abs(number) <= torch.finfo(dtype).max:
        kind = f" in {dtype_name(dtype)}" if math.isfinite(number) else ""
        raise ValueError(f"{name} must be finite{kind}, got {value}")
    return number


def _check_numbers(call: Call) -> None:
    dtype = accumulate_dtype(call.q.dtype)
    if call.scale is not None:
        call.scale = check_number("scale", call.scale, dtype)
    if call.softcap is not None:
        call.softcap = check_number("softcap", call.softcap, dtype)
        if call.softcap <= 0:
            raise ValueError(f"softcap must be positive, got {call.softcap}")
        if call.score in DISTANCE_SCORES:  # would cap a distance, or its kernel's logarithm? it means neither
            raise ValueError(f"softcap must be None with the score {call.score!r}, got {call.softcap}")
    if type(call.dropout_p) is not float:
        call.dropout_p = check_number("dropout_p", call.dropout_p)
    if not 0 <= call.dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {call.dropout_p}")


def check_seed(name: str, value: Any, device: torch.device) -> None:
    seed = check_tensor(name, value, device)
    if seed.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor of one element, got {dtype_name(seed.dtype)}")
    if seed.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {_shape(seed)}")


def check_sinks(value: Any, heads: int, q: Tensor) -> None:
    sinks = check_tensor("sinks", value, q.device)
    if sinks.dtype not in FLOAT_DTYPES:
        raise TypeError(f"sinks must be one of {_DTYPES}, got {dtype_name(sinks.dtype)}")
    if sinks.shape != (heads,):
        raise ValueError(f"sinks must have shape [{heads}], one per query head, got {_shape(sinks)}")


def _check_score_weights(name: str, value: Any, q: Tensor) -> None:
    weights = check_tensor(name, value, q.device)
    if weights.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be one of {_DTYPES}, got {dtype_name(weights.dtype)}")
    if weights.shape != (q.shape[-1],):
        raise ValueError(
            f"{name} must have shape [{q.shape[-1]}], one weight per feature of q, got {_shape(weights)}"
        )


def _scores_shape(call: Call) -> list[int]:
    return [call.batch(), call.num_heads(), *call.seqlens()]


def broadcasts(shape: torch.Size, want: Sequence[int]) -> bool:
    """Whether `shape` broadcasts to exactly `want`."""
    if len(shape) > len(want):
        return False
    return all(n == 1 or n == m for n, m in zip(shape, want[len(want) - len(shape) :], strict=True))


def _check_mask(call: Call) -> None:
    mask, name = call.mask, call.name("mask")
    if isinstance(mask, Mask):
        return
    if not isinstance(mask, Tensor):
        raise not_a_mask(name, mask)
    check_tensor(name, mask, call.q.device, call.name("q"))
    if mask.dtype != torch.bool:
        got = dtype_name(mask.dtype)
        raise TypeError(f"{name} must be bool (True = attend), got {got}: pass additive masks as bias")
    if call.op == "varlen":
        raise NotImplementedError(
            f"{name} must be a fastattn.masks.Mask in varlen_attention, got a dense tensor"
        )
    check_broadcast(name, mask, _scores_shape(call))


def _check_bias(call: Call) -> None:
    bias, name = call.bias, call.name("bias")
    if isinstance(bias, Bias):
        bias.check(call.mask_shape(), call.q.device)
        return
    if not isinstance(bias, Tensor):
        raise not_a_bias(name, bias)
    check_tensor(name, bias, call.q.device, call.name("q"))
    if bias.dtype != call.q.dtype and bias.dtype != torch.float32:
        want, got = dtype_name(call.q.dtype), dtype_name(bias.dtype)
        either = want if call.q.dtype == torch.float32 else f"{want} or float32"
        raise TypeError(f"{name} must have {call.name('q')}'s dtype {either}, got {got}")
    if call.op == "varlen":
        raise NotImplementedError(f"{name} must be a fastattn.biases.Bias in varlen_attention, got a tensor")
    check_broadcast(name, bias, _scores_shape(call))


def check_broadcast(name: str, tensor: Tensor, want: Sequence[int]) -> None:
    if not broadcasts(tensor.shape, want):
        raise ValueError(f"{name} must broadcast to {list(want)}, got {_shape(tensor)}")


def _check_index(name: str, value: Any, dims: int, dtypes: tuple[torch.dtype, ...], q: Tensor) -> None:
    check_tensor(name, value, q.device)
    if value.dtype not in dtypes:
        names = " or ".join(dtype_name(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {dtype_name(value.dtype)}")
    if value.dim() != dims:
        raise ValueError(f"{name} must be {dims}-D, got shape {_shape(value)}")


def _check_cu_seqlens(call: Call) -> None:
    for name, value in (("cu_seqlens_q", call.cu_seqlens_q), ("cu_seqlens_k", call.cu_seqlens_k)):
        _check_index(name, value, 1, (torch.int32,), call.q)
        if value is not None and value.shape[0] < 1:
            raise ValueError(f"{name} must have one element more than there are sequences, got shape [0]")
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        sizes = call.cu_seqlens_q.shape[0], call.cu_seqlens_k.shape[0]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"cu_seqlens_k must have as many elements as cu_seqlens_q, {sizes[0]}, got {sizes[1]}"
            )
    for name, longest in (("max_seqlen_q", call.max_seqlen_q), ("max_seqlen_k", call.max_seqlen_k)):
        setattr(call, name, check_int(name, longest, 0))


def _check_cache(call: Call) -> None:
    _check_index("lengths", call.lengths, 1, (torch.int32, torch.int64), call.q)
    batch = call.batch()
    if call.lengths is not None and call.lengths.shape[0] != batch:
        raise ValueError(
            f"lengths must have shape [{batch}], one per batch entry, got {_shape(call.lengths)}"
        )
    if call.block_table is None:
        return
    _check_index("block_table", call.block_table, 2, (torch.int32,), call.q)
    if call.block_table.shape[0] != batch:
        raise ValueError(
            f"block_table must have {batch} rows, one per batch entry, got {_shape(call.block_table)}"
        )


def check_values(call: Call) -> None:
    """The rules on the contents of index tensors; only for concrete CPU tensors, whose values are free to
    read.

    Raises:
        ValueError: lengths, offsets or pages that point outside their tensors.
    """
    if call.op == "varlen":
        check_cu_seqlens_values("cu_seqlens_q", call.cu_seqlens_q, call.q.shape[0], call.max_seqlen_q, "q")
        check_cu_seqlens_values("cu_seqlens_k", call.cu_seqlens_k, call.k.shape[0], call.max_seqlen_k, "k")
    elif call.op == "decode":
        check_cache_values(call.lengths, call.block_table, call.seqlens()[1], call.k.shape)


def check_cu_seqlens_values(name: str, cu: Tensor | None, total: int, longest: int, packed: str) -> None:
    values = cu.tolist() if cu is not None else [0]
    if values[0] != 0:
        raise ValueError(f"{name} must start with 0, got {values[0]}")
    for index, (low, high) in enumerate(itertools.pairwise(values)):
        if high < low:
            raise ValueError(f"{name} must not decrease, got {low} then {high} at index {index}")
        if high - low > longest:
            maximum = name.replace("cu_seqlens", "max_seqlen")
            raise ValueError(f"{maximum} must be at least the longest sequence, {high - low}, got {longest}")
    if values[-1] != total:
        raise ValueError(f"{name} must end with {packed}'s number of tokens {total}, got {values[-1]}")


def check_cache_values(
    lengths: Tensor | None, table: Tensor | None, capacity: int, shape: torch.Size
) -> None:
    values = lengths.tolist() if lengths is not None else []
    for index, value in enumerate(values):
        if not 0 <= value <= capacity:
            raise ValueError(
                f"lengths must be between 0 and the capacity {capacity}, got {value} at index {index}"
            )
    if table is None or lengths is None or shape[2] == 0:
        return
    pages, page = shape[0], shape[2]
    # Tables are long; lengths and cu_seqlens are not.
    used = torch.arange(table.shape[1]) * page < lengths[:, None]
    wrong = used & ((table < 0) | (table >= pages))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        entry = int(table[row, column])
        raise ValueError(f"block_table must name pages between 0 and {pages - 1}, got {entry} in row {row}")


def _shape(value: Tensor) -> list[int]:
    return list(value.shape)
