"""Products that begin scores, and einsum, which may begin or end them."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.autocast import autocast_dtype
from fastattn.autograd import is_traced
from fastattn.integrations.handwritten.lazy import RULES, Lazy, Notes
from fastattn.integrations.handwritten.rules.registry import as_number, pending
from fastattn.integrations.handwritten.rules.weights import output
from fastattn.integrations.handwritten.scores import Scores, Weights
from fastattn.spec import FLOAT_DTYPES

# function -> (notes, function, *args, **kwargs) -> a Lazy, or NotImplemented
PRODUCTS: dict[Any, Callable[..., Any]] = {}


def _product(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            PRODUCTS[function] = rule
        return rule

    return register


@_product(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
def matmul(notes: Notes, func: Any, input: Any, other: Any) -> Any:
    if not _may_be_scores(input, other):
        return NotImplemented
    return _scores(notes, input, other.mT, (func, (input, other), {}))


@_product(torch.baddbmm, Tensor.baddbmm)
def baddbmm(
    notes: Notes, func: Any, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    if not _may_be_scores(batch1, batch2) or as_number(alpha) is None or as_number(beta) is None:
        return NotImplemented
    make = (func, (input, batch1, batch2), {"beta": beta, "alpha": alpha})
    lead = (batch1.shape[0],)
    biases: tuple[Any, ...] = ()
    if beta != 0:  # with 0 the input is not read
        if not isinstance(input, Tensor) or isinstance(input, Lazy) or input.dim() < 2:
            return NotImplemented
        biases = ((input, float(beta), lead),)
    return _scores(notes, batch1, batch2.mT, make, scale=float(alpha), biases=biases)


def _may_be_scores(a: Any, b: Any) -> bool:
    """Whether these are plain tensors with a leading dimension or more, of one dtype that kernels take."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() < 3 or b.dim() < 3:
        return False
    return a.dtype == b.dtype and a.dtype in FLOAT_DTYPES and not is_traced(a, b)


def _scores(notes: Notes, q: Tensor, k: Tensor, make: Any, **options: Any) -> Any:
    if q.shape[-1] != k.shape[-1]:
        return NotImplemented  # PyTorch has the message
    try:
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    except RuntimeError:
        return NotImplemented
    shape = (*lead, q.shape[-2], k.shape[-2])
    meaning = Scores(q, k, tuple(lead), **options)
    return Lazy.of(meaning, shape, autocast_dtype(q) or q.dtype, notes, make)


@_product(torch.einsum)
def einsum(notes: Notes, func: Any, *args: Any) -> Any:
    if len(args) == 2 and isinstance(args[1], list | tuple):
        args = (args[0], *args[1])
        if any(isinstance(x, Lazy) for x in args):
            return NotImplemented  # einsum calls itself without the list, which the Lazy then sees
    found = _parse(args)
    if found is None or not _may_be_scores(args[1], args[2]):
        return NotImplemented
    (a, b, out), (x, y) = found, args[1:]
    contracted = (set(a) & set(b)) - set(out)
    if len(contracted) != 1 or set(a) | set(b) != set(out) | contracted or len(out) < 3:
        return NotImplemented
    lead, row, column = out[:-2], out[-2], out[-1]
    if row in b:
        a, b, x, y = b, a, y, x
    if row in b or column in a:
        return NotImplemented
    (d,) = contracted
    q, k = _arranged(x, a, lead + row + d), _arranged(y, b, lead + column + d)
    return _scores(notes, q, k, (func, args, {}))


def einsum_of_weights(func: Any, *args: Any) -> Any:
    """The rule for weights times values: the keys are contracted, whatever the order of the rest."""
    found = _parse(args)
    if found is None or not any(pending(x, Weights) for x in args[1:]):
        return NotImplemented
    (p, b, out), (lazy, v) = found, args[1:]
    if not isinstance(lazy, Lazy):
        p, b, lazy, v = b, p, v, lazy
    if isinstance(v, Lazy):
        return NotImplemented
    lead, row, column = p[:-2], p[-2], p[-1]
    features = set(b) - set(p)
    if column not in b or column in out or row in b or len(features) != 1:
        return NotImplemented
    (feature,) = features
    if sorted(out) != sorted(lead + row + feature):
        return NotImplemented
    values = _arranged(v, b, lead + column + feature)
    result = output(lazy, values, tuple(lazy.shape[:-2]))
    if result is NotImplemented:
        return NotImplemented
    return result.permute([(lead + row + feature).index(letter) for letter in out])


RULES[torch.einsum] = einsum_of_weights


def _parse(args: tuple[Any, ...]) -> tuple[str, str, str] | None:
    """The letters of two operands and the output of an equation without repeated ones."""
    if len(args) != 3 or not isinstance(args[0], str) or not all(isinstance(x, Tensor) for x in args[1:]):
        return None
    inputs, arrow, out = _without_ellipsis(args[0].replace(" ", ""), args[1].dim()).partition("->")
    operands = inputs.split(",")
    if not arrow or len(operands) != 2 or not (inputs + out).replace(",", "").isalpha():
        return None
    names = (*operands, out)
    if any(len(set(name)) != len(name) for name in names):
        return None
    if any(len(name) != x.dim() for name, x in zip(operands, args[1:], strict=True)):
        return None
    return operands[0], operands[1], out


def _without_ellipsis(equation: str, dims: int) -> str:
    """The equation with letters for the dimensions that ... stands for in its first operand, of `dims`."""
    first = equation.partition(",")[0]
    count = dims - len(first.replace("...", "", 1))
    free = [letter for letter in string.ascii_letters if letter not in equation]
    if "..." not in first or not 0 <= count <= len(free):
        return equation
    return equation.replace("...", "".join(free[:count]))


def _arranged(x: Tensor, letters: str, want: str) -> Tensor:
    """x with its dimensions in the wanted order, 1 where it has none of a letter."""
    missing = [letter for letter in want if letter not in letters]
    x = x.reshape(*x.shape, *(1 for _ in missing))
    letters += "".join(missing)
    return x.permute([letters.index(letter) for letter in want])
