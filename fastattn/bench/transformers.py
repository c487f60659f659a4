"""Models of Hugging Face transformers on fastattn, sdpa and eager: writing text, and training steps.

Everything is random: what is measured is time and memory, which do not depend on what a model knows.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.contenders import OURS, Contender
from fastattn.bench.measure import Ratio, Timing, interleave, ratio
from fastattn.bench.report import geometric_mean

HEADER = f"{'model and work':<52}{'attention':<10}{'s':>9}{'MB':>8}  fastattn is faster [95%]"
ATTENTIONS = (OURS, "sdpa", "eager")
PROMPT, NEW = 8192, 256
VOCABULARY = 1000


@dataclass(frozen=True)
class Row:
    """One kind of work on one attention.

    Args:
        work: what was done.
        attention: transformers' name of the implementation.
        timing: seconds of each round.
        ratio: its time over fastattn's, or None for fastattn itself.
        megabytes: by which the work raised the process's peak, where that was measured.
    """

    work: str
    attention: str
    timing: Timing
    ratio: Ratio | None
    megabytes: float | None = None

    def line(self) -> str:
        memory = "" if self.megabytes is None else f"{self.megabytes:.0f}"
        versus = "" if self.ratio is None else str(self.ratio)
        return f"{self.work:<52}{self.attention:<10}{self.timing.median:>9.4g}{memory:>8}  {versus}".rstrip()

    def row(self) -> dict[str, Any]:
        return {
            "work": self.work,
            "attention": self.attention,
            "seconds": self.timing.median,
            "megabytes": self.megabytes,
            "ratio": None if self.ratio is None else self.ratio.value,
            "ratio_interval": None if self.ratio is None else [self.ratio.low, self.ratio.high],
        }


def run(quick: bool, on_row: Callable[[Row], None]) -> list[Row]:
    """Measure everything, at the number of threads that torch uses.

    Args:
        quick: an eighth of the text, and fewer rounds.
        on_row: called with each row as soon as it is there.
    Raises:
        RuntimeError: implementations disagree about a result.
    """
    from fastattn.integrations.transformers import register

    register()
    rows: list[Row] = []
    for part in (_write(PROMPT // 8, NEW // 8, 3) if quick else _write(PROMPT, NEW, 3), *_trained(quick)):
        for row in part:
            rows.append(row)
            on_row(row)
    return rows


def summary(rows: list[Row]) -> Iterator[str]:
    """The goals, and what came of them."""
    against: dict[str, list[float]] = {row.work: [] for row in rows}
    for row in rows:
        if row.ratio is not None and row.attention == "sdpa":
            against[row.work].append(row.ratio.value)
    for title, goal, chosen in (
        ("prefill", 1.3, "prefill"),
        ("decoding", 1.0, "new tokens"),
        ("training, no dropout", 1.0, "dropout 0,"),
        ("training, dropout 0.1", 1.5, "dropout 0.1,"),
    ):
        found = [value for work, values in against.items() if chosen in work for value in values]
        if found:
            least = f"{geometric_mean(found):.2f}x, least {min(found):.2f}x"
            yield f"{title:<24} against sdpa: {least}   (goal: at least {goal}x)"


# Writing


def llama(attention: str) -> Any:
    """A small Llama with grouped heads: 4 layers, width 512, 8 query and 2 key heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2 * PROMPT,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def texts(length: int, padded: bool) -> dict[str, Tensor]:
    """One text, or two of which the first is half as long and padded on the left."""
    ids = torch.randint(VOCABULARY, (2 if padded else 1, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : length // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


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


def _write(length: int, new: int, rounds: int) -> Iterator[Row]:
    for padded in (False, True):
        inputs = texts(length, padded)
        # Eager attention to two long texts at once would need more memory than most machines have.
        names = ATTENTIONS[:2] if padded else ATTENTIONS
        writers = [Writer(name, inputs, new) for name in names]
        peaks = [_peak(name, length, padded) for name in names]
        reads: list[list[float]] = [[] for _ in names]
        writes: list[list[float]] = [[] for _ in names]
        for number in range(rounds):
            scores = []
            for index in range(len(names)) if number % 2 == 0 else reversed(range(len(names))):
                start = time.perf_counter()
                scores.append(writers[index].prefill())
                middle = time.perf_counter()
                writers[index].decode()
                reads[index].append(middle - start)
                writes[index].append(time.perf_counter() - middle)
            _check("prefill", scores)
        kind = f"{'two texts, one padded' if padded else 'one text'}"
        yield from _rows(f"Llama, {kind}, {length} tokens prefill", names, reads, peaks)
        yield from _rows(f"Llama, {kind}, {new} new tokens", names, writes)


def _rows(
    work: str, names: tuple[str, ...], seconds: list[list[float]], peaks: list[float | None] | None = None
) -> Iterator[Row]:
    timings = [Timing(tuple(each), 1) for each in seconds]
    for index, (name, timing) in enumerate(zip(names, timings, strict=True)):
        versus = None if name == OURS else ratio(timing, timings[0])
        yield Row(work, name, timing, versus, None if peaks is None else peaks[index])


def _check(work: str, results: list[Tensor]) -> None:
    """Raise where scores differ by more than the rounding of float32 through a few layers explains."""
    for other in results[1:]:
        difference = float((results[0] - other).abs().max() / other.abs().max())
        if not difference <= 1e-3:
            raise RuntimeError(f"{work}: the implementations' results differ by {difference:.3g}")


def _peak(attention: str, length: int, padded: bool) -> float | None:
    """Megabytes by which one prefill raises the peak of a process of its own; None where nobody counts."""
    try:
        import resource  # noqa: F401
    except ImportError:
        return None
    command = (
        f"from fastattn.bench.transformers import print_peak; print_peak({attention!r}, {length}, {padded})"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    if done.returncode:
        return None  # killed, most likely: there is not that much memory
    return float(done.stdout.split()[-1])


def print_peak(attention: str, length: int, padded: bool) -> None:
    """Print the megabytes by which a prefill raises this process's peak."""
    import resource

    from fastattn.integrations.transformers import register

    register()
    writer = Writer(attention, texts(64, padded), 1)
    writer.prefill()
    writer.decode()
    writer.inputs = texts(length, padded)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    writer.prefill()
    writer.decode()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) / (2**20 if sys.platform == "darwin" else 2**10))


# Training


def _vit(attention: str, dropout: float, seqlen: int) -> tuple[Any, dict[str, Tensor]]:
    """4 layers of a ViT-S/16 on 8 pictures."""
    from transformers import ViTConfig, ViTModel

    config: Any = ViTConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_attention_heads=6,
        num_hidden_layers=4,
        attention_probs_dropout_prob=dropout,
        hidden_dropout_prob=dropout,
    )
    config._attn_implementation = attention
    return ViTModel(config), {"pixel_values": torch.randn(8, 3, 224, 224)}


def _bert(attention: str, dropout: float, seqlen: int) -> tuple[Any, dict[str, Tensor]]:
    """4 layers of BERT-base on 2048 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=4,
        max_position_embeddings=seqlen,
        attention_probs_dropout_prob=dropout,
        hidden_dropout_prob=dropout,
    )
    config._attn_implementation = attention
    return BertModel(config), {"input_ids": torch.randint(VOCABULARY, (max(1, 2048 // seqlen), seqlen))}


def _trained(quick: bool) -> Iterator[Iterator[Row]]:
    works = [("ViT", _vit, 197), ("BERT", _bert, 512), ("BERT", _bert, 1024)]
    if not quick:
        works.append(("BERT", _bert, 2048))
    for name, make, seqlen in works:
        for dropout in (0, 0.1):
            work = f"{name}, dropout {dropout}, {seqlen} tokens, step"
            yield _train(work, make, dropout, seqlen, 3 if quick else 7)


def _train(work: str, make: Callable[..., Any], dropout: float, seqlen: int, rounds: int) -> Iterator[Row]:
    ways = []
    for name in ATTENTIONS:
        torch.manual_seed(0)
        model, inputs = make(name, dropout, seqlen)
        ways.append(Contender(name, _step(model.train(), inputs)))
    losses = [way.call() for way in ways]
    if not dropout:
        _check(work, losses)
    timings = interleave(ways, [1] * len(ways), rounds)
    return _rows(work, ATTENTIONS, [list(timing.seconds) for timing in timings])


def _step(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Forward, backward and the optimiser's update; returns the loss."""
    optimiser = torch.optim.AdamW(model.parameters(), 1e-5)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = model(**inputs).last_hidden_state.square().mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step
