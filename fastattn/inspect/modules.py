"""Which module of a model is running, and where in the sequence its queries stand."""

from __future__ import annotations

import difflib
import fnmatch
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastattn.call import Call
from fastattn.inspect.positions import Frame, Growth, Position, entered

NOT_SEEN = (  # why a block met no call
    "fastattn.integrations.torch.replace_modules and override_sdpa bring PyTorch's there; calls of threads "
    "other than the block's own, DataParallel's among them, are not seen"
)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.growth = Growth()


class RunningModules:
    """Follows the modules of a model by hooks while `followed`, for each thread by itself.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        # What torch.compile wraps keeps its name.
        self.names = {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}
        # A module that stands in several places has its calls under the first of their names.
        self._aliases: dict[str, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._aliases.setdefault(self.names[module], []).append(name.replace("_orig_mod.", ""))
        self._stack = _Stack()

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Hooks are there within, and gone afterwards."""
        handles = []
        for module in self.names:
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks: its calls are its owner's
                continue
            # First of its hooks: one that raises after it finds the place to leave.
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def all_names(self) -> list[str]:
        """Every name of every module."""
        return [name for names in self._aliases.values() for name in names]

    def is_match(self, path: str, pattern: str) -> bool:
        """Whether a pattern names the module at a path, by any of its names."""
        return any(is_match(name, pattern) for name in self._aliases[path])

    def path(self) -> str | None:
        """Of the innermost module that runs in the calling thread; None outside the model, which is ""."""
        return self._stack.frames[-1].path if self._stack.frames else None

    def position(self, call: Call) -> Position:
        """Where the queries and keys of a call stand that is made now; to be asked once for each call."""
        frames = self._stack.frames
        return self._stack.growth.position(frames[-1], call) if frames else Position(0)

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        frames = self._stack.frames
        frames.append(entered(module, self.names[module], kwargs, frames[-1] if frames else None))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.frames.pop()


def is_match(path: str, pattern: str) -> bool:
    """Whether a pattern names a module: its path, that of a module around it, or a glob such as
    "*.self_attn"."""
    return (
        path == pattern or path.startswith(f"{pattern}.") or pattern == "" or fnmatch.fnmatch(path, pattern)
    )


def check_patterns(argument: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Raise where a pattern matches none of the paths.

    Raises:
        TypeError: a pattern that is no string.
        ValueError: it names no module; the message has the names most like it.
    """
    paths = list(paths)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must name modules by strings, got {pattern!r}")
        if not any(is_match(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, paths, 3, 0.3)
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
            raise ValueError(f"{argument} must name modules of the model, got {pattern!r}{hint}")
