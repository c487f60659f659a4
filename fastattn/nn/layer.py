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
from fastattn.execution import autocast
from fastattn.masks import Mask, dense, padding
from fastattn.spec import dtype_name

ValidLens = Tensor | Sequence[int] | int


class AttentionLayer(nn.Module):
    """A layer that can tell the weights of its last call."""

    _last: Call | Tensor | None = None  # what weights are made of; weights, where the layer returns them
    _versions: dict[str, list[tuple[Tensor, int]]] | None = None  # of what `_last` shares with the caller

    @property
    def attention_weights(self) -> Any:
        """The weights of the last call before dropout, [..., Lq, Lk] in float32 (float64 for float64).

        None before any call. Computed when asked, by the kernel that computed the output, from the queries
        and keys of that call, which the layer holds until the next; without gradient.

        Raises:
            RuntimeError: an argument of that call was changed in place since.
        """
        if not isinstance(self._last, Call):
            return self._last
        check_versions(self._versions, "attention_weights")
        return leading.weights(replace(self._last))

    def _remember(self, call: Call) -> Call:
        """Keep what the weights are made of, detached, and return `call`, cast as autocast wants it."""
        autocast(call)  # now: the weights may be asked for outside of autocast's block
        if is_transformed():
            self._last = None
            return call
        w, bias = call.score_weights, call.bias
        if isinstance(bias, Tensor):
            bias = kept(bias)
        elif bias is not None:
            bias = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), bias)
        self._last = replace(
            call,
            q=kept(call.q),
            k=kept(call.k),
            bias=bias,
            score_weights=None if w is None else w.detach().clone(),
            dropout_p=0.0,
            return_lse=False,
        )
        self._last.v = self._last.k[..., :1]
        self._versions = versions(
            {call.name(name): getattr(self._last, name) for name in ("q", "k", "mask", "bias")}
        )
        return call

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_last", "_versions")}


def is_transformed() -> bool:
    """Whether torch.func transforms the call: its tensors must not outlive the transform."""
    return torch._C._are_functorch_transforms_active()


def kept(tensor: Tensor) -> Tensor:
    """The tensor without gradient; a copy, where it is a parameter or a view of one, which optimizers change
    in place.
    """
    base = tensor if tensor._base is None else tensor._base
    shared = base.is_leaf and (base.requires_grad or isinstance(base, nn.Parameter))
    return tensor.detach().clone() if shared else tensor.detach()


def versions(values: dict[str, Any]) -> dict[str, list[tuple[Tensor, int]]] | None:
    """The tensors in each value, with how often they had been changed in place; None where nobody counts."""
    if torch.compiler.is_compiling():
        return None
    leaves = {name: pytree.tree_leaves(value) for name, value in values.items()}
    return {
        name: [(t, t._version) for t in found if isinstance(t, Tensor) and not t.is_inference()]
        for name, found in leaves.items()
    }


def check_versions(recorded: dict[str, list[tuple[Tensor, int]]] | None, what: str) -> None:
    """Raise if a tensor was changed in place since."""
    for name, found in (recorded or {}).items():
        if any(tensor._version != version for tensor, version in found):
            raise RuntimeError(
                f"{what} need the {name} of the last call, which were changed in place since: read {what} "
                f"before the change, or give the layer a copy"
            )


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
    if isinstance(mask, Tensor) and mask.dim() == 3 and queries.dim() == 4:
        mask = mask.unsqueeze(1)  # [B, Lq, Lk], the same for all heads
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
