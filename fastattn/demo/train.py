"""Training: the same steps from the same seed, whichever attention is in force."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.demo.model import LanguageModel, ModelConfig, new_model
from fastattn.demo.text import Tokens, batches


@dataclass(frozen=True)
class Recipe:
    """How to train; with the text and the model's config it fixes every number of a run."""

    steps: int
    seed: int = 0
    batch: int = 4
    seqlen: int = 256
    learning_rate: float = 2e-3
    warmup: int = 30

    def rate(self, step: int) -> float:
        """A short linear rise, then half a cosine down to a twentieth."""
        rise = min(1.0, (step + 1) / self.warmup)
        return self.learning_rate * rise * (0.525 + 0.475 * math.cos(math.pi * step / self.steps))


@dataclass
class Run:
    """A trained model and how it got there: the loss of every step, and the time of them all."""

    model: LanguageModel
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Trainer:
    """A model with its optimizer; one call is one step."""

    def __init__(self, model: LanguageModel):
        self.model = model
        # eps is large for AdamW: it divides by a gradient's size, and where that is no more than rounding
        # errors, these would become steps of full length, and the two runs would drift apart.
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.01
        )

    def step(self, tokens: Tensor, rate: float = 1e-3) -> float:
        """Forward, backward and update on [B, L + 1] tokens; the loss before the update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.model.loss(tokens)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def train(config: ModelConfig, tokens: Tokens, recipe: Recipe, label: str) -> Run:
    """Train a new model and show a progress bar named `label`."""
    run = Run(new_model(config, recipe.seed))
    trainer = Trainer(run.model)
    data = itertools.islice(batches(tokens.train, recipe.batch, recipe.seqlen, recipe.seed), recipe.steps)
    start = time.perf_counter()
    for step, batch in enumerate(progress(data, recipe.steps, label, run.losses)):
        run.losses.append(trainer.step(batch, recipe.rate(step)))
    run.seconds = time.perf_counter() - start
    return run


def steps_for(config: ModelConfig, tokens: Tokens, recipe: Recipe, seconds: float) -> int:
    """How many steps take about that long here, at least 20, from a few steps of a model thrown away."""
    trainer = Trainer(new_model(config, recipe.seed))
    times = []
    for batch in itertools.islice(batches(tokens.train, recipe.batch, recipe.seqlen, recipe.seed), 12):
        start = time.perf_counter()
        trainer.step(batch)
        times.append(time.perf_counter() - start)
    return max(20, 10 * round(seconds / statistics.median(times[2:]) / 10))


@torch.no_grad()
def held_out_loss(model: LanguageModel, tokens: Tokens, recipe: Recipe, count: int = 16) -> float:
    """Mean loss on pieces of the text that training never saw."""
    model.eval()
    data = itertools.islice(batches(tokens.held_out, recipe.batch, recipe.seqlen, recipe.seed), count)
    loss = statistics.fmean(model.loss(batch).item() for batch in data)
    model.train()
    return loss


@torch.no_grad()
def generate(
    model: LanguageModel, tokens: Tokens, prompt: str, count: int, seed: int, temperature: float = 0.7
) -> str:
    """The prompt and `count` characters drawn after it; the model looks back 256 at most."""
    generator = torch.Generator().manual_seed(seed)
    written = tokens.encode(prompt)
    model.eval()
    for _ in range(count):
        logits = model(written[None, -256:])[0, -1] / temperature
        written = torch.cat((written, torch.multinomial(logits.softmax(0), 1, generator=generator)))
    model.train()
    return tokens.decode(written)


def progress(items: Iterable[Tensor], total: int, label: str, losses: list[float]) -> Iterator[Tensor]:
    """The items, with a tqdm bar where tqdm and a terminal are there, else with a line at every tenth."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            with tqdm(total=total, desc=label, unit="step") as bar:
                for item in items:
                    yield item
                    bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                    bar.update()
            return
    start, tenths = time.perf_counter(), 0
    for done, item in enumerate(items, 1):
        yield item
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            bar, elapsed = "#" * tenths + "." * (10 - tenths), time.perf_counter() - start
            print(
                f"{label} [{bar}] step {done}/{total}, loss {losses[-1]:.3f}, {elapsed:.0f} s",
                flush=True,
            )
