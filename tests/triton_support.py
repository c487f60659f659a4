"""Triton's interpreter, which stands in for a GPU where there is none."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy
import pytest
import torch

INSTALLED = importlib.util.find_spec("triton") is not None
OPERATIONS = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")


def interpret_without_gpu() -> None:
    """Must be called before anything else imports triton."""
    if INSTALLED and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        _quicken()


def _quicken() -> None:
    """The interpreter's time goes into bookkeeping, not into arrays.

    So triton.language is prepared once for each module with kernels and not at each call, types are looked up
    where they were made before, and sums and products of integers are checked for overflow by NumPy in one
    step and not by a dozen of the interpreter's.
    """
    from triton.runtime import interpreter

    language, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    prepared = set()
    make_block_type, make_tensor = language.block_type.__init__, language.tensor.__init__
    make_numpy_type = interpreter._get_np_dtype
    numpy_types: dict[str, Any] = {}
    block_types: dict[Any, dict] = {}
    shapes: dict[Any, tuple] = {}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    def numpy_type(type: Any) -> Any:
        key = str(type.scalar)
        if key not in numpy_types:
            numpy_types[key] = make_numpy_type(type)
        return numpy_types[key]

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = str(element_ty), tuple(shape)
        if key not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[key] = vars(self).copy()
        vars(self).update(block_types[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def check_overflow(lhs: Any, rhs: Any, operation: Any) -> None:
        if lhs.type.scalar.int_bitwidth >= 64:
            return
        numbers = (side.handle.data.astype(numpy.int64) for side in (lhs, rhs))
        found = OPERATIONS[operation.__name__](*numbers)
        limits = numpy.iinfo(lhs.handle.data.dtype)
        assert limits.min <= found.min() and found.max() <= limits.max, f"{operation.__name__} overflows"

    interpreter.InterpretedFunction.__call__ = call
    language.block_type.__init__, language.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = numpy_type
    semantic.binary_op_sanitize_overflow_impl = check_overflow
