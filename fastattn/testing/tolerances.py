"""The bound on the error: derived from what plain eager code does, never tuned.

`native` is the same formula written in eager PyTorch in the input's own dtype. A backend may be at
most twice as far from the float64 answer as that (three times for gradients, whose formula is a
chain of twice as many products), plus a few units in the last place of the input's dtype, for answers
where eager code happens to be exact. Only lse, which is accumulated and returned in float32 whatever
the input, is allowed no more than units of its own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FORWARD_FACTOR = 2
GRADIENT_FACTOR = 3


def ulps(dtype: torch.dtype) -> int:
    """Units in the last place that are always allowed."""
    return 64 if dtype == torch.float64 else 4


def max_error(value: Tensor, ref64: Tensor) -> float:
    """max |value - ref64| where both are finite; 0 where there is nothing to compare."""
    error = (value.double() - ref64).abs()
    error = error[error.isfinite()]
    return error.max().item() if error.numel() else 0.0


def bound(
    ref64: Tensor, native: Tensor, dtype: torch.dtype, factor: int, magnitude: float | None = None
) -> float:
    """factor * max |native - ref64| + atol, atol a few ulp of max |ref64| (or of `magnitude`) in `dtype`."""
    if magnitude is None:
        finite = ref64[ref64.isfinite()].abs()
        magnitude = finite.max().item() if finite.numel() else 0.0
    return factor * max_error(native, ref64) + ulps(dtype) * torch.finfo(dtype).eps * magnitude


def check(
    name: str,
    value: Tensor,
    ref64: Tensor,
    native: Tensor,
    factor: int = FORWARD_FACTOR,
    dtype: torch.dtype | None = None,
    magnitude: float | None = None,
) -> None:
    """Compare one result: first its shape, then where it is NaN or infinite, then the error.

    Args:
        name: what to call the result in the message.
        value: the backend's result.
        ref64: float64, the reference's.
        native: the eager formula in the input's dtype.
        factor: how many of `native`'s errors are allowed.
        dtype: whose units in the last place are allowed; value's where None.
        magnitude: of which they are units; max |ref64| where None.
    Raises:
        AssertionError: where they disagree.
    """
    if value.shape != ref64.shape:
        raise AssertionError(f"{name}: shape {tuple(value.shape)}, expected {tuple(ref64.shape)}")
    for kind, differs in (
        ("NaN", value.isnan() != ref64.isnan()),
        ("+inf", value.isposinf() != ref64.isposinf()),
        ("-inf", value.isneginf() != ref64.isneginf()),
    ):
        if differs.any():
            where = differs.nonzero()[0].tolist()
            raise AssertionError(f"{name}: {kind} at {int(differs.sum())} wrong places, first {where}")
    error, limit = max_error(value, ref64), bound(ref64, native, dtype or value.dtype, factor, magnitude)
    if error > limit:
        distance = torch.where(value.isfinite(), (value.double() - ref64).abs(), 0.0)
        worst = tuple(torch.unravel_index(distance.argmax(), distance.shape))
        raise AssertionError(
            f"{name}: error {error:.3g} exceeds {limit:.3g} (eager's: {max_error(native, ref64):.3g}) at "
            f"{[int(index) for index in worst]}: {value[worst].item():.9g}, not {ref64[worst].item():.9g}"
        )


Named = Mapping[str, "Tensor | None"]


def check_all(
    value: Named,
    ref64: Named,
    native: Named,
    dtype: torch.dtype,
    magnitudes: Mapping[str, float] | None = None,
) -> None:
    """`check` every result of a call: "out" and "lse" forward, the rest gradients.

    A result that is None (no gradient) must be None, or all zeros, in both. `dtype` is the inputs';
    `magnitudes` replace max |ref64| of the results that they name.
    """
    for name, expected in ref64.items():
        got, eager = value[name], native[name]
        if expected is None or got is None or eager is None:
            if any(x is not None and x.count_nonzero() for x in (got, expected)):
                raise AssertionError(f"{name}: one side has no gradient: got {got}, expected {expected}")
            continue
        factor = FORWARD_FACTOR if name in ("out", "lse") else GRADIENT_FACTOR
        magnitude = (magnitudes or {}).get(name)
        check(name, got, expected, eager, factor, None if name == "lse" else dtype, magnitude)
