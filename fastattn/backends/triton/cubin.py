"""What compiled kernels hold: registers, stack and the loops of their machine code, as cuobjdump tells."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_ADDRESS = re.compile(r"0x([0-9a-f]+)")
_MATRIX_PRODUCT = re.compile(r"[HQIU]\w*MMA")  # HMMA; HGMMA and QGMMA of sm_90; UTCHMMA of sm_100
_LOCAL_MEMORY = ("LDL", "STL")  # where the registers that a thread lacks are kept


@dataclass(frozen=True)
class Loop:
    """The instructions from a backward branch's target to the branch, in an innermost loop.

    Args:
        instructions: how many.
        products: those that multiply on tensor cores.
        spills: those that read or write a spilled register.
    """

    instructions: int
    products: int
    spills: int


@dataclass(frozen=True)
class Usage:
    """What a thread of a kernel takes.

    Args:
        registers: how many of 32 bits.
        stack: bytes, of spilled registers mostly.
        loops: the innermost loops, by address.
    """

    registers: int
    stack: int
    loops: tuple[Loop, ...]


def usage(cubin: bytes) -> Usage | None:
    """Read a compiled kernel; None where cuobjdump, which comes with triton, is missing or fails."""
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = _run(tool, "-res-usage", file.name)
        listing = _run(tool, "-sass", file.name)
    registers, stack = re.search(r"REG:(\d+)", told), re.search(r"STACK:(\d+)", told)
    if registers is None or stack is None:
        return None
    return Usage(int(registers[1]), int(stack[1]), loops(listing))


def loops(listing: str) -> tuple[Loop, ...]:
    """The innermost loops of a listing of machine code (`cuobjdump -sass`).

    >>> loops('''
    ...     /*0010*/                   LDL R2, [R1] ;
    ...     /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R2, R4 ;
    ...     /*0030*/              @P0  BRA 0x10 ;
    ...     /*0040*/                   STL [R1], R4 ;
    ... ''')
    (Loop(instructions=3, products=1, spills=1),)
    """
    code = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(listing)]
    spans = []
    for at, name, rest in code:
        targets = _ADDRESS.findall(rest)
        if name.split(".")[0] == "BRA" and targets and int(targets[-1], 16) < at:
            spans.append((int(targets[-1], 16), at))
    inner = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= other and last <= end and (other, last) != (begin, end) for other, last in spans)
    ]
    return tuple(
        _loop([name for at, name, _ in code if begin <= at <= end]) for begin, end in sorted(set(inner))
    )


def _loop(names: Sequence[str]) -> Loop:
    return Loop(
        len(names),
        sum(_MATRIX_PRODUCT.match(name) is not None for name in names),
        sum(name.split(".")[0] in _LOCAL_MEMORY for name in names),
    )


def _run(*command: str) -> str:
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return told.stdout + told.stderr
