"""What is measured on, and the clocks: CUDA events for the device, a stopwatch for the host."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import time
from typing import Any

import torch

import fastattn
from fastattn.bench.contenders import Contender
from fastattn.bench.measure import sample

SCRATCH_BYTES = 2**28  # several times any cache; writing it takes longer than preparing a call
MATRIX = 8192
COPY_BYTES = 2**31


class DeviceClock:
    """Seconds a call on the device, by CUDA events.

    Args:
        device: a CUDA device.
        rest: seconds of idleness before each sample: a device that is busy all the time lowers its clock
            rate, and the next contender would pay for the one before.
    """

    def __init__(self, device: torch.device, rest: float) -> None:
        self.rest = rest
        self.scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, contender: Contender, calls: int) -> float:
        torch.cuda.synchronize(self.scratch.device)
        time.sleep(self.rest)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with contender.forced():
            contender.call()  # brings the clock rate up again
            self.scratch.zero_()  # empties the cache, and is work while the first call is prepared
            start.record()
            for _ in range(calls):
                contender.call()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


class HostClock:
    """Seconds a call until it returns, without waiting for the device to do it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, contender: Contender, calls: int) -> float:
        synchronize(self.device)
        return sample(contender, calls)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answers(device: torch.device) -> bool:
    """Whether the device still works for this process, for which it does not after a fault."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory; 0 where unknown."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def require(device: torch.device) -> None:
    """Raise RuntimeError, with what to do, where no CUDA device can be used."""
    if torch.version.cuda is None:
        raise RuntimeError(
            f"--gpu needs a CUDA device, and this torch ({torch.__version__}) is built without CUDA; "
            "install one that is: https://pytorch.org/get-started/locally"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"--gpu needs a CUDA device, and torch {torch.__version__} sees none; does nvidia-smi list one?"
        )
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("--gpu needs triton, which is not installed; run: pip install 'fastattn[triton]'")
    torch.empty(1, device=device)


def describe(device: torch.device) -> dict[str, Any]:
    """Facts about the device and the versions, as plain values."""
    facts: dict[str, Any] = {"device": str(device), "gpu": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cache_mib": round(cache_bytes(device) / 2**20, 1),
            "driver": _nvidia_smi("driver_version"),
            "power_limit": _nvidia_smi("power.limit"),
        }
    return facts | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": _triton_version(),
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def state() -> str | None:
    """Clock rate, temperature and draw of the moment, as nvidia-smi tells."""
    return _nvidia_smi("clocks.sm,temperature.gpu,power.draw")


def ceilings(device: torch.device, rest: float) -> dict[str, float]:
    """TFLOP/s of a bfloat16 matrix product of 8192³, and TB/s of a copy, bytes read and written."""
    clock = DeviceClock(device, rest)
    one, other = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = clock(Contender("product", lambda: one @ other), 20)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = clock(Contender("copy", lambda: target.copy_(source)), 20)
    return {"product_tflops": 2 * MATRIX**3 / product / 1e12, "copy_tbs": 2 * COPY_BYTES / copy / 1e12}


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def _nvidia_smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = told.stdout.strip().splitlines()
    return lines[0] if lines else None
