"""Training: the same steps from the same seed, whichever attention the model has."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.data.subwords import PAD
from fastattn.demo.progress import progress
from fastattn.demo.recipe import Recipe
from fastattn.demo.text import Batch, Text, batches
from fastattn.models import Transformer


class Trainer:
    """A model with its optimizer; one call of `step` is one step."""

    def __init__(self, model: Transformer, recipe: Recipe):
        self.model, self.recipe = model, recipe
        # eps is large for Adam: it divides by a gradient's size, and where that is no more than rounding
        # errors, these would become steps of full length, and runs on other kernels would drift apart.
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-5, weight_decay=0.01
        )

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy, in nats a token, with smoothed labels."""
        logits = self.model(
            batch.src, batch.tgt, src_documents=batch.src_documents, tgt_documents=batch.tgt_documents
        )
        return F.cross_entropy(
            logits.flatten(0, 1),
            batch.want.flatten(),
            ignore_index=PAD,
            label_smoothing=self.recipe.smoothing,
        )

    def step(self, batch: Batch, rate: float | None = None) -> float:
        """Forward, backward and update; the loss before the update."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate if rate is None else rate
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


@dataclass
class Run:
    """A model in training: its trainer, the loss of every step so far, and the seconds they took."""

    trainer: Trainer
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @staticmethod
    def new(recipe: Recipe, text: Text, attention: str) -> Run:
        model = recipe.model(len(text.subwords), attention)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.register_forward_hook(_contiguous)
        return Run(Trainer(model, recipe))

    @property
    def model(self) -> Transformer:
        return self.trainer.model


def _contiguous(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor | None]) -> object:
    """Dropout draws in the order of memory, and PyTorch's attention returns a transposed view."""
    return output[0].contiguous(), output[1]


def train(run: Run, text: Text, steps: int, label: str) -> bool:
    """Go on with a run up to that many steps, with a progress bar; False where Ctrl-C ended it before.

    The step at hand when Ctrl-C comes is finished, so that the run can go on from where it stopped.
    """
    recipe = run.trainer.recipe
    done = len(run.losses)
    order = batches(text.train, recipe.batch, recipe.seed, done)
    run.model.train()
    start = time.perf_counter() - run.seconds
    with interrupts() as interrupted:
        for step in progress(range(done, steps), steps, label, run.losses):
            run.losses.append(run.trainer.step(next(order), recipe.rate(step)))
            run.seconds = time.perf_counter() - start
            if interrupted.is_set():
                break
    return len(run.losses) >= steps


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one raises KeyboardInterrupt, as ever.

    Only the main thread can have it so; in others the event is never set.
    """
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def handle(number: int, frame: object) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
