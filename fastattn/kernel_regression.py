"""kernel_attention: Nadaraya-Watson regression, on the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import leading
from fastattn.call import Call
from fastattn.execution import has_values
from fastattn.leading import leading_dimensions
from fastattn.masks import Mask
from fastattn.masks.ranges import KeyRange
from fastattn.spec import DISTANCE_SCORES, FLOAT_DTYPES, dtype_name
from fastattn.validation import broadcasts, check_number, check_tensor

KERNELS = (*DISTANCE_SCORES, "constant")


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: str = "gaussian",
    width: float | Tensor = 1.0,
    mask: Mask | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """out_i = sum_j K(u_ij) v_j / sum_j K(u_ij) over visible j, with u_ij = |q_i - k_j| / width.

    K(u) is exp(-u^2 / 2) (gaussian), 1 for u <= 1 (boxcar), 1 - u^2 for u < 1 (epanechnikov), 1 - u for u < 1
    (triangular), else 0, or 1 everywhere (constant). Memory is that of the arguments: a hundred thousand keys
    are no trouble. Coordinates are first shifted by the keys' median, which changes no distance, so that
    data far from 0 keep their digits. What is then rounded is a coordinate's distance from the median: of two
    points near to each other, but x widths from the median, u is right to about x times 1e-7 (float32).

    >>> x = torch.linspace(0, 5, 50)[:, None]
    >>> y = kernel_attention(x, x, torch.sin(x), width=0.1)
    >>> bool((y - torch.sin(x)).abs().max() < 0.1)
    True

    Args:
        q: [..., Lq, D], the points at which to estimate; float32, bfloat16, float16 or float64.
        k: [..., Lk, D], the training points, q's dtype.
        v: [..., Lk, Dv], their values, q's dtype. The leading dimensions of q, k and v broadcast.
        kernel: one of "gaussian", "boxcar", "epanechnikov", "triangular", "constant".
        width: positive, finite; a number, or a tensor of one element or of shape [D], one width per feature,
            to which gradients flow (0 from a boxcar, which is flat, and none from a constant).
        mask: a fastattn.masks.Mask (the first leading dimension is its batch, a second its heads), or bool
            broadcastable to [..., Lq, Lk], True = attend.
        return_lse: whether to return log(sum_j K(u_ij)) too, of use for densities and for `merge`.
        backend: as in `attention`.
    Returns:
        out [..., Lq, Dv] in q's dtype; with return_lse also lse [..., Lq]. A query that no visible key's
        kernel reaches has out 0, gradients 0 and lse -inf.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got.
    Source: Nadaraya, "On Estimating Regression", 1964; Watson, "Smooth Regression Analysis", 1964.
    """
    call = Call("attention", q, k, v, mask=mask, return_lse=return_lse, backend=backend)
    set_kernel(call, kernel, width)
    found = leading.run(call)
    if not return_lse:
        return found.to(q.dtype)
    return found[0].to(q.dtype), found[1]


def set_kernel(call: Call, kernel: str, width: float | Tensor) -> None:
    """Make `call` that of a kernel: its coordinates get the width as their unit; half precision becomes
    float32.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    leading_dimensions(call)
    q, k, v = call.q, call.k, call.v
    name_q, name_k, name_v = map(call.name, ("q", "k", "v"))
    for name, tensor in ((name_q, q), (name_k, k), (name_v, v)):
        check_tensor(name, tensor, q.device, name_q)
        if tensor.dtype not in FLOAT_DTYPES:
            names = ", ".join(map(dtype_name, FLOAT_DTYPES))
            raise TypeError(f"{name} must be one of {names}, got {dtype_name(tensor.dtype)}")
        if tensor.dtype != q.dtype:
            want = dtype_name(q.dtype)
            raise TypeError(f"{name} must have {name_q}'s dtype {want}, got {dtype_name(tensor.dtype)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{name_k} must have {name_q}'s {q.shape[-1]} features, got {k.shape[-1]}")
    width = _check_width(width, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if kernel == "constant":  # all keys within reach, at no distance
        kernel, q, k = "boxcar", 0 * q[..., :1], 0 * k[..., :1]
    else:
        middle = _middle(k, call.mask)
        q, k = (q - middle) / width, (k - middle) / width
    call.q, call.k, call.v, call.score, call.scale = q, k, v, kernel, 1.0


def _check_width(width: Any, q: Tensor) -> float | Tensor:
    if not isinstance(width, Tensor):
        width = check_number("width", width)
        if width <= 0:
            raise ValueError(f"width must be positive, got {width}")
        return width
    check_tensor("width", width, q.device)
    if not width.is_floating_point():
        raise TypeError(f"width must be floating point, got {dtype_name(width.dtype)}")
    if width.numel() != 1 and width.shape != (q.shape[-1],):
        raise ValueError(
            f"width must have one element or shape [{q.shape[-1]}], one per feature, got {list(width.shape)}"
        )
    if has_values(width):
        wrong = width[~((width > 0) & width.isfinite())]
        if wrong.numel():
            raise ValueError(f"width must be positive and finite, got {wrong[0].item():g}")
    return width.reshape(-1).to(torch.promote_types(q.dtype, torch.float32))


def _middle(k: Tensor, mask: Mask | Tensor | None) -> Tensor:
    """The median of each feature over the keys, [..., 1, D].

    A median, as one far key must not move what is near to where it rounds; and its bits do not depend on the
    keys' order. Keys hidden from all queries by a tensor or by padding play no part, nor what is not finite.
    """
    k = k.detach()
    if k.numel() == 0:
        return k.new_zeros(k.shape[-1])
    counts = k.isfinite()
    seen = _seen(mask, k)
    if seen is not None:
        counts = counts & seen.unsqueeze(-1)
    return torch.where(counts, k, torch.nan).nanmedian(-2, keepdim=True).values.nan_to_num(0.0)


def _seen(mask: Mask | Tensor | None, k: Tensor) -> Tensor | None:
    """Which keys [..., Lk] some query may see, as far as that is told without the pairs; None for all."""
    lead = k.dim() - 2
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() >= 2:
        seen = mask.any(-2)
    elif isinstance(mask, KeyRange):
        j = torch.arange(k.shape[-2], device=k.device)
        ends, starts = (
            None if bound is None else torch.as_tensor(bound, device=k.device).unsqueeze(-1).flatten(1)
            for bound in (mask.ends, mask.starts)
        )
        if ends is None or ends.numel() == 0:
            return None
        seen = j < ends.amax(1, keepdim=True)
        seen = seen if starts is None else seen & (j >= starts.amin(1, keepdim=True))
        seen = seen.reshape(-1, *(1,) * max(lead - 1, 0), k.shape[-2])  # its first dimension is the batch
    else:
        return None
    while seen.dim() > lead + 1:  # what shares its keys shares their middle
        seen = seen.any(0)
    for dim in range(-seen.dim(), -1):
        if k.shape[dim - 1] == 1:
            seen = seen.any(dim, keepdim=True)
    return seen if broadcasts(seen.shape, k.shape[:-1]) else None  # what does not fit is refused later
