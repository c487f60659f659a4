"""Lazy: a tensor of scores or weights that knows how it is made, and is made only where somebody looks."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastattn.integrations.handwritten.scores import RowMaximum, Scores, Transposed, Weights, dropped

Meaning = Scores | Weights | Transposed | RowMaximum
# A function and the args and kwargs that it is called with, among which may be lazies.
Make = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Autocast = tuple[str, bool, torch.dtype] | None

# What may be asked of a tensor without its values.
_ABOUT_SHAPE = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cpu", "is_cuda", "is_nested")
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.is_complex,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    Tensor.__len__,
}
_DROPOUTS = (F.dropout, torch.dropout)
_LEAVE = "leave this module as it is, by fastattn.patch(model, skip=[its name])"

# function -> what it gives for lazy arguments: (function, *args, **kwargs) -> a result, or NotImplemented
RULES: dict[Any, Callable[..., Any]] = {}


class _Thread(threading.local):
    def __init__(self) -> None:
        self.live: list[weakref.ref[Lazy]] = []  # lazies of this thread that may not have been made yet


_thread = _Thread()


class Notes:
    """What became of the attention of one module.

    Attributes:
        runs: calls of the module.
        fused: calls of attention that its products became.
        copies: whether the module may write into what these return, of which autograd must keep the value.
        scores, weights: functions that no call of attention has, for which they were computed as written.
        refused: the last error that was raised below C++, which may have lost it.
    """

    def __init__(self) -> None:
        self.runs = self.fused = 0
        self.copies = False
        self.refused: str | None = None
        self.scores: set[str] = set()
        self.weights: set[str] = set()

    def add(self, lazy: Lazy, func: Any) -> None:
        found = self.scores if isinstance(lazy.meaning, Scores) else self.weights
        found.add(getattr(func, "__name__", str(func)))


class Lazy(Tensor):
    """Scores or weights that have not been computed.

    Its values are those of the very calls that a model made, run in that order, under the same autograd and
    autocast modes; what `RULES` lists changes only what they mean. Wherever a Lazy is handed to any other
    function of torch, the values are computed first.

    Attributes:
        meaning: what the values are.
        notes: of the module in whose forward it was made.
        make: how its values are computed.
        made: the values, where they have been.
        shares_memory: whether the values are a view of those of the first parent.
        parents: the lazies that the values are computed from.
        inputs: the other tensors, each with its version (None where it counts none).
        children: the lazies computed from it.
    """

    meaning: Meaning
    notes: Notes
    make: Make
    made: Tensor | None
    shares_memory: bool
    parents: list[Lazy]
    inputs: list[tuple[Tensor, int | None]]
    children: list[weakref.ref[Lazy]]
    tracks_gradient: bool
    autocast: Autocast

    @staticmethod
    def of(
        meaning: Meaning,
        shape: Iterable[int],
        dtype: torch.dtype,
        notes: Notes,
        make: Make,
        shares_memory: bool = False,
    ) -> Lazy:
        """A tensor of this shape and dtype that means `meaning` and is made by `make`."""
        tensors = [t for t in tree_leaves(make[1:]) if isinstance(t, Tensor)]
        device = tensors[0].device
        lazy: Lazy = Tensor._make_wrapper_subclass(Lazy, tuple(shape), dtype=dtype, device=device)
        lazy.meaning, lazy.notes, lazy.make, lazy.made = meaning, notes, make, None
        lazy.shares_memory, lazy.children = shares_memory, []
        lazy.tracks_gradient, lazy.autocast = torch.is_grad_enabled(), _autocast(device.type)
        lazy.parents = [t for t in tensors if isinstance(t, Lazy)]
        lazy.inputs = [
            (t, None if t.is_inference() else t._version) for t in tensors if not isinstance(t, Lazy)
        ]
        for parent in lazy.parents:
            parent.children.append(weakref.ref(lazy))
        _thread.live = [ref for ref in _thread.live if ref() is not None]
        _thread.live.append(weakref.ref(lazy))
        return lazy

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ABOUT_SHAPE:
                return func(*args, **kwargs)
            rule = RULES.get(func)
            if rule is not None:
                found = by_rule(rule, func, *args, **kwargs)
                if found is not NotImplemented:
                    return found
            for lazy in tree_leaves((args, kwargs)):
                if isinstance(lazy, Lazy):
                    lazy.notes.add(lazy, func)
                    if may_change(func, kwargs):
                        lazy.settle_relatives()
            args, kwargs = tree_map(without_lazy, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Called from C++, past every mode, and past autograd.
        for lazy in tree_leaves((args, kwargs)):
            if isinstance(lazy, Lazy) and lazy.has_gradient:
                lazy.notes.refused = (
                    f"{func} was called from C++ with attention weights that have not been computed, where "
                    f"autograd would not see that: {_LEAVE}"
                )
                raise RuntimeError(lazy.notes.refused)
        args, kwargs = tree_map(without_lazy, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.settled())

    def settled(self) -> Tensor:
        """The values, computed now if they have not been."""
        if self.made is not None:
            return self.made
        self.check_inputs()
        func, args, kwargs = self.make
        with torch.set_grad_enabled(self.tracks_gradient), _under(self.autocast):
            if func in _DROPOUTS and isinstance(self.meaning, Weights):
                # A call may have run with these weights already: the same elements are dropped.
                self.made = dropped(self.meaning, self.parents[0].settled())
            else:
                args, kwargs = tree_map(without_lazy, (args, kwargs))
                self.made = func(*args, **kwargs)
        return self.made

    def check_inputs(self) -> None:
        """Raise where a tensor that the values are computed from has changed since, unseen by any mode."""
        for tensor, version in self.inputs:
            if version is not None and tensor._version != version:
                raise RuntimeError(
                    "a tensor was changed in place between the product that read it and the use of that "
                    f"product, which had been put off: {_LEAVE}"
                )
        for parent in self.parents:
            if parent.made is None:
                parent.check_inputs()

    @property
    def has_gradient(self) -> bool:
        """Whether autograd is to follow the values back to what they are computed from."""
        if not self.tracks_gradient:
            return False
        return any(t.requires_grad for t, _ in self.inputs) or any(p.has_gradient for p in self.parents)

    @property
    def is_alone(self) -> bool:
        """Whether nothing else is computed from this one or shares its memory."""
        has_children = any(ref() is not None for ref in self.children)
        return self.made is None and not self.shares_memory and not has_children

    def become(self, other: Lazy) -> Lazy:
        """This very object with the meaning of one made from it, as an in-place function leaves it."""
        before = Lazy.of(self.meaning, self.shape, self.dtype, self.notes, self.make)
        before.tracks_gradient, before.autocast = self.tracks_gradient, self.autocast
        before.parents, before.inputs = self.parents, self.inputs
        func, args, kwargs = other.make
        self.make = (func, *tree_map(lambda x: before if x is self else x, (args, kwargs)))
        self.parents = [before if parent is self else parent for parent in other.parents]
        self.meaning, self.inputs = other.meaning, other.inputs
        self.tracks_gradient, self.autocast = other.tracks_gradient, other.autocast
        return self

    def settle_relatives(self) -> None:
        """Compute all that shares memory with this one, or is computed from what does, before it changes."""
        root = self
        while root.shares_memory:
            root = root.parents[0]
        stack = [root]
        while stack:
            lazy = stack.pop()
            lazy.settled()
            stack += [child for ref in lazy.children if (child := ref()) is not None]


def by_rule(rule: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a rule or a product gives; NotImplemented for arguments spelled in a way that it does not know."""
    try:
        return rule(*args, **kwargs)
    except TypeError:
        try:
            inspect.signature(rule).bind(*args, **kwargs)
        except TypeError:
            return NotImplemented
        raise


def without_lazy(value: Any) -> Any:
    """The values of a Lazy; anything else as it is."""
    return value.settled() if isinstance(value, Lazy) else value


def settle_readers(tensors: Iterable[Any]) -> None:
    """Compute this thread's lazies that read memory of the tensors, which are about to change."""
    if not _thread.live:
        return
    memory = {_memory(t) for t in tensors if isinstance(t, Tensor) and not isinstance(t, Lazy)}
    for ref in list(_thread.live):
        lazy = ref()
        if lazy is not None and lazy.made is None and any(_memory(t) in memory for t, _ in lazy.inputs):
            lazy.settled()


def may_change(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into its arguments, by the rules of its name."""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name in _WRITERS
    return name.endswith("_") or "out" in kwargs or bool(kwargs.get("inplace"))


_WRITERS = {"__setitem__", "__set__"} | {
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _autocast(device: str) -> Autocast:
    if not torch.amp.is_autocast_available(device):
        return None
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


@contextlib.contextmanager
def _under(autocast: Autocast) -> Iterator[None]:
    """The autocast state that was, where it is another one now."""
    if autocast is None or _autocast(autocast[0]) == autocast:
        yield
        return
    device, enabled, dtype = autocast
    with torch.autocast(device, dtype=dtype, enabled=enabled):
        yield
