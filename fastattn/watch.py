"""Who watches attention calls: `fastattn.inspect` changes masks and takes notes by way of this.

Every route to a kernel comes by here while someone watches, which holds in the thread (or asyncio task) that
asked for it. Nobody watching costs a call one look at a context variable.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.call import Call


class Observer(Protocol):
    """What watches. Calls are validated, and casts of autocast made; they are not to be changed in place."""

    def change(self, call: Call) -> Call:
        """The call that shall run instead; the call itself where it stays."""
        ...

    def note(self, call: Call, lse: Tensor | None) -> None:
        """Told after a call ran, with its lse where the kernels gave one."""
        ...


_WITHIN = (
    "record and knockout must be entered outside of what torch.compile compiles, whose graphs know no "
    "observers: put the block around the call of the compiled function, which then runs uncompiled"
)

_watching: ContextVar[tuple[Observer, ...]] = ContextVar("fastattn_watching", default=())
observers = _watching.get


def is_watched() -> bool:
    """Whether calls of this thread have observers; traces have none."""
    return not torch.compiler.is_compiling() and bool(observers())


@contextmanager
def watching(observer: Observer) -> Iterator[None]:
    """Calls within go by this observer, after those further out. Compiled functions run uncompiled.

    Raises:
        RuntimeError: within a function that is being compiled.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(_WITHIN)
    with _uncompiled():
        _watching.set((*observers(), observer))
        try:
            yield
        finally:
            # Blocks may end in any order.
            _watching.set(tuple(other for other in observers() if other is not observer))


@contextmanager
def unwatched() -> Iterator[None]:
    """Calls within have no observers."""
    token = _watching.set(())
    try:
        yield
    finally:
        _watching.reset(token)


def changed(call: Call) -> Call:
    """The call as this thread's observers want it."""
    if is_watched():
        watching = observers()
        with unwatched():
            for observer in watching:
                call = observer.change(call)
    return call


def run(call: Call, execute: Callable[[Call], Any]) -> Any:
    """`execute` of what the observers make of the call; they are told of it.

    Args:
        call: validated.
        execute: gives out, or (out, lse) where the call asks for it; may change the call given to it.
    """
    call = changed(call)
    with unwatched():
        # Asked of kernels lse costs nothing; of PyTorch's call, which has none, it would change the backend.
        has_lse = call.return_lse or hasattr(dispatch.choose(call), "forward")
        result = execute(replace(call, return_lse=has_lse))
    out, lse = result if has_lse else (result, None)
    tell(call, lse)
    return (out, lse) if call.return_lse else out


def tell(call: Call, lse: Tensor | None = None) -> None:
    """This thread's observers are told of a call that ran."""
    watching = observers()
    with unwatched():
        for observer in watching:
            observer.note(call, lse)


_lock = threading.Lock()
_count = 0  # blocks that keep the compiler off
_stance: Any = None


@contextmanager
def _uncompiled() -> Iterator[None]:
    """torch.compile's functions run as they are written: their graphs, made before, ask no observer.

    The compiler's stance belongs to the whole process, so the first block sets it and the last one gives it
    back. Nothing is compiled where the compiler was never imported.
    """
    global _count, _stance  # noqa: PLW0603
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _lock:
        if _count == 0:
            try:
                _stance = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:
                raise RuntimeError(_WITHIN) from error
        _count += 1
    try:
        yield
    finally:
        with _lock:
            _count -= 1
            if _count == 0:
                _stance.__exit__(None, None, None)
                _stance = None
