"""The table of what kernels compile to: one line for a kernel, an architecture, a dtype and a head dim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from fastattn.backends.triton.compile import Compiled, problems
from fastattn.backends.triton.configs import SHARED_MEMORY

HEADING = """\
# What the Triton kernels compile to

Written by `python -m fastattn.backends.triton.compile --out DIR`, with triton {version}. A line is a kernel
for an architecture, a dtype and a head dim, and for the calls that share its tile; ranges are over those
calls. *Shared* is of what a block of the device may have. *Registers* are a thread's; *spilled* is its stack
frame in bytes; *in loops* counts the instructions that read or write a spilled register inside an innermost
loop with a matrix product, of the call that has most, and names it. The loop that is entered for results
that are not finite counts too. {done} of {asked} calls that were asked for are here."""
WORST = 20  # spilling loops that are named above the table
COLUMNS = (
    "sm",
    "kernel",
    "dtype",
    "D",
    "tile",
    "warps",
    "stages",
    "calls",
    "shared KiB",
    "multiplies by",
    "registers",
    "spilled B",
    "in loops",
)


def table(rows: Sequence[Compiled], failed: Sequence[str], asked: int, version: str) -> list[str]:
    """Lines of Markdown: what is wrong, then the numbers.

    Args:
        rows: what was compiled.
        failed: why calls were not.
        asked: how many calls were to be compiled.
        version: triton's.
    """
    done = len({(row.arch, row.dtype, row.variant, row.head_dim) for row in rows})
    lines = [*HEADING.format(version=version, done=done, asked=asked).splitlines(), ""]
    wrong = [f"- {_call(row)}: {problem}" for row in rows for problem in problems(row)]
    wrong += [f"- does not compile: {reason}" for reason in failed]
    lines += [
        "Does not compile, does not fit or does not use tensor cores:",
        "",
        *(wrong or ["- nothing"]),
        "",
    ]
    spilling = sorted((row for row in rows if any(row.loop_spills)), key=_most_spills, reverse=True)
    named = [f"- {_call(row)}: {_most_spills(row)}" for row in spilling[:WORST]]
    lines += ["Loops that spill most (instructions):", "", *(named or ["- none"]), ""]
    lines += [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    ordered = sorted(rows, key=_group)
    lines += [_line(_cells(list(group))) for _, group in groupby(ordered, key=_group)]
    return lines


def _group(row: Compiled) -> tuple[object, ...]:
    return row.arch, row.kernel, row.dtype, row.head_dim, row.config


def _most_spills(row: Compiled) -> int:
    return max(row.loop_spills, default=0)


def _call(row: Compiled) -> str:
    return f"sm_{row.arch} {row.kernel}, {row.variant}, {row.dtype}, D={row.head_dim}"


def _cells(rows: list[Compiled]) -> list[object]:
    first = rows[0]
    used = [row.usage for row in rows if row.usage is not None]
    worst = max(rows, key=_most_spills)
    most = _most_spills(worst)
    return [
        first.arch,
        first.kernel,
        first.dtype,
        first.head_dim,
        f"{first.config.block_m}x{first.config.block_n}",
        first.config.num_warps,
        first.config.num_stages,
        ", ".join(dict.fromkeys(row.variant for row in rows)),
        f"{_range(-(-row.shared // 1024) for row in rows)} of {SHARED_MEMORY[first.arch] // 1024}",
        ", ".join(sorted({(row.instruction or "-").split(".")[0] for row in rows})),
        _range(each.registers for each in used),
        _range(each.stack for each in used),
        f"{most} ({worst.variant})" if most else "0",
    ]


def _range(values: Iterable[int]) -> str:
    found = sorted(values)
    if not found:
        return "?"
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}-{found[-1]}"


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
