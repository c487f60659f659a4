"""Triton's interpreter, which stands in for a GPU where there is none."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch


def interpret_without_gpu() -> None:
    """Must be called before anything imports triton."""
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
