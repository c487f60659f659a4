"""Compiling the kernels ahead of time, for architectures that need not be here: what comes out, as numbers.

python -m fastattn.backends.triton.compile --arch 90 --head-dim 128
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fastattn.backends import triton as backend
from fastattn.backends.triton import descriptors, host, summary
from fastattn.backends.triton.compile_calls import FORWARD_ONLY, VARIANTS, variant_call
from fastattn.backends.triton.configs import SHARED_MEMORY, TileConfig
from fastattn.backends.triton.cubin import Loop, Usage, usage
from fastattn.backends.triton.launch import Programs, grid_of
from fastattn.call import Call
from fastattn.lowering import Operands, Params, lower
from fastattn.weight_statistics import LOSSES, Wanted

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The instruction that multiplies matrices of 16-bit numbers, the widest first, and where it is the best one.
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
TENSOR_CORES = {100: INSTRUCTIONS[0], 90: INSTRUCTIONS[1]}
for _arch in (80, 86, 89, 120):
    TENSOR_CORES[_arch] = INSTRUCTIONS[2]
TENSOR_MEMORY = 512  # columns of it that a block may have, where there is any
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
        instruction: by which it multiplies matrices on tensor cores, one of INSTRUCTIONS; None where by none.
        bulk_copies: whether it loads tiles by descriptors.
        tensor_memory: columns of sm_100's memory for accumulators.
    """

    kernel: str
    arch: int
    variant: str
    dtype: str
    head_dim: int
    config: TileConfig
    shared: int
    usage: Usage | None
    instruction: str | None
    bulk_copies: bool = False
    tensor_memory: int = 0

    @property
    def tensor_cores(self) -> bool:
        """Whether it multiplies by the architecture's best instruction, which from sm_90 on takes 64 rows."""
        small = min(self.config.block_m, self.config.block_n) < 64
        return self.instruction == TENSOR_CORES[self.arch] or (small and self.instruction is not None)

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
        return text + f"  {self.instruction or ''}" + "  bulk copies" * self.bulk_copies

    def row(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        derived = {"tensor_cores": self.tensor_cores, "loop_spills": self.loop_spills}
        return {**asdict(self), "config": self.config._asdict(), **derived}

    @staticmethod
    def of(row: dict[str, Any]) -> Compiled:
        """From what `row` gave, read back."""
        facts = {each.name: row[each.name] for each in fields(Compiled)}
        used = facts["usage"]
        if used is not None:
            used = Usage(used["registers"], used["stack"], tuple(Loop(**loop) for loop in used["loops"]))
        return Compiled(**{**facts, "config": TileConfig(**facts["config"]), "usage": used})


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
            next((each for each in INSTRUCTIONS if each in made.asm["ptx"]), None),
            BULK_COPY in made.asm["ptx"],
            getattr(made.metadata, "tmem_size", 0),
        )
        for kernel, config, made in found
    ]


def problems(made: Compiled) -> list[str]:
    """What keeps a kernel from running, or from being as fast as it should be; none where all is well."""
    found = []
    if made.shared > SHARED_MEMORY[made.arch]:
        found.append(f"asks for {made.shared} B of shared memory of {SHARED_MEMORY[made.arch]}")
    if made.tensor_memory > TENSOR_MEMORY:
        found.append(f"asks for {made.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}")
    # Scores that are no product, those of the pair_ kernels, have little for tensor cores, sums nothing.
    multiplies = not made.kernel.startswith(("pair_", "attention_combine"))
    if made.dtype != "float32" and not made.tensor_cores and multiplies:
        found.append(f"multiplies without {TENSOR_CORES[made.arch]}")
    wants_copies = made.variant == "descriptors" and made.arch in descriptors.ARCHITECTURES
    if wants_copies and made.kernel == "attention_fwd" and made.dtype != "float32" and not made.bulk_copies:
        found.append(f"loads without {BULK_COPY}")
    return found


Job = tuple[int, str, str, int]  # arch, dtype, variant, head_dim


def attempt(job: Job) -> tuple[list[Compiled], str | None]:
    """compile_variant of a job, or why it failed."""
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
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out has of these kernels, and compile the rest"
    )
    given = parser.parse_args(arguments)
    if given.resume and given.out is None:
        parser.error("--resume goes on with the results in --out, which was not given")
    # A run that is cut short has the first variants everywhere.
    ordered = product(given.dtype, given.variant, given.head_dim, given.arch)
    asked = [(arch, dtype, variant, head_dim) for dtype, variant, head_dim, arch in ordered]
    rows = kept_rows(given.out) if given.resume else []
    kept = {(row.arch, row.dtype, row.variant, row.head_dim) for row in rows}
    jobs = [job for job in asked if job not in kept]
    failed: list[str] = []
    for made, failure in _attempts(jobs, given.jobs):
        rows += made
        failed += [] if failure is None else [failure]
        for each in made:
            print(each.line(), *problems(each), sep="  ", flush=True)
        if failure is not None:
            print(f"FAILED  {failure}", flush=True)
        if given.out is not None:
            write(rows, failed, len(kept.union(asked)), given.out)
    return 1 if failed or any(map(problems, rows)) else 0


def _attempts(jobs: list[Job], processes: int) -> Iterator[tuple[list[Compiled], str | None]]:
    if processes == 1:
        yield from map(attempt, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(attempt, jobs)


def write(rows: list[Compiled], failed: list[str], asked: int, folder: Path) -> None:
    """Write compile.json, every kernel, and compile.md, the table of them."""
    from fastattn.backends.triton.compile_table import table

    folder.mkdir(parents=True, exist_ok=True)
    compiler = _compiler()
    facts = {**compiler, "torch": torch.__version__, "calls": asked, "failed": failed}
    head = json.dumps(facts, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row.row()) for row in rows)
    (folder / "compile.json").write_text(f'{head},\n "kernels": [\n{lines}\n]}}\n')
    (folder / "compile.md").write_text("\n".join(table(rows, failed, asked, compiler["triton"])) + "\n")


def kept_rows(folder: Path) -> list[Compiled]:
    """What an earlier run left in the folder; nothing where kernels or compiler were others."""
    path = folder / "compile.json"
    if not path.exists():
        return []
    facts = json.loads(path.read_text())
    if any(facts.get(name) != value for name, value in _compiler().items()):
        print(f"{path} is of other kernels or another triton: starting anew", flush=True)
        return []
    return [Compiled.of(row) for row in facts["kernels"]]


def _compiler() -> dict[str, str]:
    """What the results depend on: Triton's version, and the text of this package."""
    import triton

    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return {"triton": str(triton.__version__), "sources": hashlib.sha256(text).hexdigest()[:16]}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
