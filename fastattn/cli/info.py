"""`python -m fastattn info`: versions, instruction set, threads, and which backends are usable here."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.backends import cuda
from fastattn.dispatch import UNPROVEN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's options."""
    parser.add_argument("--json", action="store_true", help="print JSON for other programs to read")
    parser.add_argument("--device", default="cpu", help="the device whose backends are listed (default: cpu)")


def native_core() -> dict[str, Any]:
    """What `fastattn._C` says of itself: `isa` in use, `isas` that run here, `compiled` ones, `vector_bytes`.

    Returns:
        Those keys, or {"missing": reason} where the core is not built.
    Raises:
        ValueError: FASTATTN_CPU_ISA names no instruction set, or one that this processor lacks.
    """
    try:
        from fastattn import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return {"missing": str(error)}
    return dict(_C.info())


def collect(device: str = "cpu") -> dict[str, Any]:
    """Everything that the subcommand prints, as plain values.

    Raises:
        ValueError, RuntimeError: see `native_core`; or torch has no such device.
    """
    q = torch.empty(1, 1, 1, 16, device=device)
    explanation = fastattn.explain(q, q, q)
    return {
        "fastattn": fastattn.__version__,
        "path": str(Path(fastattn.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "native": native_core(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda_devices": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "cuda_kernels": cuda.state() or None,
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTATTN_")
        },
        "device": device,
        "backend": explanation.backend,
        "reasons": explanation.reasons,
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts of `collect` as lines of text."""
    native = facts["native"]
    if "missing" in native:
        core = f"not built: {native['missing']}"
    else:
        core = f"{native['isa']}, {8 * native['vector_bytes']}-bit vectors; "
        core += f"available here: {', '.join(native['isas'])}"
        lacking = [name for name in native["compiled"] if name not in native["isas"]]
        if lacking:
            core += f"; built but not in this processor: {', '.join(lacking)}"
    rows = {
        "fastattn": f"{facts['fastattn']} in {facts['path']}",
        "python": f"{facts['python']}, torch {facts['torch']}",
        "machine": facts["platform"],
        "native core": core,
        "threads": f"{facts['threads']} (torch.get_num_threads()), {facts['cores']} cores available",
        "cuda devices": ", ".join(facts["cuda_devices"]) or "none",
        "cuda kernels": facts["cuda_kernels"] or "usable",
    }
    if facts["environment"]:
        rows["environment"] = " ".join(f"{name}={value}" for name, value in facts["environment"].items())
    lines = [f"{name:<13}{value}" for name, value in rows.items()]
    lines.append(f"backends in order, for a plain call on {facts['device']}:")
    for name, reason in facts["reasons"].items():
        state = f"not usable: {reason}" if reason is not None else "usable"
        if name == facts["backend"]:
            state = "usable, runs by default"
        elif reason is None and name in UNPROVEN:
            state = f"usable, {UNPROVEN[name]}"
        lines.append(f"  {name:<11}{state}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Prints the facts; status 1 where the environment or the device asks for what this machine lacks."""
    try:
        facts = collect(args.device)
    except (RuntimeError, ValueError, AssertionError) as error:  # torch asserts that it was built with CUDA
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
    return 0
