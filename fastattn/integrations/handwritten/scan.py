"""How a class of modules computes attention, as its code says."""

from __future__ import annotations

import dis
import functools
import re
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# How far calls are followed into functions of the model's own modules.
DEPTH = 3
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "@")
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # where transformers looks its attention functions up
OPAQUE = "an autograd function, or one of TorchScript"
SCRIPT = "in TorchScript: "
WRITES = "in place"
MHA = "multi_head_attention_forward"
CALLS = ("scaled_dot_product_attention", "dispatch_attention_fn", MHA)


def style(module: nn.Module) -> str | None:
    """How a module's own code (its children are asked themselves) computes attention.

    Returns:
        "interface": through transformers' table of attention functions; "call": by
        F.scaled_dot_product_attention, or a function of PyTorch that calls it; "written out": by a product, a
        softmax and a product; "opaque": likewise, perhaps with a function in between that is C++ for all that
        Python sees; "scripted": by one of these, in a function that TorchScript has compiled; None: not
        at all.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None  # it has no code in Python
    kind: Any = type(module)
    names = _names(kind)
    if names[f"own {INTERFACE}"]:
        return "interface"
    has_softmax = (
        names["softmax"]
        or names["Softmax"]
        or any(isinstance(child, nn.Softmax) for child in module.children())
    )
    is_written_out = has_softmax and sum(names[name] for name in PRODUCTS) > 1
    if is_written_out and names[OPAQUE]:
        return "opaque"
    if any(names[name] for name in CALLS):
        return "call"
    if is_written_out:
        return "written out"
    scripted = Counter({name[len(SCRIPT) :]: n for name, n in names.items() if name.startswith(SCRIPT)})
    if not scripted["softmax"] and not any(scripted[name] for name in (*PRODUCTS, *CALLS)):
        return None
    if has_softmax:
        scripted["softmax"] += 1
    for name in PRODUCTS:
        scripted[name] += names[name]
    return "scripted" if _attends(scripted) else None


def calls_mha(kind: Any) -> bool:
    """Whether code of a class calls F.multi_head_attention_forward."""
    return bool(_names(kind)[MHA])


def may_write(kind: Any) -> bool:
    """Whether code of a class may write into a tensor, such as the output of its attention."""
    return bool(_names(kind)[WRITES])


def attends_in_script(module: torch.jit.ScriptModule) -> bool:
    """Whether a scripted module, or one in it, computes attention."""
    graph = getattr(module, "inlined_graph", None)  # a module without a forward has none
    return graph is not None and _attends(_operations(graph))


def _attends(operations: Counter[str]) -> bool:
    if any(operations[name] for name in CALLS):
        return True
    return bool(operations["softmax"]) and sum(operations[name] for name in PRODUCTS) > 1


def _operations(graph: Any) -> Counter[str]:
    """How often TorchScript's code calls each function of torch."""
    return Counter(re.findall(r"aten::(\w+)", str(graph)))


@functools.cache
def _names(kind: Any) -> Counter[str]:
    """How often the code of a class, and that of the functions it calls by a global name, says each name."""
    found: Counter[str] = Counter()
    seen: set[types.CodeType] = set()
    for base in kind.__mro__:
        if _package(base.__module__) == "torch" or base is object:
            continue
        for value in vars(base).values():
            value = getattr(value, "__func__", value)
            if isinstance(value, types.FunctionType):
                _count(value, DEPTH, found, seen)
    return found


def _count(function: types.FunctionType, depth: int, found: Counter[str], seen: set[types.CodeType]) -> None:
    function = _innermost(function)
    if function.__code__ in seen:
        return
    seen.add(function.__code__)
    for name, is_global in _said(function.__code__):
        found[name] += 1
        if depth == DEPTH and name == INTERFACE:
            found[f"own {name}"] += 1
        called: Any = function.__globals__.get(name) if is_global else None
        if isinstance(called, type) and issubclass(called, torch.autograd.Function):
            found[OPAQUE] += 1
        if isinstance(called, torch.jit.ScriptFunction):
            found[OPAQUE] += 1
            for operation, count in _operations(called.inlined_graph).items():
                found[f"{SCRIPT}{operation}"] += count
        if depth and isinstance(called, types.FunctionType) and _package(called.__module__) != "torch":
            _count(called, depth - 1, found, seen)


_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD")


def _said(code: types.CodeType) -> Iterator[tuple[str, bool]]:
    """Each name that code loads, and whether as a global; "@" for the operator."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "BINARY_MATRIX_MULTIPLY" or instruction.argrepr == "@":
            yield "@", False
        elif instruction.opname in _LOADS:
            yield instruction.argval, instruction.opname == "LOAD_GLOBAL"
        if _writes(instruction):
            yield WRITES, False
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _said(constant)


def _writes(instruction: dis.Instruction) -> bool:
    """Whether an instruction is x += y or its like, x[i] = y, or names a method like add_."""
    name = instruction.argval
    if instruction.opname in _LOADS:
        return name.endswith("_") and not name.endswith("__")
    if instruction.opname == "BINARY_OP":  # since Python 3.11
        return instruction.argrepr.endswith("=")
    return instruction.opname.startswith("INPLACE_") or instruction.opname == "STORE_SUBSCR"


def _innermost(function: Any) -> types.FunctionType:
    """The function beneath decorators that say what they wrap."""
    while isinstance(wrapped := getattr(function, "__wrapped__", None), types.FunctionType):
        function = wrapped
    return function


def _package(name: str | None) -> str:
    return (name or "").partition(".")[0]
