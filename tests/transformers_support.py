"""Comparing a model on fastattn with the same model on transformers' eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers_zoo import Architecture, Inputs

from fastattn.integrations.transformers.attention import fastattn_attention


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the modules whose attention is fastattn's within the block."""
    seen: list[str] = []

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(module).__name__)
        return fastattn_attention(module, *args, **kwargs)

    transformers.AttentionInterface.register("fastattn", spy)
    try:
        yield seen
    finally:
        transformers.AttentionInterface.register("fastattn", fastattn_attention)


def typed(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def real_rows(architecture: Architecture, inputs: Inputs, output: Tensor) -> Tensor:
    """The output at real tokens: what stands at padding is arbitrary."""
    if "decoder_input_ids" in inputs:
        return output
    mask = inputs.get("attention_mask")
    if mask is None or output.shape[:2] != mask.shape:
        return output
    return output[mask.bool()]


def run(model: Any, architecture: Architecture, attention: str, dtype: torch.dtype) -> list[Tensor]:
    """The output at real tokens, and the gradients of a weighted sum of it to all parameters."""
    model = model.to(dtype)
    model.set_attn_implementation(attention)
    model.zero_grad()
    inputs = typed(architecture.inputs(), dtype)
    torch.manual_seed(4)
    output = real_rows(architecture, inputs, model(**inputs)[architecture.output])
    weights = torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape).cos()
    (output * weights).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [output.detach(), torch.cat(gradients).clone()]


NEW = 5


def continue_text(model: Any, attention: str, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """The new tokens [B, n] and their scores [n, B, vocabulary]."""
    model.set_attn_implementation(attention)
    # Not the model's own: Whisper's is about recordings longer than its encoder.
    result = transformers.GenerationMixin.generate(
        model,
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    return result.sequences[:, -NEW:], torch.stack(result.scores)


def alone(inputs: Inputs, row: int) -> Inputs:
    """One entry of a batch of two, without its padding and without a mask."""
    entry = {name: value.chunk(2)[row] for name, value in inputs.items()}
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = entry.pop(name, None)
        if mask is not None:
            real = mask[0].bool()
            entry = {
                key: value[:, real] if value.shape == mask.shape else value for key, value in entry.items()
            }
    return entry
