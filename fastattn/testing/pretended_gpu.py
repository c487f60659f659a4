"""A CUDA device that is not there, for all that Python and Triton's launcher do before a kernel runs.

CPU tensors say that they are on a GPU; Triton compiles for it and calls its own C launcher, which calls a
CUDA driver that says yes to everything and runs nothing. Results are never filled.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ARCH = 90

# What the launcher reads from the driver's answers; every other function returns success.
_ANSWERS = """
static long launched;
long launches(void) { return launched; }
int cuLaunchKernelEx(void) { ++launched; return 0; }
int cuPointerGetAttribute(unsigned long long *out, int which, unsigned long long p) { *out = p; return 0; }
int cuCtxGetCurrent(void **out) { *out = (void *)1; return 0; }
int cuModuleLoadData(void **out) { *out = (void *)1; return 0; }
int cuModuleGetFunction(void **out) { *out = (void *)1; return 0; }
int cuDeviceGetAttribute(int *out) { *out = 232448; return 0; }
int cuFuncGetAttribute(int *out) { *out = 1024; return 0; }
"""


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Callable[[], int]]:
    """Within, CPU tensors count as CUDA tensors of a Hopper GPU for the triton backend; yields what tells how
    many kernels were launched so far.

    Raises:
        RuntimeError: triton or a C compiler is missing, triton runs interpreted, or there is a GPU.
    """
    from fastattn.backends import cpu, triton

    if torch.cuda.is_available() or triton.is_interpreted():
        raise RuntimeError("a GPU is pretended where there is none, and TRITON_INTERPRET must not be set")
    from fastattn.backends.triton import host

    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder):
        library = _driver_library(Path(folder))
        from triton.runtime import driver

        with (
            patch.object(driver, "_active", _driver()),
            patch.object(host, "architecture", lambda device: ARCH),
            patch.object(triton, "architecture", lambda device: ARCH),
            patch.object(cpu, "are_plain", lambda q, k, v: False),
            patch.object(torch.Tensor, "is_cuda", True, create=True),
            patch.object(torch.Tensor, "is_cpu", False, create=True),
            patch.dict(os.environ, FASTATTN_BACKEND="triton"),  # their device still says cpu
        ):
            yield library.launches


def _driver_library(folder: Path) -> Any:
    """A libcuda.so.1 in a folder, loaded so that others find it by its name."""
    import triton

    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("a GPU is pretended by means of a C compiler, of which there is none")
    launcher = Path(triton.__file__).parent / "backends" / "nvidia" / "driver.c"
    called = set(re.findall(r"\b(cu[A-Z]\w+)\(", launcher.read_text()))
    others = sorted(name for name in called if f" {name}(" not in _ANSWERS and not name.endswith("Handle"))
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(_ANSWERS + "".join(f"int {name}(void) {{ return 0; }}\n" for name in others))
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _driver() -> Any:
    """Triton's driver for NVIDIA GPUs, of a torch that has none."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", ARCH, 32)

    return Driver()
