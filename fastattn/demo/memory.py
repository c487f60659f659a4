"""How much resident memory training steps take, each measured in a process of its own.

`python -m fastattn.demo.memory VOCAB SEQLEN BATCH DROPOUT SIDE SEED` prints the growth in bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from fastattn.demo.measure import Case, side
from fastattn.demo.model import ModelConfig, new_model
from fastattn.demo.train import Trainer

STEPS = 3
METHOD = (
    f"peak resident memory of {STEPS} training steps, less what was resident before the first; "
    "a fresh process for each number"
)


def resident() -> tuple[int, int]:
    """This process's resident memory in bytes: now, and the most it ever had.

    Where only the second is known (macOS) it stands for both.

    Raises:
        OSError: this system tells neither.
    """
    try:
        # Not getrusage where there is a choice: on Linux a child begins with its parent's peak.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:
        raise OSError("this system tells no process how much memory it had") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def grown_in_this_process(config: ModelConfig, case: Case, name: str, seed: int) -> int:
    """Peak resident bytes during the first training steps of this process, beyond those before."""
    trainer = Trainer(new_model(config, seed))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (case.batch, case.seqlen + 1), generator=generator)
    before, _ = resident()
    with side(name):
        for _ in range(STEPS):
            trainer.step(tokens)
    return resident()[1] - before


def grown(vocab_size: int, case: Case, name: str, seed: int) -> int:
    """The same, in a fresh process.

    Raises:
        RuntimeError: the process failed; the message is what it said.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    words = [vocab_size, case.seqlen, case.batch, case.dropout, name, seed]
    done = subprocess.run(
        [sys.executable, "-m", "fastattn.demo.memory", *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,  # its words matter more than its status
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-2000:]}")
    return int(done.stdout.split()[-1])


def main(words: list[str]) -> None:
    vocab_size, seqlen, batch, dropout, name, seed = words
    case = Case(int(seqlen), float(dropout), int(batch))
    config = ModelConfig(int(vocab_size), dropout=case.dropout)
    print(grown_in_this_process(config, case, name, int(seed)))


if __name__ == "__main__":
    main(sys.argv[1:])
