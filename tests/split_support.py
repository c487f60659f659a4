"""Keys divided into parts small enough for small calls."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import masks
from fastattn.backends import common
from fastattn.biases import ALiBi

BOTTOM = torch.tensor([-math.inf, 0.0, 3.0, 200.0])  # sinks of four heads


def few_rows(seqlen_q: int, seqlen_k: int, dim: int, batch: int = 2) -> list[Tensor]:
    """q, k and v of four heads, two of them to a key-value head."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((batch, 4, seqlen_q), (batch, 2, seqlen_k), (batch, 2, seqlen_k))
    return [torch.randn(*size, dim, generator=generator) for size in sizes]


def options(seqlen_k: int) -> dict[str, dict[str, Any]]:
    """Options of a call of two entries of two queries each."""
    return {
        "plain": {},
        "window": {"mask": masks.window(20, 0)},  # most parts see nothing
        "ranges": {"mask": masks.padding(torch.tensor([150, 0]), torch.tensor([100, 0]))},  # nor an entry
        "bool": {"mask": torch.arange(seqlen_k)[None] % 7 == torch.arange(2)[:, None]},
        "alibi": {"bias": ALiBi(torch.tensor([0.5, 0.1, 1.0, 2.0]))},
        "sinks": {"sinks": BOTTOM, "softcap": 5.0},
        "sinks alone": {"sinks": BOTTOM, "mask": masks.padding(torch.tensor([0, 3]))},
        "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([11])},
        "large scores": {"scale": 100.0},
    }


def small_parts(monkeypatch: pytest.MonkeyPatch, host: ModuleType) -> list[int]:
    """Parts of 16 keys and more; the list collects into how many the keys of each call are divided.

    Args:
        host: the backend's module that asks `common.parts_of`.
    """
    found: list[int] = []

    def parts_of(*sizes: int) -> int:
        found.append(common.parts_of(*sizes))
        return found[-1]

    monkeypatch.setattr(common, "SHORTEST_PART", 16)
    monkeypatch.setattr(host, "parts_of", parts_of)
    return found
