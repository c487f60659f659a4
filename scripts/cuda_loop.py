"""What the main loop of the CUDA kernels holds, as the compiler made it: a table for docs/kernels/cuda.md.

    python scripts/cuda_loop.py [head_dim ...]

compiles the bfloat16 kernels of these head dims for sm_90a (default: 64 and 128) and counts the instructions
of a thread for each tile of keys. It needs nvcc, and cuobjdump or triton, which brings one; no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "HGMMA": r"HGMMA",
    "MUFU.EX2": r"MUFU\.EX2",
    "FMNMX": r"FMNMX",
    "FFMA, FADD, FMUL": r"FFMA|FADD|FMUL",
    "F2FP": r"F2FP",
    "SHFL.BFLY": r"SHFL\.BFLY",
    "barriers, waits": r"SYNCS|BAR|WARPGROUP|WARPSYNC|DEPBAR",
    "R2UR, SHFL.IDX": r"R2UR|SHFL\.IDX",
    "uniform registers": r"U[A-Z]|S2UR|CS2UR",
    "moves": r"MOV|IMAD\.MOV|IMAD\.U32|SEL",
    "local memory": r"LDL|STL",
}
OTHER = "the rest"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Loop:
    """Instructions of the loop over tiles of keys, by kind.

    Args:
        always: for each tile.
        masked: besides, for a tile that some row does not see whole.
        shrinking: besides, where a row's maximum has grown so that its sums shrink.
    """

    always: Counter[str]
    masked: Counter[str]
    shrinking: Counter[str]


def loop_of(listing: str) -> Loop:
    """The innermost loop of a kernel's machine code, as cuobjdump -sass writes it, that multiplies and has
    exponentials.

    Raises:
        ValueError: there is none.
    """
    code = [(int(at, 16), opcode, operands) for at, _, opcode, operands in INSTRUCTION.findall(listing)]
    place = {at: n for n, (at, _, _) in enumerate(code)}
    jumps = []
    for n, (_, opcode, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode == "BRA" else None
        if target is not None and int(target[1], 16) in place:
            jumps.append((n, place[int(target[1], 16)]))

    def holds(begin: int, end: int, name: str) -> int:
        return sum(opcode.startswith(name) for _, opcode, _ in code[begin:end])

    loops = [
        (end - begin, begin, end + 1)
        for end, begin in jumps
        if begin <= end and holds(begin, end, "HGMMA") and holds(begin, end, "MUFU.EX2") > 8
    ]
    if not loops:
        raise ValueError("no loop with products and exponentials")
    _, begin, end = min(loops)
    masked: Counter[str] = Counter()
    shrinking: Counter[str] = Counter()
    for at, target in jumps:
        if begin <= at < target <= end:
            kinds = _kinds(opcode for _, opcode, _ in code[at + 1 : target])
            if holds(at, target, "FSEL") > 16:
                masked += kinds
            elif holds(at, target, "FMUL") > 16:
                shrinking += kinds
    return Loop(_kinds(opcode for _, opcode, _ in code[begin:end]) - masked - shrinking, masked, shrinking)


def _kinds(opcodes: Iterable[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for opcode in opcodes:
        kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, opcode)), OTHER)
        found[kind] += 1
    return found


def needed(head_dim: int, keys: int) -> dict[str, int]:
    """Instructions that the formula itself takes of a thread, for 64 rows of a warpgroup and a tile of keys.

    A thread has keys / 2 scores, in two rows: each enters a maximum, an fma, an exponential and a sum, and a
    pair of them a conversion. Two exponentials more are the factors by which the rows' sums shrink.
    """
    scores = keys // 2
    return {
        "HGMMA": head_dim // 16 + keys // 16,
        "MUFU.EX2": scores + 2,
        "FMNMX": scores + 4,
        "FFMA, FADD, FMUL": 2 * scores + 10,
        "F2FP": scores // 2,
        "SHFL.BFLY": 4,
    }


def compile_command(nvcc: str, element: str, head_dim: int, output: Path) -> list[str]:
    """What compiles the forward kernels of an element type and a head dim into a cubin."""
    target = ["-cubin", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}"]
    defined = [f"-DFASTATTN_ELEMENT={element}", f"-DFASTATTN_HEAD_DIM={head_dim}"]
    return [nvcc, *target, *defined, "-o", str(output), str(ROOT / "csrc/cuda/sm90_attention_fwd.cu")]


def disassembled(cubin: Path) -> str:
    """Its machine code, by the cuobjdump of CUDA or the one that comes with triton."""
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:
        import triton

        cuobjdump = str(triton.knobs.nvidia.cuobjdump.path)
    return subprocess.run([cuobjdump, "-sass", cubin], check=True, capture_output=True, text=True).stdout


def compiled(head_dim: int, folder: Path) -> str:
    """The machine code of the bfloat16 kernel for calls whose rows see one range of keys."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc is not on PATH")
    cubin = folder / f"{head_dim}.cubin"
    subprocess.run(compile_command(nvcc, "BFloat16", head_dim, cubin), check=True)
    parts = disassembled(cubin).split("Function : ")[1:]
    return next(part for part in parts if "VariantE0" in part.partition("\n")[0])


def main() -> None:
    head_dims = [int(word) for word in sys.argv[1:]] or [64, 128]
    with tempfile.TemporaryDirectory() as folder:
        loops = {head_dim: loop_of(compiled(head_dim, Path(folder))) for head_dim in head_dims}
    columns = [f"D = {d}{part}" for d in head_dims for part in ("", ", masked", ", sums shrink")]
    print("| instructions | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for kind in (*KINDS, OTHER):
        counts = [c[kind] for loop in loops.values() for c in (loop.always, loop.masked, loop.shrinking)]
        print(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
    sums = [c.total() for loop in loops.values() for c in (loop.always, loop.masked, loop.shrinking)]
    print("| in all | " + " | ".join(map(str, sums)) + " |")


if __name__ == "__main__":
    main()
