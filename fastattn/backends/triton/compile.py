"""Compiling the kernels ahead of time, for architectures that need not be here: what comes out, as numbers.

python -m fastattn.backends.triton.compile --arch 90 --head-dim 128
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastattn import masks
from fastattn.backends import triton as backend
from fastattn.backends.triton import descriptors, host, summary
from fastattn.backends.triton.configs import SHARED_MEMORY, TileConfig
from fastattn.backends.triton.cubin import Usage, usage
from fastattn.backends.triton.launch import Programs, grid_of
from fastattn.biases import ALiBi
from fastattn.call import Call
from fastattn.lowering import Operands, Params, lower
from fastattn.weight_statistics import LOSSES, Wanted

ARCHITECTURES = (80, 86, 89, 90, 120)
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SEQLEN = 256

# The instruction that multiplies matrices of 16-bit numbers.
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async"}
TENSOR_CORES[120] = TENSOR_CORES[80]
BULK_COPY = "cp.async.bulk.tensor"  # what a load by a descriptor becomes


@dataclass(frozen=True)
class Compiled:
    """A kernel for an architecture.

    Args:
        kernel: its name.
        arch: compute capability, 90 for 9.0.
        variant, dtype, head_dim: the call that it was compiled for.
        config: tile sizes, warps and stages.
        shared: bytes of shared memory.
        usage: registers, stack and loops; None where no tool was found that tells.
        tensor_cores: whether it multiplies on them.
        bulk_copies: whether it loads tiles by descriptors.
    """

    kernel: str
    arch: int
    variant: str
    dtype: str
    head_dim: int
    config: TileConfig
    shared: int
    usage: Usage | None
    tensor_cores: bool
    bulk_copies: bool = False

    @property
    def loop_spills(self) -> tuple[int, ...]:
        """How many instructions read or write a spilled register, in each innermost loop with a product.

        Of the kernels' loops, that which is entered for results that are not finite alone counts too.
        """
        if self.usage is None:
            return ()
        return tuple(loop.spills for loop in self.usage.loops if loop.products)

    def line(self) -> str:
        config = self.config
        tile = f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"
        call = f"{self.variant}, {self.dtype}, D={self.head_dim}"
        text = f"sm_{self.arch:<4}{self.kernel:<26}{call:<32}{tile:<28}{self.shared:>7} B "
        if self.usage is not None:
            text += f"{self.usage.registers:>4} registers, {self.usage.stack:>5} B spilled"
            if any(self.loop_spills):
                text += f", in loops: {' '.join(map(str, self.loop_spills))}"
        return text + "  tensor cores" * self.tensor_cores + "  bulk copies" * self.bulk_copies

    def row(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "config": self.config._asdict(), "loop_spills": self.loop_spills}


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def variant_call(name: str, dtype: torch.dtype, head_dim: int) -> Call:
    """A call that uses an option of the kernels.

    Args:
        name: one of VARIANTS.
    """
    seqlen = {"few": 16, "some": 64, "split": 1}.get(name, SEQLEN)
    keys = 16 * SEQLEN if name == "split" else SEQLEN
    q, k, v = (_tensor(1, 2, n, head_dim, dtype=dtype) for n in (seqlen, keys, keys))
    call = Call("attention", q, k, v, return_lse=True)
    if name in ("causal", "descriptors"):
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
    "descriptors", "split",
)  # fmt: skip

FORWARD_ONLY = ("descriptors", "split")  # whose backward pass is another variant's


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

    def compile_only(
        kernel: Any, programs: Programs, config: TileConfig, *args: Any, **constants: Any
    ) -> None:
        made = kernel.warmup(
            *args,
            **constants,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            grid=grid_of(programs),
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
    asked = patch.object(descriptors, "ASKED", name == "descriptors" or descriptors.ASKED)
    with torch.no_grad(), compiling(arch, found), asked:
        if name.startswith("summary"):
            _summarize(call, operands, params, "mean" if call.sinks is not None else "max")
            return _described(found, arch, name, dtype, head_dim)
        out, lse = backend.forward(call.q, call.k, call.v, operands, params)
        if gradients and name not in FORWARD_ONLY and lse is not None and call.block_table is None:
            needs = (True,) * 7
            backend.backward(call.q, call.k, call.v, out, lse, out, lse, operands, params, needs)
    return _described(found, arch, name, dtype, head_dim)


def _summarize(call: Call, operands: Operands, params: Params, pool_mode: str) -> None:
    """Everything that a summary would launch."""
    results = summary.forward(call.q, call.k, None, operands, params, Wanted(8, (4, 4), pool_mode))
    grads = results[:LOSSES]
    summary.backward(call.q, call.k, results.lse, grads, operands, params, pool_mode, (True,) * 5)


def _described(
    found: list[tuple[str, TileConfig, Any]], arch: int, name: str, dtype: torch.dtype, head_dim: int
) -> list[Compiled]:
    return [
        Compiled(
            kernel,
            arch,
            name,
            _name(dtype),
            head_dim,
            config,
            made.metadata.shared,
            usage(made.asm["cubin"]),
            on_tensor_cores(made.asm["ptx"], arch, config),
            BULK_COPY in made.asm["ptx"],
        )
        for kernel, config, made in found
    ]


def on_tensor_cores(ptx: str, arch: int, config: TileConfig) -> bool:
    """Whether it multiplies by the architecture's best instruction, which from sm_90 on takes 64 rows."""
    small = min(config.block_m, config.block_n) < 64
    return TENSOR_CORES[arch] in ptx or (small and TENSOR_CORES[80] in ptx)


def fits(made: Compiled) -> bool:
    """Whether a block of it may have the shared memory it asks for."""
    return made.shared <= SHARED_MEMORY[made.arch]


def problems(made: Compiled) -> list[str]:
    """What keeps a kernel from running, or from being as fast as it should be; none where all is well."""
    found = []
    if not fits(made):
        found.append(f"asks for {made.shared} B of shared memory of {SHARED_MEMORY[made.arch]}")
    # Scores that are no product, those of the pair_ kernels, have little for tensor cores, sums nothing.
    multiplies = not made.kernel.startswith(("pair_", "attention_combine"))
    if made.dtype != "float32" and not made.tensor_cores and multiplies:
        found.append(f"multiplies without {TENSOR_CORES[made.arch]}")
    wants_copies = made.variant == "descriptors" and made.arch in descriptors.ARCHITECTURES
    if wants_copies and made.kernel == "attention_fwd" and made.dtype != "float32" and not made.bulk_copies:
        found.append(f"loads without {BULK_COPY}")
    return found


def attempt(job: tuple[int, str, str, int]) -> tuple[list[Compiled], str | None]:
    """compile_variant of (arch, dtype, variant, head_dim), or why it failed."""
    arch, dtype, name, head_dim = job
    try:
        return compile_variant(arch, name, getattr(torch, dtype), head_dim), None
    except Exception as error:  # the compiler's, of many kinds; one must not end a long table
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [], f"sm_{arch} {name}, {dtype}, D={head_dim}: {reason}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.backends.triton.compile", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], choices=list(map(_name, DTYPES))
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--out", type=Path, help="write compile.json and compile.md into this folder, as they grow"
    )
    given = parser.parse_args(arguments)
    # A run that is cut short has the first variants everywhere.
    ordered = product(given.variant, given.dtype, given.head_dim, given.arch)
    jobs = [(arch, dtype, variant, head_dim) for variant, dtype, head_dim, arch in ordered]
    rows: list[Compiled] = []
    failed: list[str] = []
    for made, failure in _attempts(jobs, given.jobs):
        rows += made
        failed += [] if failure is None else [failure]
        for each in made:
            print(each.line(), *problems(each), sep="  ", flush=True)
        if failure is not None:
            print(f"FAILED  {failure}", flush=True)
        if given.out is not None:
            write(rows, failed, len(jobs), given.out)
    return 1 if failed or any(map(problems, rows)) else 0


def _attempts(
    jobs: list[tuple[int, str, str, int]], processes: int
) -> Iterator[tuple[list[Compiled], str | None]]:
    if processes == 1:
        yield from map(attempt, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(attempt, jobs)


def write(rows: list[Compiled], failed: list[str], asked: int, folder: Path) -> None:
    """Write compile.json, every kernel, and compile.md, the table of them."""
    from fastattn.backends.triton.compile_table import table

    folder.mkdir(parents=True, exist_ok=True)
    version = _version()
    facts = {"triton": version, "torch": torch.__version__, "calls": asked, "failed": failed}
    plain = {**facts, "kernels": [row.row() for row in rows]}
    (folder / "compile.json").write_text(json.dumps(plain, indent=1) + "\n")
    (folder / "compile.md").write_text("\n".join(table(rows, failed, version)) + "\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
