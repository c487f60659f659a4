"""T5's position bias as the table that it is, instead of the N x N tensors that its models make of it."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.biases import Bias, RelativePosition
from fastattn.masks import Mask
from fastattn.masks.space import MaskShape

NAME = "fastattn"

_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "is_cuda")
# What asks about a tensor without reading it.
_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}

# Layers that make the bias of T5, by their method compute_bias(query_length, key_length, device,
# past_seen_tokens), and whether keys after the query have buckets of their own: None = in encoders.
_LAYERS: dict[str, bool | None] = {
    "t5.T5Attention": None,
    "mt5.MT5Attention": None,
    "umt5.UMT5Attention": None,
    "longt5.LongT5Attention": None,
    "pop2piano.Pop2PianoAttention": None,
    "switch_transformers.SwitchTransformersAttention": None,
    "pix2struct.Pix2StructTextAttention": False,
}

# Layers that make zeros [1, H, Lq, Lk] in cross-attention, where they are given no position_bias.
_ZEROS = (*(path for path in _LAYERS if path != "umt5.UMT5Attention"), "udop.UdopAttention")
# Layers that make them too, but cannot be given one.
_OWN_ZEROS = ("umt5.UMT5Attention",)


class KeysOf(NamedTuple):
    """What was found of an additive mask beside a table."""

    bias: Tensor  # [B, 1, 1, 1|Lk]
    version: int | None  # of bias when it was read, None where writes are not counted
    visible: Mask | None  # what it says, if a mask says it


class BiasTensor(Tensor):
    """A tensor [1, H, Lq, Lk] of which only the bias exists that says what is in it.

    What reads the tensor gets it built at that moment, with gradients to the bias's parameters.
    """

    bias: Bias
    keys_of: KeysOf | None  # for the layers that the tensor is handed on to

    @staticmethod
    def __new__(cls, bias: Bias, seqlen_q: int, seqlen_k: int) -> BiasTensor:
        size, parameter = (1, bias.heads, seqlen_q, seqlen_k), bias.parameter
        self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=parameter.dtype, device=parameter.device)
        self.bias, self.keys_of = bias, None
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(BiasTensor, BiasTensor.to_dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Only autograd's own aliases arrive here, no operation that reads a value.
        if func not in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            raise NotImplementedError(f"{func} of a BiasTensor below autograd")
        return BiasTensor(args[0].bias, *args[0].shape[2:])

    def to_dense(self) -> Tensor:  # type: ignore[override]
        """The tensor itself, differentiable."""
        return self.bias.to_dense(MaskShape(*self.shape), self.device, self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"BiasTensor({self.bias!r}, shape={list(self.shape)})"


def keep_tables() -> None:
    """Let the layers of T5 and its relatives make no N x N tensor, where their model runs on fastattn."""
    for path, bidirectional in _LAYERS.items():
        _wrap(path, "compute_bias", functools.partial(_with_table, bidirectional=bidirectional))
    for path in _ZEROS:
        _wrap(path, "forward", _without_zeros)
    for path in _OWN_ZEROS:
        _wrap(path, "forward", _without_own_zeros)


def _wrap(path: str, method: str, wrapper: Any) -> None:
    """Put a method of a layer into a wrapper, once."""
    model, name = path.split(".")
    try:
        layer = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)
    except (ImportError, AttributeError):  # a version of transformers without it
        return
    original = getattr(layer, method)
    if not hasattr(original, "_is_fastattn"):
        wrapped = wrapper(original)
        wrapped._is_fastattn = True
        setattr(layer, method, wrapped)


def _with_table(original: Any, *, bidirectional: bool | None) -> Any:
    """`compute_bias` that keeps the table where it can, and is the original everywhere else."""

    @functools.wraps(original)
    def compute_bias(
        self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0
    ) -> Tensor:
        align = _alignment(query_length, key_length, past_seen_tokens)
        if self.config._attn_implementation != NAME or align is None or not _may_be_lazy(self):
            return original(self, query_length, key_length, device=device, past_seen_tokens=past_seen_tokens)
        bias = RelativePosition(
            self.relative_attention_bias.weight,
            bidirectional=not self.is_decoder if bidirectional is None else bidirectional,
            max_distance=self.relative_attention_max_distance,
            align=align,
        )
        return BiasTensor(bias, query_length, key_length)

    return compute_bias


def _without_zeros(original: Any) -> Any:
    """`forward` that, in cross-attention, is given one zero for all scores instead of making one for each."""

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Any = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        is_bare = position_bias is None and key_value_states is not None
        if is_bare and not self.has_relative_attention_bias and self.config._attn_implementation == NAME:
            position_bias = hidden_states.new_zeros(1, 1, 1, 1)
        given = {"mask": mask, "key_value_states": key_value_states, "position_bias": position_bias}
        return original(self, hidden_states, **given, **kwargs)

    return forward


def _without_own_zeros(original: Any) -> Any:
    """`forward` that, in cross-attention, has one zero for all scores instead of making one for each."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_ours = self.config._attn_implementation == NAME and not torch.compiler.is_compiling()
        if is_ours and not self.has_relative_attention_bias:
            # Another object with the same parameters, so that no thread sees the layer change.
            twin = object.__new__(type(self))
            zero = hidden_states.new_zeros(1, 1, 1, 1)
            vars(twin).update(
                vars(self), has_relative_attention_bias=True, compute_bias=lambda *_, **__: zero
            )
            self = twin
        return original(self, hidden_states, *args, **kwargs)

    return forward


def _alignment(query_length: int, key_length: int, past_seen_tokens: Any) -> Any:
    """How queries that come after the past stand to the keys; None where no alignment says so."""
    if query_length == 1 or isinstance(past_seen_tokens, Tensor):  # one row is no longer than a table
        return None
    if past_seen_tokens == key_length - query_length:
        return "bottom_right"
    return "top_left" if past_seen_tokens == 0 else None


def _may_be_lazy(layer: Any) -> bool:
    return not torch.compiler.is_compiling() and not (layer.training and _is_reentrant(layer))


def _is_reentrant(layer: Any) -> bool:
    """Whether checkpoints cut autograd's graph at each layer: a bias then needs a gradient of its own."""
    if not getattr(layer, "gradient_checkpointing", False):  # UMT5's layers hand nothing on, and have no flag
        return False
    chosen = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return chosen.get("use_reentrant") is not False
