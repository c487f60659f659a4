"""What tests of patched models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prepared(module: nn.Module, std: float = 0.3) -> Any:
    """In evaluation, with parameters that all matter: layer scales and biases start at nothing."""
    module.eval()  # which some modules do not return from
    torch.manual_seed(0)
    for parameter in module.parameters():
        centre = 1.0 if parameter.dim() < 2 and parameter.mean() > 0.5 else 0.0
        nn.init.normal_(parameter, centre, std)
    return module


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of all leaves that the loss depends on."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def compile_and_watch(function: Any, **options: Any) -> tuple[Any, list[str]]:
    """A module or function compiled by a backend that changes nothing, and the code of each graph so far."""
    found: list[str] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        found.append(graph.code)
        return graph

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, **options), found


def trainable(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def assert_same_outcome(got: list[Tensor], want: list[Tensor], precision: float) -> None:
    """An output and gradients: to `precision` of the output, and ten times that of the largest gradient."""
    assert len(got) == len(want)
    scale = max(gradient.abs().max().item() for gradient in want[1:])
    torch.testing.assert_close(got[0], want[0], rtol=precision, atol=precision / 10)
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=10 * precision, atol=precision * scale)
