"""What the layers of the attention family share: their masks, and a look at the weights afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastattn import leading
from fastattn.call import Call
from fastattn.masks import Mask, dense, padding
from fastattn.spec import dtype_name

ValidLens = Tensor | Sequence[int] | int


class AttentionLayer(nn.Module):
    """A layer that can tell the weights of its last call."""

    _last: Call | Tensor | None = None  # what weights are made of; weights, where the layer returns them

    @property
    def attention_weights(self) -> Any:
        """The weights of the last call before dropout, [..., Lq, Lk] in float32 (float64 for float64).

        None before any call. Computed when asked, by the kernel that computed the output, from the queries
        and keys of that call, which the layer holds until the next; without gradient.
        """
        return leading.weights(replace(self._last)) if isinstance(self._last, Call) else self._last

    def _remember(self, call: Call) -> Call:
        """Keep what the weights are made of, detached, and return `call` as it is."""
        if is_transformed():
            self._last = None
            return call
        w, bias = call.score_weights, call.bias  # an optimizer changes parameters in place
        if isinstance(bias, Tensor):
            bias = bias.detach()
        elif bias is not None:
            bias = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), bias)
        self._last = replace(
            call,
            q=call.q.detach(),
            k=call.k.detach(),
            v=call.k.detach()[..., :1],
            bias=bias,
            score_weights=None if w is None else w.detach().clone(),
            dropout_p=0.0,
            return_lse=False,
        )
        return call

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_last"}


def is_transformed() -> bool:
    """Whether torch.func transforms the call: its tensors must not outlive the transform."""
    return torch._C._are_functorch_transforms_active()


def as_tensor(name: str, value: Any, device: torch.device) -> Tensor:
    """`value`, a tensor or what torch makes one of (numbers, sequences, arrays), on `device`."""
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor or numbers that make one, got {value!r} ({error})"
        ) from None


def visible_keys(
    mask: Mask | Tensor | None, valid_lens: ValidLens | None, queries: Tensor
) -> Mask | Tensor | None:
    """One mask that lets a pair be seen where both `mask` and `valid_lens` do.

    Args:
        mask: a Mask, or bool broadcastable to [..., Lq, Lk].
        valid_lens: int [B] or [B, Lq]: how many of the first keys are visible; [] or [Lq] for queries
            without a batch.
        queries: [..., Lq, features]; of which only the dimensions are read.
    Raises:
        TypeError: valid_lens are no integers.
        ValueError: valid_lens of another shape.
    """
    if valid_lens is None:
        return mask
    lens = as_tensor("valid_lens", valid_lens, queries.device)
    if lens.is_floating_point() or lens.is_complex() or lens.dtype == torch.bool:
        raise TypeError(f"valid_lens must be integers, got {dtype_name(lens.dtype)}")
    lens = lens[None] if queries.dim() == 2 else lens
    batch = queries.shape[0] if queries.dim() > 2 else 1
    if lens.shape not in ((batch,), (batch, queries.shape[-2])):
        want = f"[{batch}] or [{batch}, {queries.shape[-2]}]"
        raise ValueError(f"valid_lens must be [B] or [B, Lq], here {want}, got shape {list(lens.shape)}")
    if mask is None:
        return padding(lens)
    if isinstance(mask, Tensor):
        mask = dense(mask.unsqueeze(1) if mask.dim() == 3 and queries.dim() == 3 else mask)
    return mask & padding(lens)


def check_ranks(ranks: tuple[int, ...], layout: str, **inputs: Any) -> None:
    """Raise unless all inputs are tensors of one rank, one of `ranks`; `layout` says how they should look."""
    first = next(iter(inputs))
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() not in ranks:
            raise ValueError(f"{name} must be {layout}, got shape {list(x.shape)}")
        if x.dim() != inputs[first].dim():
            want, got = inputs[first].dim(), list(x.shape)
            raise ValueError(f"{name} must be {want}-D like {first}, got shape {got}")
