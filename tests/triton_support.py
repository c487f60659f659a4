"""Triton's interpreter, which stands in for a GPU where there is none."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")


def interpret_without_gpu() -> None:
    """Must be called before anything else imports triton."""
    if INSTALLED and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        _quicken()


def _quicken() -> None:
    """Half of the interpreter's time goes into preparing triton.language again for each call of a function
    within a kernel, which finds it prepared: do it once for each module."""
    from triton.runtime import interpreter

    prepared = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
