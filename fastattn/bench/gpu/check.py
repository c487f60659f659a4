"""Every case of the tests on the device, against the float64 reference computed there.

Kernels are compiled for each case, on one core: so cases run in several processes. One that dies, or whose
device no longer answers after a fault, is replaced, and no other case suffers from it.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import IO

import torch

from fastattn.bench.gpu.device import answers, synchronize
from fastattn.testing.cases import CASES
from fastattn.testing.checking import check_case, refusal
from fastattn.testing.inputs import make_inputs
from fastattn.testing.running import oracle

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
QUICK_STEP = 7  # of the short run: every seventh case
PATIENCE = 180.0  # seconds in which a process starts and compiles for a case, or is killed
BY_NAME = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        name: of the case.
        state: PASSED, SKIPPED or FAILED.
        reason: the backend's for a skipped case, what was wrong with a failed one.
        seconds: that it took, compiling included.
    """

    name: str
    state: str
    reason: str | None = None
    seconds: float = 0.0


def chosen(quick: bool, filter: str = "") -> list[str]:
    """The names of the cases to check, of those that contain a match of the regular expression `filter`."""
    return [name for name in BY_NAME if re.search(filter, name)][:: QUICK_STEP if quick else 1]


def check_one(name: str, device: torch.device, backend: str = "triton") -> Outcome:
    """Check a case, with the numbers that it has on CPU."""
    start = time.perf_counter()
    state, reason = PASSED, None
    try:
        inputs = make_inputs(BY_NAME[name]).on(device)
        reason = refusal(backend, inputs)
        if reason is None:
            check_case(backend, inputs, oracle(inputs))
            synchronize(device)
        else:
            state = SKIPPED
    except Exception as error:  # of any kind: the other cases are checked all the same
        state, reason = FAILED, f"{type(error).__name__}: {error}"
    return Outcome(name, state, reason, time.perf_counter() - start)


def check_here(
    names: Sequence[str], device: torch.device, backend: str, on_outcome: Callable[[Outcome], None]
) -> list[Outcome]:
    """Check cases in this process."""
    outcomes = []
    for name in names:
        outcomes.append(check_one(name, device, backend))
        on_outcome(outcomes[-1])
    return outcomes


def check_in_processes(
    names: Sequence[str],
    device: torch.device,
    backend: str,
    on_outcome: Callable[[Outcome], None],
    workers: int,
) -> list[Outcome]:
    """Check cases in several processes; `on_outcome` is called from threads."""

    def share(number: int) -> list[Outcome]:
        outcomes = []
        for outcome in _outcomes(names[number::workers], device, backend):
            outcomes.append(outcome)
            on_outcome(outcome)
        return outcomes

    with ThreadPoolExecutor(workers) as pool:
        return [outcome for outcomes in pool.map(share, range(workers)) for outcome in outcomes]


def _outcomes(names: Sequence[str], device: torch.device, backend: str) -> Iterator[Outcome]:
    """The outcomes of one process after another, each of which checks what the one before left."""
    left = list(names)
    while left:
        command = [sys.executable, "-m", "fastattn.bench.gpu.check", str(device), backend]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("a process must have pipes, got none")
            process.stdin.write("\n".join(left))
            process.stdin.close()
            done = 0
            for line in _lines_of(process, process.stdout):
                if line.startswith("{"):
                    done += 1
                    yield Outcome(**json.loads(line))
        if done < len(left) and process.returncode != DEVICE_LOST:
            reason = f"its process ended with status {process.returncode}"
            if process.returncode == -signal.SIGKILL:
                reason += f", as where no result comes within {PATIENCE:g} s"
            yield Outcome(left[done], FAILED, reason)
            done += 1
        left = left[done:]


def _lines_of(process: subprocess.Popen[str], output: IO[str]) -> Iterator[str]:
    """What a process prints, which is killed where it prints nothing for too long: a kernel may not end."""
    while True:
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        line = output.readline()
        timer.cancel()
        if not line:
            return
        yield line


DEVICE_LOST = 3  # exit status: the case before was the last that this process could check


def main(device: torch.device, backend: str) -> int:
    """Check the cases named on standard input; a line of JSON each."""
    for name in sys.stdin.read().split("\n"):
        outcome = check_one(name, device, backend)
        print(json.dumps(asdict(outcome)), flush=True)
        if not answers(device):
            return DEVICE_LOST
    return 0


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """The counts, the reasons of the skipped cases, and each failed one."""
    counts = Counter(outcome.state for outcome in outcomes)
    summary = ", ".join(f"{counts[state]} {state}" for state in (PASSED, SKIPPED, FAILED))
    found = [f"{len(outcomes)} cases against the float64 reference: {summary}"]
    reasons = Counter(outcome.reason for outcome in outcomes if outcome.state == SKIPPED)
    found += [f"  skipped {count}: {reason}" for reason, count in reasons.most_common()]
    found += [f"  FAILED {each.name}: {each.reason}" for each in outcomes if each.state == FAILED]
    return found


if __name__ == "__main__":
    sys.exit(main(torch.device(sys.argv[1]), sys.argv[2]))
