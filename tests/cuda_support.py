"""The emulated device on which fastattn's CUDA kernels run without a GPU: see tests/native/cuda."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.backends import cuda
from fastattn.testing import Case, make_inputs, oracle, run
from fastattn.testing.checking import refusal
from fastattn.testing.tolerances import check_all

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "emulation"

# tests/native/cuda/emulated_block.h
NO_FAULT, SKIPPED_WAIT, LOST_ARRIVAL, UNFINISHED_PRODUCTS, WRONG_SWIZZLE, WRONG_STRIDE = range(6)


def _tool(name: str) -> str | None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=places)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@cache
def emulated() -> Any:
    """The module of the emulated device, built where it is not up to date; skips where it cannot be."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or ninja is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("the emulated device is built with cmake, ninja and pybind11")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:  # the other processes of the test run want it too
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "build.ninja").exists():
            options = (f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}")
            _run(
                cmake,
                "-S",
                str(ROOT),
                "-B",
                str(BUILD),
                "-G",
                "Ninja",
                *options,
                "-DFASTATTN_CUDA_EMULATION=ON",
            )
        _run(cmake, "--build", str(BUILD), "--target", "_emulated_cuda")
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    spec = importlib.util.spec_from_file_location("_emulated_cuda", BUILD / f"_emulated_cuda{suffix}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def on_emulated_device(
    monkeypatch: pytest.MonkeyPatch, seed: int = 0, blocks: int = 3, fault: int = NO_FAULT, barrier: int = 0
) -> Iterator[Any]:
    """The backend "cuda" runs on CPU tensors, on the emulated device.

    Args:
        seed: of the order in which things happen there.
        blocks: its multiprocessors, so that some blocks compute several tiles.
        fault, barrier: what it does wrong, and to which barrier of shared memory.
    """
    module = emulated()
    with monkeypatch.context() as patched:
        patched.setattr(cuda, "library", lambda: module)
        module.set_device(seed, blocks, fault, barrier)
        yield module


def half(case: Case, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A case that the kernels take, forward: 16-bit numbers and head dims that are multiples of 8."""
    dims = {"head_dim": -(-case.head_dim // 8) * 8, "head_dim_v": -(-case.dim_v // 8) * 8}
    return replace(case.with_dtype(dtype), grads=False, **dims)


def check_emulated(case: Case, monkeypatch: pytest.MonkeyPatch, **device: int) -> None:
    """out and lse of the emulated device are within every backend's bound; skips what the backend refuses."""
    inputs = make_inputs(case)
    with on_emulated_device(monkeypatch, **device):
        if (reason := refusal("cuda", inputs)) is not None:
            pytest.skip(f"cuda: {reason}")
        got = run(fastattn, inputs, grads=False, backend="cuda")
    expected = oracle(inputs, grads=False)
    check_all(got, expected.ref64, expected.native, case.dtype)
