"""Lazy: a tensor of scores or weights that knows how it is made, and is made only where somebody looks."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastattn.integrations.handwritten.scores import Scores, Transposed, Weights, dropped

# What may be asked of a tensor without its values.
ABOUT_SHAPE = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.is_nested.__get__,  # type: ignore[attr-defined]
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


DROPOUTS = (F.dropout, torch.dropout)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.live: list[weakref.ref[Lazy]] = []  # lazies of this thread that may not have been made yet


_thread = _Thread()

# function -> what it gives for lazy arguments: (*args, **kwargs) -> a result, or NotImplemented
RULES: dict[Any, Callable[..., Any]] = {}


class Notes:
    """What became of the attention of one module.

    Attributes:
        fused: calls of attention that its products became.
        computed: what asked for values that no call of attention has, and so had them computed as written.
    """

    def __init__(self) -> None:
        self.fused = 0
        self.computed: set[str] = set()


class Lazy(Tensor):
    """Scores or weights that have not been computed.

    Its values are those of the very calls that a model made, run in that order, under the same autograd and
    autocast modes; what `RULES` lists changes only what they mean. Wherever a Lazy is handed to any other
    function of torch, the values are computed first.
    """

    meaning: Scores | Weights | Transposed
    _make: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
    _made: Tensor | None
    _notes: Notes

    @staticmethod
    def new(
        meaning: Scores | Weights | Transposed,
        shape: Iterable[int],
        dtype: torch.dtype,
        notes: Notes,
        make: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
        is_view: bool = False,
    ) -> Lazy:
        """A tensor that means `meaning`.

        Args:
            shape, dtype: of the values.
            make: function, args and kwargs that compute them, among which may be other lazies.
            is_view: whether they share memory with those of the lazy among args.
        """
        inputs = [t for t in tree_leaves(make[1:]) if isinstance(t, Tensor)]
        device = inputs[0].device
        lazy = Tensor._make_wrapper_subclass(Lazy, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
        lazy.meaning, lazy._make, lazy._made, lazy._notes = meaning, make, None, notes
        lazy._is_view, lazy._children = is_view, []
        lazy._tracks = torch.is_grad_enabled()
        lazy._autocast = _autocast(device.type)
        lazy._parents = [t for t in inputs if isinstance(t, Lazy)]
        lazy._inputs = [
            (t, None if t.is_inference() else t._version) for t in inputs if not isinstance(t, Lazy)
        ]
        for parent in lazy._parents:
            parent._children.append(weakref.ref(lazy))
        _thread.live = [ref for ref in _thread.live if ref() is not None]
        _thread.live.append(weakref.ref(lazy))
        return lazy

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in ABOUT_SHAPE:
                return func(*args, **kwargs)
            rule = RULES.get(func)
            if rule is not None:
                found = rule(func, *args, **kwargs)
                if found is not NotImplemented:
                    return found
            is_in_place = may_change(func, kwargs)
            for lazy in tree_leaves((args, kwargs)):
                if isinstance(lazy, Lazy):
                    lazy._notes.computed.add(getattr(func, "__name__", str(func)))
                    if is_in_place:
                        lazy.settle_relatives()
            args, kwargs = tree_map(without_lazy, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(
            f"{func} was called from C++ with attention weights that fastattn has not computed, where autograd "
            "would not see them: leave this module as it is, with fastattn.patch(model, skip=[its name])"
        )

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.values())

    def values(self) -> Tensor:
        """The tensor, computed now if it has not been."""
        if self._made is None:
            self.check_inputs()
            func, args, kwargs = self._make
            weights = self.meaning
            with torch.set_grad_enabled(self._tracks), under_autocast(self._autocast):
                if func in DROPOUTS and isinstance(weights, Weights) and weights.seed is not None:
                    # A call may have run with these weights already: the same elements are dropped.
                    self._made = dropped(weights, self._parents[0].values())
                else:
                    args, kwargs = tree_map(without_lazy, (args, kwargs))
                    self._made = func(*args, **kwargs)
        return self._made

    def check_inputs(self) -> None:
        """Raise where a tensor that this one is computed from has been changed since, unseen by the rules."""
        for tensor, version in self._inputs:
            if version is not None and tensor._version != version:
                raise RuntimeError(
                    "a tensor was changed in place between the product that read it and the use of that product, "
                    "which fastattn put off: leave this module as it is, with fastattn.patch(model, skip=[its "
                    "name])"
                )
        for parent in self._parents:
            if parent._made is None:
                parent.check_inputs()

    @property
    def is_alone(self) -> bool:
        """Whether nothing else is computed from this one or shares its memory."""
        return not self._is_view and self._made is None and not any(ref() is not None for ref in self._children)

    def become(self, other: Lazy) -> Lazy:
        """This very object with another meaning, as an in-place function leaves it."""
        func, args, kwargs = other._make
        before = Lazy.new(self.meaning, self.shape, self.dtype, self._notes, self._make)
        before._tracks, before._autocast, before._inputs = self._tracks, self._autocast, self._inputs
        before._parents = self._parents
        args, kwargs = tree_map(lambda x: before if x is self else x, (args, kwargs))
        self.meaning, self._make = other.meaning, (func, args, kwargs)
        self._parents = [before if parent is self else parent for parent in other._parents]
        self._inputs, self._tracks, self._autocast = other._inputs, other._tracks, other._autocast
        return self

    def settle_relatives(self) -> None:
        """Compute all that shares memory with this one, or is computed from what does, before it changes."""
        root = self
        while root._is_view:
            root = root._parents[0]
        stack = [root]
        while stack:
            lazy = stack.pop()
            lazy.values()
            stack += [child for ref in lazy._children if (child := ref()) is not None]


def without_lazy(value: Any) -> Any:
    """The values of a Lazy; anything else as it is."""
    return value.values() if isinstance(value, Lazy) else value


def settle_readers(tensors: Iterable[Any]) -> None:
    """Compute this thread's lazies that read memory of the tensors, which are about to change."""
    if not _thread.live:
        return
    memory = {_memory(t) for t in tensors if isinstance(t, Tensor) and not isinstance(t, Lazy)}
    for ref in list(_thread.live):
        lazy = ref()
        if lazy is not None and lazy._made is None and any(_memory(t) in memory for t, _ in lazy._inputs):
            lazy.values()


def may_change(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into its arguments, by the rules of its name."""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__index__", "__int__") or name in (
            "__setitem__",
            "__set__",
        )
    return name.endswith("_") or "out" in kwargs or bool(kwargs.get("inplace"))


def under_autocast(state: tuple[str, bool, torch.dtype] | None) -> Any:
    """The autocast state that `_autocast` read, where it is another one now."""
    if state is None or _autocast(state[0]) == state:
        return contextlib.nullcontext()
    return torch.autocast(state[0], dtype=state[2], enabled=state[1])


def _autocast(device: str) -> tuple[str, bool, torch.dtype] | None:
    if not torch.amp.is_autocast_available(device):
        return None
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
