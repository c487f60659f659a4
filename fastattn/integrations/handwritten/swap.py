"""Modules whose own forward runs with our attention: a change of class, pickled by the class that it was."""

from __future__ import annotations

import copyreg
import functools
import inspect
import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastattn.integrations.handwritten.lazy import Lazy, Notes, without_lazy
from fastattn.integrations.handwritten.mode import AttentionMode
from fastattn.integrations.handwritten.scan import calls_mha, may_write
from fastattn.integrations.handwritten.scores import Weights
from fastattn.integrations.torch.override import Mode, override_sdpa

_notes: WeakKeyDictionary[nn.Module, Notes] = WeakKeyDictionary()


def is_ours(kind: type) -> bool:
    """Whether a class is one that `swap` has made."""
    return "_fastattn_stock" in vars(kind)


def is_swapped(module: nn.Module) -> bool:
    return is_ours(type(module))


def stock_of(module: nn.Module) -> Any:
    """The class that a module has, or had before it was swapped."""
    kind = type(module)
    return kind.__mro__[1] if is_ours(kind) else kind


def swap(module: nn.Module) -> None:
    """Let a module's attention run on ours, by a subclass of its class that has the same name."""
    kind: Any = type(module)
    module.__class__ = _subclass(kind)


def swap_back(module: nn.Module) -> None:
    kind: Any = type(module)
    module.__class__ = kind._fastattn_stock
    _notes.pop(module, None)


def notes_of(module: nn.Module) -> Notes:
    """What became of the attention that a swapped module writes out itself, in all its calls so far."""
    found = _notes.get(module)
    if found is None:
        found = _notes.setdefault(module, Notes())
        found.copies = may_write(stock_of(module))
    return found


@functools.cache
def _subclass(stock: Any) -> Any:
    """One per class, so that modules of one class keep one class, as torch.compile's guards want it."""

    @functools.wraps(stock.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, stock, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        function, args, *rest = stock.__reduce_ex__(self, protocol)
        if function is copyreg.__newobj__ and args[0] is type(self):  # type: ignore[attr-defined]
            return (_new, (stock, *args[1:]), *rest)
        return (function, args, *rest)

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_fastattn_stock": stock,
    }
    return type(stock)(stock.__name__, (stock,), body)


def _new(stock: type, *args: Any) -> Any:
    """What pickle and copy make a swapped module from."""
    kind = _subclass(stock)
    return kind.__new__(kind, *args)


def _run(module: nn.Module, stock: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The stock forward with our attention in the place of PyTorch's, and of what it writes out."""
    if torch.compiler.is_compiling():
        with override_sdpa():  # written-out attention is the compiler's
            return stock.forward(module, *args, **kwargs)
    if _wants_weights(module, stock, args, kwargs):
        with Mode(None):
            return stock.forward(module, *args, **kwargs)
    notes = notes_of(module)
    notes.runs += 1
    before = notes.fused
    notes.refused = None
    try:
        # Modules of transformers return weights unasked, which nobody then looks at.
        with AttentionMode(notes, needs_weights=not (_from_transformers(stock) and calls_mha(stock))):
            out = stock.forward(module, *args, **kwargs)
    except RuntimeError as error:
        if notes.refused is None or notes.refused in str(error):
            raise
        raise RuntimeError(notes.refused) from error  # TorchScript leaves the message of an error out
    if isinstance(out, Tensor) and not isinstance(out, Lazy):
        return out
    if isinstance(out, tuple) and notes.fused > before and _from_transformers(stock):
        # Weights that nobody asked for are None, as from PyTorch's function. A module that cannot be asked
        # hands its own out not yet computed, in case its caller was.
        keep = _position(stock) is None
        rest = ((x if keep else None) if _is_weights(x) else _settled(x) for x in out[1:])
        return (_settled(out[0]), *rest)
    return _settled(out)


def _settled(out: Any) -> Any:
    return tree_map(without_lazy, out)


def _is_weights(value: Any) -> bool:
    return isinstance(value, Lazy) and isinstance(value.meaning, Weights)


def _wants_weights(module: Any, stock: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module of transformers, which all return weights, was asked for them."""
    if not _from_transformers(stock):
        return False
    asked = kwargs.get("output_attentions")
    position = _position(stock)
    if asked is None and position is not None and position < len(args):
        asked = args[position]
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", None)
    if asked:
        return True
    capturing = sys.modules.get("transformers.utils.output_capturing")
    active = getattr(capturing, "_active_collector", None)
    collector = active.get() if active is not None else None
    return collector is not None and any("attentions" in key for key in collector)


@functools.cache
def _position(stock: Any) -> int | None:
    """Where output_attentions stands among the positional arguments of a class's forward."""
    names = list(inspect.signature(stock.forward).parameters)[1:]
    return names.index("output_attentions") if "output_attentions" in names else None


def _from_transformers(stock: type) -> bool:
    return stock.__module__.startswith("transformers.")
