"""The CUDA kernels compiled for sm_90a: registers, by the compiler, and instructions, by the disassembler."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cuda_support import ROOT, emulated

CUDA_LOOP = runpy.run_path(str(ROOT / "scripts" / "cuda_loop.py"))
HEAD_DIMS = (64, 96, 128, 192, 256)
FULL = (128,)  # those that have a kernel for calls whose rows see every key
LOOPS = [(head_dim, "range") for head_dim in HEAD_DIMS] + [(head_dim, "full") for head_dim in FULL]
ELEMENTS = ("BFloat16", "Float16")
VARIANTS = ("range", "general", "full")
OLDEST = (12, 5)


@cache
def nvcc() -> str:
    """The compiler; skips where there is none that will do, unless FASTATTN_CUDA=1."""
    found, reason = shutil.which("nvcc"), "nvcc is not on PATH"
    if found is not None:
        told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", told)
        assert release is not None, told
        version = tuple(map(int, release.groups()))
        if version >= OLDEST:
            return found
        reason = (
            f"nvcc must be of CUDA {'.'.join(map(str, OLDEST))} or newer, got {'.'.join(map(str, version))}"
        )
    if os.environ.get("FASTATTN_CUDA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel.

    Args:
        stack: bytes of local memory, of which `spilled` are stores of registers.
        listing: its machine code.
        messages: further remarks that name it.
    """

    registers: int
    stack: int
    spilled: int
    listing: str
    messages: tuple[str, ...]


@cache
def compiled(element: str, head_dim: int, folder: Path) -> dict[str, Kernel]:
    """The kernels of one translation unit, by variant."""
    output = folder / f"{element}_{head_dim}.cubin"
    if shutil.which("cuobjdump") is None:
        pytest.importorskip("triton")
    command = [*CUDA_LOOP["compile_command"](nvcc(), element, head_dim, output), "-Xptxas", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout + done.stderr
    parts = CUDA_LOOP["disassembled"](output).split("Function : ")[1:]
    listings = {_variant(part): part for part in parts}
    kernels = {}
    for entry in told.split("Compiling entry function ")[1:]:
        variant = _variant(entry)
        stack, stores = re.findall(r"(\d+) bytes (?:stack frame|spill stores)", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert registers is not None, entry
        messages = tuple(line for line in told.splitlines() if "(C7" in line and _variant(line) == variant)
        kernels[variant] = Kernel(int(registers[1]), int(stack), int(stores), listings[variant], messages)
    return kernels


def _variant(text: str) -> str:
    """Of a kernel's mangled name."""
    found = re.search(r"VariantE(\d)", text)
    assert found is not None, text[:200]
    return VARIANTS[int(found[1])]


def config_of(head_dim: int, variant: str) -> dict[str, Any]:
    """An entry of csrc/cuda/configs.h."""
    (found,) = (c for c in emulated().configs() if (c["head_dim"], c["variant"]) == (head_dim, variant))
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_what_the_compiler_makes(element: str, head_dim: int, folder: Path):
    kernels = compiled(element, head_dim, folder)
    configs = {config["variant"]: config for config in emulated().configs() if config["head_dim"] == head_dim}
    assert set(kernels) == set(configs)
    for variant, kernel in kernels.items():
        threads = configs[variant]["threads"]
        assert kernel.registers <= 65536 // threads // 8 * 8, variant
        # setmaxnreg hands out what the block started with: who asks for more waits for ever.
        copying, multiplying = configs[variant]["registers"]
        assert 128 * copying + (threads - 128) * multiplying <= threads * kernel.registers, variant
        # The widest sums leave too few registers for every option's pointers.
        assert kernel.spilled == 0 or (variant, head_dim) == ("general", 256), (variant, kernel.spilled)
        assert kernel.spilled <= 160, variant
        for instruction in ("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS", "MUFU.EX2"):
            assert instruction in kernel.listing, (variant, instruction)
        assert kernel.listing.count("HGMMA") >= head_dim // 16 + configs[variant]["keys"] // 16
        # ptxas says so where it lets products run one by one, or puts fences between them by itself.
        said = [message for message in kernel.messages if re.search("serialized|injected", message)]
        assert not said, said
        if variant != "general":
            assert kernel.stack == 0
            assert "LDL" not in kernel.listing and "STL" not in kernel.listing


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "variant"), LOOPS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_the_softmax_runs_beside_the_product(element: str, head_dim: int, variant: str, folder: Path):
    """The loop over tiles of keys: products, the wait for the scores, their softmax, only then the wait for
    the product with v."""
    listing = compiled(element, head_dim, folder)[variant].listing
    config = config_of(head_dim, variant)
    words = re.findall(r"HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d", listing)
    (start,) = (at for at, word in enumerate(words) if word.endswith("0x1"))
    end = next(at for at in range(start, len(words)) if words[at].endswith("0x0"))
    assert words[start + 1 : end].count("MUFU.EX2") >= config["keys"] // 2
    products = head_dim // 16 + config["keys"] // 16
    assert words[start - products : start] == ["HGMMA"] * products


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "variant"), LOOPS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_what_the_loop_holds(element: str, head_dim: int, variant: str, folder: Path):
    """Products and softmax take what their formula does, the rest no more than stated."""
    loop = CUDA_LOOP["loop_of"](compiled(element, head_dim, folder)[variant].listing)
    config = config_of(head_dim, variant)
    needed = CUDA_LOOP["needed"](head_dim, config["keys"])
    assert {kind: loop.always[kind] for kind in needed} == needed
    assert loop.always.total() - sum(needed.values()) <= 150
    for kind, most in (("R2UR, SHFL.IDX", 12), ("moves", 12), ("local memory", 0)):
        assert loop.always[kind] <= most, (kind, loop.always[kind])
    assert loop.masked.total() <= 4 * config["keys"]  # a quarter of a row's columns, in two rows
    assert loop.shrinking.total() == head_dim // 2


@pytest.mark.slow
def test_the_extension_builds_and_loads(tmp_path: Path):
    """From nothing, in parallel; on a machine without a GPU it says why it runs nothing."""
    nvcc()
    build = tmp_path / "build"
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DFASTATTN_OUTPUT_DIR={tmp_path}",
        "-DFASTATTN_CUDA=ON",
    ]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options],
        ["cmake", "--build", str(build), "--target", "_cuda"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (library,) = tmp_path.glob("_cuda*.so")
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_cuda', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.device_type(), '|', module.problem())\n"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    device, _, problem = done.stdout.strip().partition(" | ")
    assert device == "cuda" and problem, done.stdout


def test_the_table_of_kernels_is_whole():
    listed = [(config["head_dim"], config["variant"]) for config in emulated().configs()]
    for head_dim in HEAD_DIMS:
        assert {(head_dim, "range"), (head_dim, "general")} <= set(listed)
    assert len(listed) == len(set(listed)) == 2 * len(HEAD_DIMS) + len(FULL)
    assert {head_dim for head_dim, variant in listed if variant == "full"} == set(FULL)
