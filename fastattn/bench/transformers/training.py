"""Training steps of a ViT and of a BERT-sized encoder, with and without dropout, of full and padded texts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.transformers.rows import (
    ATTENTIONS,
    FREE,
    VOCABULARY,
    Row,
    check,
    in_turn,
    rows_of,
    seeded,
)

TOKENS = 2048  # of a batch of texts


@dataclass(frozen=True)
class Step:
    """One kind of training step.

    Args:
        model: "ViT" (of ViT-S/16, 8 pictures) or "BERT" (of BERT-base); 2 layers of it.
        seqlen: tokens of a picture or a text.
        dropout: of weights and of hidden states.
        padded: whether texts are of different lengths, and padded on the right.
    """

    model: str
    seqlen: int
    dropout: float
    padded: bool = False

    def __str__(self) -> str:
        text = " padded" if self.padded else ""
        return f"{self.model}, dropout {self.dropout:g}, {self.seqlen}{text} tokens, step"

    @property
    def kind(self) -> str:
        # A picture has fewer tokens than the goal for dropout is about.
        return "train, dropout 0.1" if self.dropout and self.seqlen >= 512 else "train"


STEPS = (
    *(Step("ViT", 197, dropout) for dropout in (0.0, 0.1)),
    *(Step("BERT", seqlen, dropout) for seqlen in (512, 1024) for dropout in (0.0, 0.1)),
    *(Step("BERT", 512, dropout, padded=True) for dropout in (0.0, 0.1)),
)


def train(step: Step, rounds: int) -> list[Row]:
    """Rows of one kind of step; eager attention takes part in one round, after one of warming up.

    The row of FREE is what no attention could be quicker than.

    Raises:
        RuntimeError: the first losses without dropout differ.
    """
    _register_free()
    ways = {name: _step(*made(step, name)) for name in (*ATTENTIONS, FREE)}
    losses = {name: way() for name, way in ways.items()}
    if not step.dropout:
        check(str(step), [losses[name] for name in ATTENTIONS])
    found = in_turn({name: _timed(way) for name, way in ways.items()}, rounds, once=("eager",))
    return list(rows_of(step.kind, str(step), {name: [s for (s,) in found[name]] for name in ways}))


def _register_free() -> None:
    """An attention that costs next to nothing, so that what is left of a step is everything else."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def free(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        # Of all three, so that each of the projections has its backward pass.
        return (query + key + value).transpose(1, 2), None

    AttentionInterface.register(FREE, free)
    AttentionMaskInterface.register(FREE, lambda *arguments, **options: None)


def made(step: Step, attention: str) -> tuple[Any, dict[str, Tensor]]:
    """The model in training mode, and a batch for it."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    options: dict[str, Any] = {
        "num_hidden_layers": 2,
        "attention_probs_dropout_prob": step.dropout,
        "hidden_dropout_prob": step.dropout,
    }
    generator = torch.Generator().manual_seed(0)
    if step.model == "ViT":
        config: Any = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6, **options)
        pixels = torch.randn(8, 3, 224, 224, generator=generator)
        return seeded(config, ViTModel, attention).train(), {"pixel_values": pixels}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=step.seqlen, **options)
    batch = TOKENS // step.seqlen
    ids = torch.randint(VOCABULARY, (batch, step.seqlen), generator=generator)
    inputs = {"input_ids": ids}
    if step.padded:  # from a quarter of the length to all of it
        lengths = torch.linspace(step.seqlen // 4, step.seqlen, batch).long()
        inputs["attention_mask"] = (torch.arange(step.seqlen) < lengths[:, None]).long()
    return seeded(config, BertModel, attention).train(), inputs


def _step(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Forward, backward and the optimiser's update; returns the loss over real tokens."""
    optimiser = torch.optim.AdamW(model.parameters(), 1e-5)
    real = inputs.get("attention_mask")

    def step() -> Tensor:
        optimiser.zero_grad()
        out = model(**inputs).last_hidden_state
        # The last norm fixes the mean square: of the cosine something is to be learnt.
        loss = (out if real is None else out[real.bool()]).cos().mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def _timed(call: Callable[[], Any]) -> Callable[[], tuple[float]]:
    def timed() -> tuple[float]:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start,)

    return timed
