"""The first calls of the CUDA kernels on a device, each with one thing that those before it do without.

    python scripts/cuda_first.py              # all, until one is not right
    python scripts/cuda_first.py turns copies # some

So the first step that fails names what is wrong. The steps run in another process, which is killed where a
step does not end; cuda-gdb, where there is one, says first at which instructions its warps are.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastattn
from fastattn import masks
from fastattn.backends import cuda
from fastattn.bench.gpu.device import synchronize
from fastattn.testing import Case, make_inputs, oracle
from fastattn.testing import run as run_case
from fastattn.testing.checking import refusal
from fastattn.testing.tolerances import check_all

PATIENCE = 60.0  # seconds in which a process starts, or a step ends
LONG = 2**24 + 64  # rows of 128 columns, of which the last lie behind 2^31 numbers
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Step = Callable[[torch.device], None]


def check(case: Case, device: torch.device) -> None:
    """A case's out and lse, against the float64 reference on CPU."""
    inputs = make_inputs(case)
    expected = oracle(inputs)
    there = inputs.on(device)
    if (reason := refusal("cuda", there)) is not None:
        raise AssertionError(reason)
    got = run_case(fastattn, there, backend="cuda")
    synchronize(device)
    found = {name: None if t is None else t.cpu() for name, t in got.items()}
    check_all(found, expected.ref64, expected.native, case.dtype)


def case(*sizes: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Step:
    """Sizes: batch, heads, heads of k, seqlen_q, seqlen_k, head_dim."""
    made = Case("first", *sizes, dtype=dtype, grads=False, **options)
    return lambda device: check(made, device)


def every_kernel() -> dict[str, Step]:
    """Each kernel of csrc/cuda/configs.h with several tiles of rows and of keys."""
    kinds: dict[str, dict[str, Any]] = {
        "range": {"mask": lambda case, generator: masks.causal()},
        "general": {"softcap": 20.0},
        "full": {},
    }
    return {
        f"{dim} {kind} {name}": case(1, 1, 1, 200, 510, dim, dtype=dtype, **options)
        for dim in (64, 96, 128, 192, 256)
        for kind, options in kinds.items()
        for name, dtype in HALVES.items()
        if kind != "full" or dim == 128
    }


def behind_2_31(device: torch.device) -> None:
    """The last keys of many, and the last rows: as where they are all there is."""
    tensors = [torch.randn(1, 1, n, 128, device=device, dtype=torch.bfloat16) for n in (64, LONG, LONG)]
    q, k, v = tensors
    mask = masks.window(1000, 0)
    got = fastattn.attention(q, k, v, mask=mask, backend="cuda")
    want = fastattn.attention(q, k[:, :, -1064:], v[:, :, -1064:], mask=mask, backend="cuda")
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    got = fastattn.attention(k, q, q, backend="cuda")[:, :, -64:]
    want = fastattn.attention(k[:, :, -64:], q, q, backend="cuda")
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def graph(device: torch.device) -> None:
    """Captured by a process that has called no kernel yet; divided keys take two."""
    q, k, v = (torch.randn(1, 2, n, 64, device=device).half() for n in (1, 4096, 4096))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = fastattn.attention(q, k, v, backend="cuda")
    captured.replay()
    synchronize(device)
    want = fastattn.attention(*(t.float() for t in (q, k, v)), backend="reference")
    torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=1e-2)


STEPS: dict[str, Step] = {
    "copies": case(1, 1, 1, 64, 64, 64, softcap=20.0),  # a tile: copies, two products, a softmax, stores
    "stages": case(1, 1, 1, 64, 640, 64, softcap=20.0),  # barriers' second and later phases
    "edges": case(1, 1, 1, 50, 70, 40, softcap=20.0),  # rows, keys and columns that are not there
    "three warpgroups": case(1, 1, 1, 192, 100, 64),
    "turns": case(1, 1, 1, 192, 1000, 64),  # one multiplies while another makes its softmax
    "waiting": case(1, 1, 1, 20, 1000, 64),  # warpgroups without rows take part in the turns
    "rows of 64 bytes": case(1, 1, 1, 128, 128, 96),
    "heads": case(2, 4, 2, 70, 150, 64),  # batch entries and heads as coordinates of copies
    "group": case(1, 8, 1, 3, 300, 64),  # the heads of a group in a tile of rows
    **every_kernel(),
    "parts": case(1, 2, 2, 1, 1100, 64),  # keys divided among blocks, and attention_combine
    "packed": case(3, 4, 2, op="varlen", lengths_q=(30, 0, 200), lengths_k=(100, 7, 300)),
    "blocks": case(4, 24, 24, 400, 300, 64),  # more tiles of rows than multiprocessors
    "behind 2^31": behind_2_31,
    "graph": graph,
}


def run(names: Sequence[str], device: torch.device) -> None:
    """Run steps here; the first that is not right raises."""
    for name in names:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        STEPS[name](device)
        print(f"{name}: right, {time.perf_counter() - start:.1f} s", flush=True)


def where_it_stands(process: int) -> str:
    """What cuda-gdb says of the kernels of a process and of their warps."""
    debugger = shutil.which("cuda-gdb")
    if debugger is None:
        return "there is no cuda-gdb that could say where its warps are"
    asked = [word for line in ("info cuda kernels", "info cuda warps", "x/2i $pc") for word in ("-ex", line)]
    command = [debugger, "-batch", "-p", str(process), *asked]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return "cuda-gdb does not say where its warps are"
    return "\n".join((told.stdout + told.stderr).splitlines()[-80:])


def watched(command: Sequence[str], patience: float = PATIENCE) -> int:
    """The status of a command, which is killed where it says nothing for too long."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("a process must have a pipe, got none")
        hung = threading.Event()

        def give_up() -> None:
            hung.set()
            print(f"\nnothing for {patience:g} s; {where_it_stands(process.pid)}", flush=True)
            process.kill()

        while not hung.is_set():
            timer = threading.Timer(patience, give_up)
            timer.start()
            said = process.stdout.readline()
            timer.cancel()
            if not said:
                break
            print(said, end="", flush=True)
    return process.returncode


def main() -> int:
    words = sys.argv[1:]
    here = words[:1] == ["--here"]
    names = words[1:] if here else words or list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        raise SystemExit(f"a step must be one of {', '.join(STEPS)}; got {', '.join(unknown)}")
    if here:
        if problem := cuda.state():
            raise SystemExit(problem)
        run(names, torch.device("cuda"))
        return 0
    alone = [name for name in names if name == "graph"]  # which no other call may come before
    for group in ([name for name in names if name not in alone], alone):
        if group and (status := watched([sys.executable, __file__, "--here", *group])):
            print("FAILED: what was begun last, or nothing could be", flush=True)
            return 1 if status > 0 else -status
    return 0


if __name__ == "__main__":
    sys.exit(main())
