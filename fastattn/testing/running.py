"""Run a case and collect every result: out, lse and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.testing.inputs import Inputs
from fastattn.testing.tolerances import max_error

Results = dict[str, Tensor | None]


@dataclass(frozen=True)
class Oracle:
    """The exact results of a case, and those of plain eager code in the case's own dtype.

    Eager code adds the keys up in either order, and of each result the worse one counts: one order alone may
    be right by luck, which is common among gradients of a few elements.
    """

    ref64: Results
    native: Results


def run(
    functions: Any, inputs: Inputs, grads: bool | None = None, lse: bool = True, **keywords: Any
) -> Results:
    """Call the case's function and, if asked, differentiate (out, lse) against (dout, dlse).

    Args:
        functions: a namespace with attention, varlen_attention and decode_attention: `fastattn`, or
            `fastattn.reference`.
        grads: whether to differentiate; the case says by default.
        lse: whether to ask for lse, and to differentiate it.
        keywords: added to the call.
    Returns:
        "out", "lse" if asked and, with gradients, "dq", "dk", "dv" and one for each further leaf.
    """
    grads = inputs.case.grads if grads is None else grads
    if grads:
        inputs = inputs.requiring_grad()
    function: Callable[..., Any] = getattr(functions, _FUNCTIONS[inputs.case.op])
    positional, options = inputs.arguments()
    returned = function(*positional, **options, **keywords, return_lse=lse)
    outputs = dict(zip(("out", "lse"), returned if lse else (returned,), strict=False))
    results: Results = {name: output.detach() for name, output in outputs.items()}
    if grads:
        leaves = {name: leaf for name, leaf in inputs.leaves.items() if leaf.requires_grad}
        upstream = {"out": inputs.dout, "lse": inputs.dlse}
        gradients = torch.autograd.grad(
            list(outputs.values()),
            list(leaves.values()),
            [upstream[name].to(output.dtype) for name, output in outputs.items()],
            allow_unused=True,
        )
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results


_FUNCTIONS = {"attention": "attention", "varlen": "varlen_attention", "decode": "decode_attention"}


def oracle(inputs: Inputs, grads: bool | None = None, lse: bool = True) -> Oracle:
    """The reference in float64, and in the case's dtype (float64: with the keys in reverse order only)."""
    ref64 = run(reference, inputs.to(torch.float64), grads, lse)
    native = run(reference, inputs, grads, lse, reverse_keys=True)
    if inputs.case.dtype != torch.float64:
        forward = run(reference, inputs, grads, lse)
        native = {name: _worse(ref64[name], native[name], forward[name]) for name in native}
    return Oracle(ref64, native)


def _worse(exact: Tensor | None, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if exact is None or one is None or other is None:
        return one
    return one if max_error(one, exact) >= max_error(other, exact) else other
