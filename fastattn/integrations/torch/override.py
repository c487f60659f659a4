"""`override_sdpa`: a model's `F.scaled_dot_product_attention` is fastattn's, for a block or from here on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _len_torch_function_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._device import DeviceContext

from fastattn import dispatch
from fastattn.integrations.torch import from_cpp, stand_ins

_Function = TypeVar("_Function", bound=Callable[..., Any])


class override_sdpa:
    """While it holds, `F.scaled_dot_product_attention` is `fastattn.scaled_dot_product_attention`.

    >>> q = torch.randn(1, 2, 3, 4)
    >>> want = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    >>> with override_sdpa():
    ...     got = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    >>> torch.allclose(got, want, atol=1e-6)
    True

    Like `torch.set_grad_enabled` it works in three ways:
      a plain call   takes effect at once; `.undo()` ends it.
      `with`         ends it with the block, however the block ends. An object can be entered again, inside
                     itself, and from several threads.
      a decorator    `@override_sdpa()` holds while the function runs.
    Of several overrides the one that began last counts; each ends alone, in any order.

    It holds in the thread that calls or enters it, under whatever name a model imported the function.
    Gradients belong to the forward call: backward may run outside, except under activation checkpointing,
    which calls the model again in backward. `nn.MultiheadAttention(need_weights=False)` and the encoder
    layers above it are reached, in eval mode too. Under torch.compile it holds around the compiled call,
    which is then compiled once more; inside compiled code it must end there.

    Calls from C++ are reached on CPU tensors: TorchScript (its encoder layers in eval mode included), C++
    extensions and operators, `torch.ops.aten`. For that, PyTorch's dispatcher asks us about every call of the
    process from the first override on, which costs some 6 us; threads without one get PyTorch's own kernel.

    Not reached: models that do not call the function, among them `nn.MultiheadAttention` with
    `need_weights=True` (`replace_modules` takes those); calls from C++ within torch.compile, under torch.func
    transforms or in C++'s own threads; programs already lowered to PyTorch's kernels, as AOTInductor's are.

    A call that no kernel of fastattn takes (a device or dtype without one, nested tensors, tensor subclasses
    with a behaviour of their own) goes to PyTorch's own function, with one warning per reason. Wrong
    arguments raise as in `fastattn.scaled_dot_product_attention`. A mode costs about 1 us per torch call of
    any kind while it holds.

    Args:
        backend: force one of fastattn.dispatch.BACKENDS; what it does not take then raises. None chooses.
    Raises:
        ValueError, TypeError: `backend` names no backend.
    """

    def __init__(self, backend: str | None = None) -> None:
        dispatch.forced_backend(backend)
        self.backend = backend
        # The thread's stack of modes is the only state. Two modes tell the call's effect from a block's.
        self._by_call, self._by_block = Mode(backend), Mode(backend)
        if not torch.compiler.is_compiling():
            from_cpp.install(_innermost)
        _place(self._by_call)

    def __repr__(self) -> str:
        return f"override_sdpa(backend={self.backend!r})"

    def __enter__(self) -> override_sdpa:
        _remove(self._by_call)
        _push_mode(self._by_block)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove(self._by_block)

    def __call__(self, function: _Function) -> _Function:
        """`function`, with the override while it runs."""
        self.undo()
        backend = self.backend

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with override_sdpa(backend):  # torch.compile enters objects only that it saw made
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]

    def undo(self) -> None:
        """End this object's effects in this thread, blocks still open included; nothing where it has none."""
        while _remove(self._by_block) or _remove(self._by_call):
            pass


class Mode(TorchFunctionMode):
    """One override in a thread's stack of modes."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend
        self.sdpa, self.mha = stand_ins.FUNCTIONS[backend]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is stand_ins.torch_sdpa:
            return self.sdpa(*args, **(kwargs or {}))
        # PyTorch runs what follows with this mode off: calls inside these few functions would escape.
        if func is stand_ins.torch_mha:
            own = [kind.__name__ for kind in types if stand_ins.has_own_behaviour(kind)]
            if not own or self.backend is not None:
                return self.mha(*args, **(kwargs or {}))
            stand_ins.warn_once(
                f"multi_head_attention_forward has a {own[0]}, which has a behaviour of its own"
            )
        if (
            func is stand_ins.tensor_backward
            or func is stand_ins.autograd_backward
            or func is stand_ins.autograd_grad
        ):
            with self:  # checkpointed models run once more in there
                return stand_ins.BACKWARD[func](*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            if func is stand_ins.unflatten:
                func = torch.unflatten  # the method's super() stops torch.compile under any mode
        elif from_cpp.may_call_sdpa(func):
            with from_cpp.inside(self.sdpa):
                return func(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)


def _innermost() -> Callable[..., Any] | None:
    """The stand-in of this thread's innermost override; None where it has none, or modes are switched off."""
    if not torch._C._is_torch_function_mode_enabled():
        return None
    for index in reversed(range(_len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(index)
        if isinstance(mode, Mode):
            return mode.sdpa
    return None


def _place(mode: Mode) -> None:
    """Put a mode that no block ends above our topmost one, or else at the bottom.

    Leaving the block of any other mode pops whatever is on top, so on top it must not be. The very bottom
    belongs to torch.set_default_device.
    """
    stack = _get_current_function_mode_stack()
    at = 0
    for index, other in enumerate(stack):
        if isinstance(other, Mode | DeviceContext):
            at = index + 1
    above = [_pop_mode() for _ in range(len(stack) - at)]
    _push_mode(mode)
    for other in reversed(above):
        _push_mode(other)


def _remove(mode: Mode) -> bool:
    """Take the topmost entry of a mode out of this thread's stack; whether there was one."""
    stack = _get_current_function_mode_stack()
    if all(other is not mode for other in stack):
        return False
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
    return True
