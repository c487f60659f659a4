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
from fastattn.checks import not_a_mask
from fastattn.execution import autocast, has_values
from fastattn.masks import Mask, dense, padding
from fastattn.masks.space import is_integer
from fastattn.spec import dtype_name
from fastattn.validation import check_floating

ValidLens = Tensor | Sequence[int] | int

LAYOUTS = {2: "[L, D] without a batch", 3: "[B, L, D]", 4: "[B, H, L, D] with heads"}
NAMES = {"q": "queries", "k": "keys", "v": "values"}  # what the layers call a call's arguments


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


class QueryLayer(AttentionLayer):
    """layer(queries, keys, values, valid_lens, mask): what such layers take, checked and explained once.

    A subclass defines `_attend`.
    """

    _ranks: tuple[int, ...] = (2, 3, 4)  # dimensions that queries may have

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        valid_lens: ValidLens | None = None,
        mask: Mask | Tensor | None = None,
    ) -> Any:
        """One sum of the visible values for each query; the formula is the layer's.

        Args:
            queries: [B, Lq, features]; or [Lq, features] without a batch; or, but for `LocalAttention`, with
                heads [B, H, Lq, features].
            keys: [B, Lk, features] and so on.
            values: [B, Lk, Dv] and so on.
            valid_lens: int [B] or [B, Lq] ([] or [Lq] without a batch), from 0 to Lk: how many of the first
                keys are visible.
            mask: a fastattn.masks.Mask, or bool, True = attend: [Lq, Lk], [B, Lq, Lk] or [B, H, Lq, Lk].
        Returns:
            [B, Lq, Dv] and so on; 0 for a query that sees no key.
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        layouts = ", ".join(LAYOUTS[rank] for rank in self._ranks)
        check_ranks(self._ranks, layouts, queries=queries, keys=keys, values=values)
        lens = lens_of(valid_lens, queries, keys.shape[-2])
        call = Call("attention", queries, keys, values, mask=join_lens(mask, lens, queries), names=NAMES)
        return self._attend(call, lens, mask)

    def _attend(self, call: Call, lens: Tensor | None, mask: Mask | Tensor | None) -> Any:
        """The layer's output.

        Args:
            call: the three tensors, with what is visible as its mask; it may be changed.
            lens, mask: what that mask was made of; lens [B] or [B, Lq].
        """
        raise NotImplementedError


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


def as_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """`value`, a tensor or what torch makes one of (numbers, sequences, arrays), on `device` if given."""
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor or numbers that make one, got {value!r} ({error})"
        ) from None


def visible_keys(
    mask: Mask | Tensor | None, valid_lens: ValidLens | None, queries: Tensor, seqlen_k: int
) -> Mask | Tensor | None:
    """One mask that lets a pair be seen where both `mask` and `valid_lens` do.

    Args:
        mask: a Mask, or bool broadcastable to [..., Lq, Lk].
        valid_lens: int [B] or [B, Lq]; [] or [Lq] for queries without a batch.
        queries: [..., Lq, features]; of which only the dimensions are read.
        seqlen_k: Lk.
    Raises:
        TypeError, ValueError: as `check_lens` does.
    """
    return join_lens(mask, lens_of(valid_lens, queries, seqlen_k), queries)


def lens_of(valid_lens: ValidLens | None, queries: Tensor, seqlen_k: int) -> Tensor | None:
    """`check_lens` for queries [..., Lq, features], which lack a batch where they have two dimensions."""
    if valid_lens is None:
        return None
    if queries.dim() > 2:
        return check_lens(valid_lens, queries.shape[0], queries.shape[-2], seqlen_k, queries.device)
    lens = as_tensor("valid_lens", valid_lens, queries.device)
    return check_lens(lens[None], 1, queries.shape[0], seqlen_k, queries.device)


def check_lens(
    valid_lens: ValidLens, batch: int, seqlen_q: int, seqlen_k: int, device: torch.device
) -> Tensor:
    """`valid_lens`, how many of the first keys are visible, as int [B] or [B, Lq] on a device.

    Raises:
        TypeError: they are no integers.
        ValueError: they have another shape; or, on CPU, are below 0 or beyond the keys.
    """
    lens = as_tensor("valid_lens", valid_lens, device)
    if lens.dtype == torch.bool:
        raise TypeError("valid_lens must be integers, got bool: a mask goes to mask=")
    if not is_integer(lens):
        raise TypeError(f"valid_lens must be integers, got {dtype_name(lens.dtype)}")
    if lens.shape not in ((batch,), (batch, seqlen_q)):
        want = f"[{batch}] or [{batch}, {seqlen_q}]"
        raise ValueError(f"valid_lens must be [B] or [B, Lq], here {want}, got shape {list(lens.shape)}")
    check_bounds("valid_lens", lens, seqlen_k, "number of keys")
    return lens


def check_bounds(name: str, values: Tensor, most: int, what: str) -> None:
    """Raise unless all values are from 0 to `most`, which is `what`; as far as they can be read here."""
    if values.numel() and has_values(values):
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high > most:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} must be from 0 to the {what}, {most}, got {wrong}")


def join_lens(mask: Mask | Tensor | None, lens: Tensor | None, queries: Tensor) -> Mask | Tensor | None:
    """`visible_keys` of lengths that are checked."""
    if mask is not None and not isinstance(mask, Mask | Tensor):
        raise not_a_mask("mask", mask)
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = attend), got {dtype_name(mask.dtype)}")
        if mask.dim() == 3 and queries.dim() == 4:
            mask = mask.unsqueeze(1)  # [B, Lq, Lk], the same for all heads
    if lens is None:
        return mask
    if mask is None:
        return padding(lens)
    if isinstance(mask, Tensor):
        mask = dense(mask.unsqueeze(1) if mask.dim() == 3 and queries.dim() == 3 else mask)
    return mask & padding(lens)


def check_ranks(ranks: tuple[int, ...], layout: str, **inputs: Any) -> None:
    """Raise unless all inputs are floating-point tensors of one rank, one of `ranks`.

    Args:
        layout: how they should look, for messages.
    """
    first = next(iter(inputs))
    for name, x in inputs.items():
        check_floating(name, x)
        if x.dim() not in ranks:
            raise ValueError(f"{name} must be {layout}, got shape {list(x.shape)}")
        if x.dim() != inputs[first].dim():
            want, got = inputs[first].dim(), list(x.shape)
            raise ValueError(f"{name} must be {want}-D like {first}, got shape {got}")
