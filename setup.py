"""Builds the native core with CMake and ninja; everything else is declared in pyproject.toml.

Environment variables:
    FASTATTN_NATIVE=0   install the pure-Python part alone, which computes with PyTorch's own kernels
    FASTATTN_CUDA=1|0   build the CUDA kernels, or not; where unset, a machine with nvcc and a GPU builds
                        them, and where that fails the rest is installed all the same
    MAX_JOBS=n          compile at most n files at once (default: by cores and memory)
    CMAKE_ARGS="..."    further arguments for cmake
    CXX=...             the C++ compiler
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PURE_PYTHON = (
    "or set FASTATTN_NATIVE=0 to install the pure-Python part, which uses PyTorch's own attention kernels."
)
GB_PER_JOB = 1.0  # the largest translation unit takes 0.4


def find_compiler() -> str:
    """The C++ compiler that CMake will take, or an error that says what to install."""
    wanted = os.environ.get("CXX")
    for name in [shlex.split(wanted)[0]] if wanted else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    missing = (
        f"no C++ compiler found: CXX={wanted} is not an executable" if wanted else "no C++ compiler found"
    )
    raise CompileError(
        f"{missing}. fastattn's native core needs GCC 9 or newer, or Clang 10 or newer.\n"
        "  Debian, Ubuntu: apt install g++        Fedora: dnf install gcc-c++\n"
        "  macOS: xcode-select --install          conda: conda install -c conda-forge cxx-compiler\n"
        "  Windows: build inside WSL\n"
        f"Install one, {PURE_PYTHON}"
    )


def job_count() -> int:
    """Compiler processes to run at once: one a core, fewer where memory is short."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        memory_gb = float("inf")
    return int(max(1, min(cores, memory_gb // GB_PER_JOB, 16)))


def tool(name: str) -> str:
    """The path of cmake or ninja: the first on PATH, else the one beside this Python."""
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    if found := shutil.which(name, path=places):
        return found
    raise CompileError(f"{name} not found: run `pip install {name}`, {PURE_PYTHON}")


def wants_cuda() -> bool:
    """Whether to build `fastattn._cuda`."""
    wanted = os.environ.get("FASTATTN_CUDA", "")
    if wanted not in {"", "0", "1"}:
        raise SystemExit(f"FASTATTN_CUDA must be 0 or 1, got {wanted!r}")
    return wanted == "1" or (wanted == "" and bool(shutil.which("nvcc")) and Path("/dev/nvidia0").exists())


class CMakeBuild(build_ext):
    """Runs CMakeLists.txt once for each extension, into the place where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise CompileError(f"Windows has no native core yet: build inside WSL, {PURE_PYTHON}")
        find_compiler()
        output = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        target = ext.name.rpartition(".")[2]
        build_dir = Path(self.build_temp).resolve() / f"cmake{target}"
        # CMake remembers paths of a build environment that pip has deleted since: always start afresh.
        shutil.rmtree(build_dir, ignore_errors=True)
        build_dir.mkdir(parents=True)
        configure = [
            tool("cmake"),
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTATTN_OUTPUT_DIR={output.parent}",
            f"-DFASTATTN_CUDA={'ON' if target == '_cuda' else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        try:
            subprocess.run(configure, check=True)
            command = [tool("cmake"), "--build", str(build_dir), "--target", target, "-j", str(job_count())]
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            if target == "_cuda":
                raise CompileError("the CUDA kernels could not be built; the lines above say why") from None
            raise CompileError(
                f"{Path(error.cmd[0]).name} could not build the native core; the lines above say why. "
                f"It needs GCC 9 or newer, or Clang 10 or newer: install one, {PURE_PYTHON}"
            ) from None
        if not output.exists():
            raise CompileError(f"CMake finished but left no {output}")


native = os.environ.get("FASTATTN_NATIVE", "1")
if native not in {"0", "1"}:
    raise SystemExit(f"FASTATTN_NATIVE must be 0 or 1, got {native!r}")

extensions = [Extension("fastattn._C", sources=[])]
if wants_cuda():
    extensions.append(
        Extension("fastattn._cuda", sources=[], optional=os.environ.get("FASTATTN_CUDA") != "1")
    )

setup(
    ext_modules=extensions if native == "1" else [],
    cmdclass={"build_ext": CMakeBuild},
)
