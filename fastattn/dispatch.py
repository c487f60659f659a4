"""Which backend runs a call, and why each other one does not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import autograd
from fastattn.backends import cpu
from fastattn.backends import torch as torch_backend
from fastattn.call import Call
from fastattn.lowering import lower
from fastattn.spec import AttentionSpec, spec_of
from fastattn.strides import in_order_of

VARIABLE = "FASTATTN_BACKEND"


def _reference() -> Any:
    from fastattn.backends import reference

    return reference


def _triton() -> Any:
    from fastattn.backends import triton

    return triton


def _cuda() -> Any:
    from fastattn import joined

    return joined.CUDA


# In order of preference.
BACKENDS: dict[str, Callable[[], Any]] = {
    "cuda": _cuda,
    "triton": _triton,
    "cpu": lambda: cpu,
    "torch": lambda: torch_backend,
    "reference": _reference,
}

# Backends that run only where they are asked for, and why.
UNPROVEN = {"cuda": "not yet proven on a device: ask for it with backend='cuda'"}

_warned: set[str] = set()  # backends whose slowness was mentioned


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the meaning of a call, the backend that runs it, and each backend's reason or
    None.

    `backend` is None where a backend was forced that cannot run the call.
    """

    spec: AttentionSpec
    backend: str | None
    reasons: dict[str, str | None]
    forced: str | None = None

    def __str__(self) -> str:
        lines = [repr(self.spec)]
        for name, reason in self.reasons.items():
            if name == self.backend:
                state = "runs" + (" (forced)" if self.forced else "")
            elif reason is not None:
                state = f"cannot{' (forced: the call raises)' if name == self.forced else ''}: {reason}"
            else:
                state = "could run" + (f" ({UNPROVEN[name]})" if name in UNPROVEN else "")
            lines.append(f"  {name:<10} {state}")
        return "\n".join(lines)


def reasons(spec: AttentionSpec) -> dict[str, str | None]:
    """For each backend in order, None where it can run the call, else why it cannot."""
    found: dict[str, str | None] = {}
    for name, load in BACKENDS.items():
        found[name] = load().supports(spec)
    return found


# os.environ.get costs 0.8 us for its encoding and its KeyError; the mapping beneath it costs 0.05 us.
_environment: Any = getattr(os.environ, "_data", os.environ)
_key: Any = os.environ.encodekey(VARIABLE) if _environment is not os.environ else VARIABLE


def forced_by_environment() -> str | None:
    """The value of FASTATTN_BACKEND, None where it is unset or empty."""
    if _key not in _environment:
        return None
    return os.environ[VARIABLE] or None


def forced_backend(backend: str | None) -> str | None:
    """The backend that the argument or the environment forces, checked; None leaves the choice open.

    Raises:
        ValueError: no backend has that name.
    """
    source = "backend"
    if backend is None:
        backend, source = forced_by_environment(), VARIABLE
    if backend is None:
        return None
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def explain(call: Call) -> Explanation:
    """The choice for a validated call, as a value."""
    spec = spec_of(call)
    forced = forced_backend(call.backend)
    found = reasons(spec)
    if forced is not None:
        return Explanation(spec, forced if found[forced] is None else None, found, forced)
    return Explanation(spec, able(spec, found)[0], found)


def able(spec: AttentionSpec, found: dict[str, str | None]) -> list[str]:
    """Those of the backends without a reason that may be chosen where none is forced."""
    # Interpreted, Triton's kernels are thousands of times slower.
    return [
        name
        for name, reason in found.items()
        if reason is None and name not in UNPROVEN and not (name == "triton" and spec.device == "cpu")
    ]


def choose(call: Call) -> Any:
    """The backend that runs a validated call.

    Raises:
        ValueError: a backend was forced whose name is unknown.
        NotImplementedError: a backend was forced that cannot run the call; the message has every reason.
    """
    forced = forced_backend(call.backend)
    if forced is None and call.q.device.type == "cpu" and cpu.available() and call.block_table is None:
        return cpu  # it supports all of these: no spec is needed to know
    if forced in (None, "triton") and call.q.is_cuda and _triton().takes(call):
        return _triton()
    choice = explain(call)
    if choice.backend is None:
        raise NotImplementedError(
            f"backend {forced!r} cannot run {choice.spec}: {choice.reasons[forced or '']}"
        )
    if choice.backend == "reference" and forced is None and not _warned:
        _warned.add("reference")
        why = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons.items() if reason is not None)
        warnings.warn(
            f"fastattn runs {choice.spec} on its slow reference implementation ({why}). "
            "This is said once; fastattn.explain tells for any call.",
            stacklevel=4,
        )
    return BACKENDS[choice.backend]()


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a validated call on the backend of choice; lse may be None where it was not asked for."""
    backend = choose(call)
    if not hasattr(backend, "forward"):
        out, lse = backend.run(call)
        return in_order_of(call.q, out), lse
    operands, params = lower(call)
    return autograd.attention(backend, call.q, call.k, call.v, operands, params, call.return_lse)


def seed(call: Call) -> None:
    """Draw a dropout seed from the device's default generator where the call needs one and has none."""
    if 0 < call.dropout_p < 1 and call.dropout_seed is None:
        call.dropout_seed = drawn_seed(call.q.device)


def drawn_seed(device: torch.device) -> Tensor:
    """A dropout seed from a device's default generator."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
