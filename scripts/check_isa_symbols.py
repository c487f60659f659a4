"""Checks that no call for a plain processor can land in code compiled for a better one.

    python scripts/check_isa_symbols.py build/dev

Of an inline function that several object files hold, the linker keeps the copy of the first file. An
optimised build has none outside each instruction set's own namespace; one with -O0, -O1 or a sanitizer has
many (std::max), and is right only if for each of them the least demanding instruction set's file comes first.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# What an instruction set asks for; all other object files run on any processor.
DEMANDS = {"avx2": 1, "avx512": 2}


def linked_objects(build: Path) -> list[list[str]]:
    """For each library or program of a Ninja build, its object files in the order of the link line."""
    rules = (build / "build.ninja").read_text().splitlines()
    links = [line for line in rules if re.match(r"build .*: CXX_(MODULE_LIBRARY|EXECUTABLE)_LINKER", line)]
    return [[word for word in line.split("||")[0].split() if word.endswith(".o")] for line in links]


def weak_symbols(path: Path) -> set[str]:
    """Functions of which the linker keeps one copy among all object files, demangled."""
    command = ["nm", "-C", "--defined-only", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (re.match(r"\s*[0-9a-f]*\s+(\S) (.*)", line) for line in listing.splitlines())
    return {match.group(2) for match in found if match is not None and match.group(1) in "Wu"}


def demand(path: str) -> int:
    """How demanding the instruction set is that an object file is compiled for."""
    match = re.search(r"fastattn_(\w+)\.dir", path)
    return DEMANDS.get(match.group(1), 0) if match is not None else 0


def misplaced_symbols(build: Path) -> list[str]:
    """A line for each symbol whose kept copy asks for more than another file that calls it."""
    wrong = []
    for objects in linked_objects(build):
        kept: dict[str, str] = {}
        for path in objects:
            for symbol in weak_symbols(build / path):
                owner = kept.setdefault(symbol, path)
                if demand(owner) > demand(path):
                    wrong.append(f"{symbol}: {path} would call the copy of {owner}")
    return wrong


def main(arguments: list[str]) -> int:
    wrong = [line for build in arguments for line in misplaced_symbols(Path(build))]
    print("\n".join(wrong) or "no function is shared upwards between instruction sets")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
