"""What a call of the triton backend costs the processor until its kernels are launched.

python -m fastattn.bench.gpu.host_time

Without a GPU one is pretended: everything runs but the CUDA driver, whose own 2 to 3 us a launch are then
missing, as is what PyTorch's allocator for GPUs takes beyond the one for CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

import fastattn
from fastattn import masks, repeated
from fastattn.backends.triton import plans

CALLS = 100  # timed at a time: fewer than a device's queue holds
HEAD = f"{'call':<22}{'planned':>9}{'lowest':>9}{'long way':>10}{'lowest':>9}   us; launches"


@dataclass(frozen=True)
class HostTime:
    """Microseconds of a thread's CPU time for a call.

    Args:
        name: which call.
        planned, planned_least: median and minimum over rounds, where a call like it was made before.
        long_way, long_way_least: where nothing is remembered of earlier calls.
        launches: kernels for each; None where that was not counted.
    """

    name: str
    planned: float
    planned_least: float
    long_way: float
    long_way_least: float
    launches: float | None

    def line(self) -> str:
        numbers = (
            f"{self.planned:>9.1f}{self.planned_least:>9.1f}{self.long_way:>10.1f}{self.long_way_least:>9.1f}"
        )
        return f"{self.name:<22}{numbers}   {'' if self.launches is None else f'{self.launches:g}'}"


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """Small calls of each kind, bfloat16 [1, 2, 16, 64]."""
    q, k, v = (torch.randn(1, 2, 16, 64, dtype=torch.bfloat16, device=device) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    viewed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    dout, seed = torch.randn_like(q), torch.zeros(1, dtype=torch.int64, device=device)
    lengths, offsets = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([16], [0, 16]))
    causal = masks.causal()

    def both_ways() -> object:
        return torch.autograd.grad(fastattn.attention(*leaves, mask=causal), leaves, dout)

    return {
        "plain": lambda: fastattn.attention(q, k, v),
        "causal": lambda: fastattn.attention(q, k, v, mask=causal),
        "causal, transposed": lambda: fastattn.attention(*viewed, mask=causal),
        "dropout, given seed": lambda: fastattn.attention(q, k, v, dropout_p=0.1, dropout_seed=seed),
        "causal, graph": lambda: fastattn.attention(*leaves, mask=causal),
        "causal, and back": both_ways,
        "decode": lambda: fastattn.decode_attention(q, k, v, lengths),
        "varlen, causal": lambda: fastattn.varlen_attention(
            packed[0], packed[1], packed[2], offsets, offsets, max_seqlen_q=16, max_seqlen_k=16, mask=causal
        ),
    }


@contextlib.contextmanager
def forgetful() -> Iterator[None]:
    """Within, no call is like one before it."""

    class Nothing(dict):
        def __setitem__(self, key: object, value: object) -> None:
            pass

    with (
        patch.object(plans.FORWARD, "_plans", Nothing()),
        patch.object(plans.BACKWARD, "_plans", Nothing()),
        patch.object(repeated, "_known", Nothing()),
    ):
        yield


def sample(call: Callable[[], object], wait: Callable[[], object]) -> float:
    """Microseconds of CPU time a call."""
    wait()
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) / CALLS * 1e6


def measure(
    name: str,
    call: Callable[[], object],
    rounds: int,
    wait: Callable[[], object] = lambda: None,
    launches: Callable[[], int] | None = None,
) -> HostTime:
    """Times of a call, both ways in turn.

    Args:
        wait: until a device has done what it was given.
        launches: how many kernels were launched so far.
    """
    call()
    call()
    before = 0 if launches is None else launches()
    call()
    count = None if launches is None else launches() - before
    planned, long_way = [], []
    for _ in range(rounds):
        planned.append(sample(call, wait))
        with forgetful():
            long_way.append(sample(call, wait))
    return HostTime(
        name, statistics.median(planned), min(planned), statistics.median(long_way), min(long_way), count
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench.gpu.host_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="of 100 calls each way (default: 21)")
    parser.add_argument(
        "--filter", default="", metavar="REGEX", help="only calls whose name contains a match"
    )
    parser.add_argument("--out", type=Path, help="write the times as JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(HEAD)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        found = run(device, given, torch.cuda.synchronize, None)
        q = torch.randn(1, 2, 16, 64, dtype=torch.bfloat16, device=device)
        times = [
            sample(lambda: F.scaled_dot_product_attention(q, q, q), torch.cuda.synchronize)
            for _ in range(given.rounds)
        ]
        print(f"{'PyTorch, plain':<22}{statistics.median(times):>9.1f}{min(times):>9.1f}")
    else:
        from fastattn.testing.pretended_gpu import pretended_gpu

        with pretended_gpu() as launches:
            found = run(torch.device("cpu"), given, lambda: None, launches)
    if given.out is not None:
        given.out.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    return 0


def run(
    device: torch.device,
    given: argparse.Namespace,
    wait: Callable[[], object],
    launches: Callable[[], int] | None,
) -> list[HostTime]:
    """Measure the chosen calls, and print each."""
    found = []
    for name, call in calls(device).items():
        if re.search(given.filter, name):
            found.append(measure(name, call, given.rounds, wait, launches))
            print(found[-1].line(), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
