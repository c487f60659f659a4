"""What is measured on: the machine's description, and its ceilings measured between the cases."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastattn

try:
    from fastattn import _C  # type: ignore[attr-defined]
except ImportError:
    _C = None

COPY_BYTES = 128 * 2**20  # far beyond a core's share of the last-level cache
FMA_SECONDS = 0.03


def processor() -> str:
    """The processor's model name, with its numbers where the name alone says little (virtual machines)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines[:64]:  # the first processors' fields; all say the same
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    name = fields.get("model name") or fields.get("CPU part") or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return name


def describe() -> dict[str, Any]:
    """Facts about the machine and the versions, as plain values."""
    native = None if _C is None else _C.info()
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": "none (the native core is not built)" if native is None else native["isa"],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
    }


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Inside, PyTorch and we compute with `threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Ceilings:
    """FMA peak and copy bandwidth for one number of threads, measured again and again between the cases.

    Virtual machines change speed from minute to minute: a rate is best compared with the peak measured
    next to it, and the whole run with the medians.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.flops: list[float] = []
        self.bandwidth: list[float] = []

    def measure_fma(self) -> float | None:
        """FLOP/s of float32 multiply-adds on registers, or None without the native core."""
        if _C is None:
            return None
        self.flops.append(_C.fma_peak(0, self.threads, FMA_SECONDS))
        return self.flops[-1]

    def measure_copy(self) -> float | None:
        """Bytes read and written a second, or None without the native core."""
        if _C is None:
            return None
        self.bandwidth.append(_C.copy_bandwidth(COPY_BYTES, self.threads))
        return self.bandwidth[-1]

    def summary(self) -> dict[str, Any]:
        """Medians and ranges in GFLOP/s and GB/s; None where nothing was measured."""
        return {"threads": self.threads} | {
            name: None
            if not values
            else {"median": median(values) / 1e9, "low": min(values) / 1e9, "high": max(values) / 1e9}
            for name, values in (("fma_gflops", self.flops), ("copy_gbs", self.bandwidth))
        }
