"""Compiling the kernels ahead of time, for architectures that need not be here: what comes out, as numbers.

python -m fastattn.backends.triton.compile --arch 90 --head-dim 128
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastattn import masks
from fastattn.backends import triton as backend
from fastattn.backends.triton import host, summary
from fastattn.backends.triton.configs import SHARED_MEMORY, TileConfig
from fastattn.biases import ALiBi
from fastattn.call import Call
from fastattn.lowering import Operands, Params, lower
from fastattn.weight_statistics import DIFFERENTIABLE, Wanted

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SEQLEN = 256

# The instruction that multiplies matrices of 16-bit numbers.
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
TENSOR_CORES[120] = TENSOR_CORES[80]


@dataclass(frozen=True)
class Compiled:
    """A kernel for an architecture.

    Args:
        kernel: its name.
        arch: compute capability, 90 for 9.0.
        variant: the call that it was compiled for.
        config: tile sizes, warps and stages.
        shared: bytes of shared memory.
        registers, spills: of a thread; bytes spilled; None where no tool was found that tells.
        tensor_cores: whether it multiplies on them.
    """

    kernel: str
    arch: int
    variant: str
    config: TileConfig
    shared: int
    registers: int | None
    spills: int | None
    tensor_cores: bool

    def line(self) -> str:
        config = self.config
        tile = f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"
        usage = "" if self.registers is None else f"{self.registers:>4} registers, {self.spills:>5} B spilled"
        text = f"sm_{self.arch:<4}{self.kernel:<26}{self.variant:<32}{tile:<28}{self.shared:>7} B {usage}"
        return text + ("  tensor cores" if self.tensor_cores else "")


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def variant_call(name: str, dtype: torch.dtype, head_dim: int) -> Call:
    """A call that uses an option of the kernels.

    Args:
        name: one of VARIANTS.
    """
    seqlen = {"few": 16, "some": 64}.get(name, SEQLEN)
    q, k, v = (_tensor(1, 2, n, head_dim, dtype=dtype) for n in (seqlen, SEQLEN, SEQLEN))
    call = Call("attention", q, k, v, return_lse=True)
    if name == "causal":
        call.mask = masks.causal()
    elif name == "mask":
        call.mask = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool)
    elif name == "blocks":
        call.mask = masks.causal() | masks.prefix(torch.tensor([40]))
    elif name == "padding":
        call.mask = masks.padding(torch.tensor([200]))
    elif name == "bias":
        call.bias = _tensor(2, SEQLEN, SEQLEN, dtype=dtype).requires_grad_()
    elif name == "alibi":
        call.bias, call.mask = ALiBi(torch.ones(2, requires_grad=True)), masks.causal()
    elif name == "softcap, sinks":
        call.softcap, call.sinks = 30.0, torch.zeros(2, requires_grad=True)
    elif name == "dropout":
        call.dropout_p, call.dropout_seed = 0.1, torch.zeros(1, dtype=torch.int64)
    elif name == "varlen":
        call.op, call.mask = "varlen", masks.causal()
        call.q, call.k, call.v = (x[0].transpose(0, 1) for x in (q, k, v))
        call.cu_seqlens_q = call.cu_seqlens_k = torch.tensor([0, 100, SEQLEN], dtype=torch.int32)
        call.max_seqlen_q = call.max_seqlen_k = SEQLEN
    elif name == "paged":
        call.op, call.lengths = "decode", torch.tensor([200])
        call.k, call.v = (x.view(2, 2, SEQLEN // 2, head_dim) for x in (k, v))
        call.block_table = torch.tensor([[0, 1]], dtype=torch.int32)
    elif name == "additive":
        call.score, call.scale, call.score_weights = name, 1.0, torch.zeros(head_dim, requires_grad=True)
    elif name == "triangular":
        call.score, call.scale, call.mask = name, 1.0, masks.causal() | masks.prefix(torch.tensor([40]))
        call.dropout_p, call.dropout_seed = 0.1, torch.zeros(1, dtype=torch.int64)
    elif name == "summary":
        call.mask, call.sinks = masks.causal(), torch.zeros(2)
    elif name == "summary, blocks":
        call.mask = masks.causal() | masks.prefix(torch.tensor([40]))
    elif name not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    return call


VARIANTS = (
    "plain", "causal", "few", "some", "mask", "blocks", "padding", "bias", "alibi", "softcap, sinks",
    "dropout", "varlen", "paged", "additive", "triangular", "summary", "summary, blocks",
)  # fmt: skip


class _Target:
    """A driver of a device that is not there: it only says what to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compiling(arch: int, found: list[tuple[str, TileConfig, Any]]) -> Iterator[None]:
    """Launches compile for an architecture instead, and leave what they made in `found`."""
    from triton.runtime import driver

    def compile_only(kernel: Any, programs: int, config: TileConfig, *args: Any, **constants: Any) -> None:
        made = kernel.warmup(
            *args,
            **constants,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            grid=(programs,),
        )
        found.append((kernel.__name__, config, made))

    with (
        patch.object(driver, "_active", _Target(arch)),
        patch.object(host, "launch", compile_only),
        patch.object(host, "architecture", lambda device: arch),
    ):
        yield


def compile_variant(
    arch: int, name: str, dtype: torch.dtype, head_dim: int, gradients: bool = True
) -> list[Compiled]:
    """Everything that one call would launch, forward and backward.

    Raises:
        RuntimeError: triton runs interpreted, so that there is nothing to compile.
    """
    if backend.is_interpreted():
        raise RuntimeError("TRITON_INTERPRET must not be set where kernels are to be compiled")
    call = variant_call(name, dtype, head_dim)
    operands, params = lower(call)
    found: list[tuple[str, TileConfig, Any]] = []
    with torch.no_grad(), compiling(arch, found):
        if name.startswith("summary"):
            _summarize(call, operands, params, "mean" if call.sinks is not None else "max")
            return _described(found, arch, name, dtype, head_dim)
        out, lse = backend.forward(call.q, call.k, call.v, operands, params)
        if gradients and lse is not None and call.block_table is None:
            needs = (True,) * 7
            backend.backward(call.q, call.k, call.v, out, lse, out, lse, operands, params, needs)
    return _described(found, arch, name, dtype, head_dim)


def _summarize(call: Call, operands: Operands, params: Params, pool_mode: str) -> None:
    """Everything that a summary would launch."""
    results = summary.forward(call.q, call.k, None, operands, params, Wanted(8, (4, 4), pool_mode))
    grads = results[:DIFFERENTIABLE]
    summary.backward(call.q, call.k, results.lse, grads, operands, params, pool_mode, (True,) * 5)


def _described(
    found: list[tuple[str, TileConfig, Any]], arch: int, name: str, dtype: torch.dtype, head_dim: int
) -> list[Compiled]:
    label = f"{name}, {str(dtype).removeprefix('torch.')}, D={head_dim}"
    return [_describe(kernel, arch, label, config, made) for kernel, config, made in found]


def _describe(kernel: str, arch: int, label: str, config: TileConfig, made: Any) -> Compiled:
    registers, spills = _usage(made.asm["cubin"])
    cores = TENSOR_CORES[arch] in made.asm["ptx"]
    return Compiled(kernel, arch, label, config, made.metadata.shared, registers, spills, cores)


def _usage(cubin: bytes) -> tuple[int | None, int | None]:
    """(registers of a thread, bytes it spills) as cuobjdump, which comes with triton, tells."""
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False)
    text = told.stdout + told.stderr
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        return None, None
    return int(registers[1]), int(stack[1])


def fits(made: Compiled) -> bool:
    """Whether a block of it may have the shared memory it asks for."""
    return made.shared <= SHARED_MEMORY[made.arch]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.backends.triton.compile", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="also write the rows there")
    given = parser.parse_args(arguments)
    rows = []
    for arch in given.arch:
        for dtype in given.dtype:
            for head_dim in given.head_dim:
                for variant in given.variant:
                    for made in compile_variant(arch, variant, getattr(torch, dtype), head_dim):
                        print(made.line(), "" if fits(made) else "  TOO LARGE", flush=True)
                        rows.append(made)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if all(map(fits, rows)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
