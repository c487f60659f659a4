"""Tiny random models of many architectures: what one is, and what the inputs are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 99
LENGTH = 12
# Less than every window, so that no row is without a key: eager attention makes of such a row what it likes.
PADDED = 2

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One model to try.

    Args:
        name: what the documentation calls it.
        family: decoder, encoder, encoder-decoder, vision, audio, MoE, multimodal or other.
        model, config: names of transformers' classes.
        options: of the config.
        inputs: makes the model's arguments; "attention_mask" or "decoder_attention_mask" in them tell real
            tokens from padding.
        output: the output to compare.
        without: options that turn features off, one dictionary for each; the output must then change.
        bites: features that a test of their own turns off.
        prompts: makes the arguments of `generate`, two padded texts; None for a model that does not write.
        ignores_padding: whether such a text goes on as it does alone, without padding. Where not, the model
            itself counts padded tokens.
    """

    name: str
    family: str
    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], Inputs]
    output: str = "logits"
    without: dict[str, dict[str, Any]] = field(default_factory=dict)
    bites: tuple[str, ...] = ()
    prompts: Callable[[], Inputs] | None = None
    ignores_padding: bool = True

    @property
    def is_encoder_decoder(self) -> bool:
        return "decoder_input_ids" in self.inputs()

    def build(self, **changed: Any) -> Any:
        """The model in training mode, with weights large enough that attention is far from uniform."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**_copied(self.options), **changed})
        # Grouped products of experts have no float64.
        config._experts_implementation = "eager"
        model = getattr(transformers, self.model)(config)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 2 * parameter[0].numel() ** -0.5)
            elif "sinks" in name:
                parameter.data.normal_(1, 1)
        return model


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    """Configs write into what they are given."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}


def token_ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(2))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def left_padded(length: int = LENGTH) -> Inputs:
    """Two texts, the first of which begins with padding."""
    ids, mask = token_ids(length), torch.ones(2, length, dtype=torch.int64)
    ids[0, :PADDED], mask[0, :PADDED] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def right_padded(length: int = LENGTH) -> Inputs:
    """Two texts, the second of which ends in padding."""
    ids, mask = token_ids(length), torch.ones(2, length, dtype=torch.int64)
    ids[1, -PADDED:], mask[1, -PADDED:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def sources() -> Inputs:
    """Two texts to translate, the first of which ends in padding."""
    return {name: value.flip(1) for name, value in left_padded().items()}


def seq2seq() -> Inputs:
    return {**right_padded(), "decoder_input_ids": token_ids(7)}
