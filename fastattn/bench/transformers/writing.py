"""A small Llama that reads a long text and goes on with it: time, and memory in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.contenders import OURS
from fastattn.bench.transformers.rows import ATTENTIONS, VOCABULARY, Row, check, in_turn, rows_of, seeded

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Prompt:
    """What the model reads: one text, or two of which the first is half as long and padded on the left."""

    tokens: int
    padded: bool

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(VOCABULARY, (2 if self.padded else 1, self.tokens), generator=generator)
        mask = torch.ones_like(ids)
        if self.padded:
            mask[0, : self.tokens // 2] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def attentions(self) -> tuple[str, ...]:
        # Eager attention to two long texts at once would need more memory than most machines have.
        return ATTENTIONS[:2] if self.padded else ATTENTIONS


def llama(attention: str) -> Any:
    """A small Llama with grouped heads: 2 layers, width 512, 8 query and 2 key heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=16384,
    )
    return seeded(config, LlamaForCausalLM, attention).eval()


class Writer:
    """A model that reads a prompt and goes on with it, greedily."""

    def __init__(self, attention: str, inputs: dict[str, Tensor], new: int) -> None:
        self.model, self.inputs, self.new = llama(attention), inputs, new
        self.attention = attention

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Reads the prompt into a fresh cache; returns the next token's scores."""
        from transformers import DynamicCache

        from fastattn.integrations.transformers import FastCache

        capacity = self.inputs["input_ids"].shape[1] + self.new
        config = self.model.config
        fast = self.attention == OURS
        self.cache = FastCache(config, capacity=capacity) if fast else DynamicCache(config=config)
        positions = (self.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = self.model(**self.inputs, position_ids=positions, past_key_values=self.cache, logits_to_keep=1)
        self.last, self.positions = out.logits[:, -1], positions[:, -1:]
        return self.last

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Writes the new tokens; returns the last one's scores."""
        mask = self.inputs["attention_mask"]
        for _ in range(self.new):
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
            self.positions = self.positions + 1
            out = self.model(
                self.last.argmax(1, keepdim=True),
                attention_mask=mask,
                position_ids=self.positions,
                past_key_values=self.cache,
            )
            self.last = out.logits[:, -1]
        return self.last

    def timed(self) -> tuple[float, float]:
        """Seconds of reading and of writing."""
        start = time.perf_counter()
        self.first = self.prefill()
        middle = time.perf_counter()
        self.decode()
        return middle - start, time.perf_counter() - middle


def write(prompt: Prompt, new: int, rounds: int) -> list[Row]:
    """Rows of reading the prompt and of writing `new` tokens; eager attention takes part in one round."""
    names = prompt.attentions()
    peaks = {name: peak(name, prompt) for name in names}
    writers = {name: Writer(name, prompt.inputs(), new) for name in names}
    found = in_turn({name: each.timed for name, each in writers.items()}, rounds, once=("eager",))
    check("prefill", [each.first for each in writers.values()])
    kind = "two texts, one padded" if prompt.padded else "one text"
    rows: list[Row] = []
    works = (("prefill", f"{prompt.tokens} tokens prefill"), ("decode", f"{new} new tokens"))
    for at, (goal, work) in enumerate(works):
        seconds = {name: [pair[at] for pair in found[name]] for name in names}
        megabytes = {name: peaks[name][at] for name in names}
        rows += rows_of(goal, f"Llama, {kind}, {work}", seconds, megabytes)
    return rows


def peak(attention: str, prompt: Prompt) -> tuple[float | None, float | None]:
    """Megabytes by which reading, and then writing, raise the peak of a process of its own.

    Those of writing are what masks and caches take, and little else. None where nobody counts (only Linux
    does), or where there was not that much memory.
    """
    if not STATUS.exists():
        return None, None
    command = (
        "from fastattn.bench.transformers.writing import Prompt, print_peak; "
        f"print_peak({attention!r}, {prompt!r})"
    )
    # Large tensors go back to the system when they are freed: else what counts is which of them leave a hole
    # in the heap that the next one fits into.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode < 0:
        return None, None  # killed, most likely: there is not that much memory
    if done.returncode:
        raise RuntimeError(f"the process that measures {attention}'s memory failed: {done.stderr[-2000:]}")
    reading, writing = done.stdout.split()[-2:]
    return float(reading), float(writing)


def print_peak(attention: str, prompt: Prompt) -> None:
    """Print the megabytes by which reading the prompt, and then writing, raise this process's peak."""
    from fastattn.integrations.transformers import register

    register()
    writer = Writer(attention, Prompt(64, prompt.padded).inputs(), 4)
    writer.timed()  # what libraries allocate once is none of it
    del writer.cache
    writer.inputs = prompt.inputs()
    before = _peak_from_now()
    writer.prefill()
    reading = _peak() - before
    _peak_from_now()
    writer.decode()
    print(reading, _peak() - before)


def _peak_from_now() -> float:
    """Forget this process's peak so far; megabytes of memory that it has."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    """Megabytes of memory that this process has had at most."""
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10
