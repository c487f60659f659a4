"""MaskTensor: a mask that passes for the bool tensor that models expect, without its memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.masks import Mask
from fastattn.masks.space import MaskShape, Pairs

_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_aten = torch.ops.aten
_ADDITIONS = (_aten.add.Tensor, _aten.add_.Tensor)
_EXTENSIONS = (_aten.cat.default, _aten.constant_pad_nd.default)
_FILLS = (
    *(_aten.masked_fill.Scalar, _aten.masked_fill.Tensor),
    *(_aten.masked_fill_.Scalar, _aten.masked_fill_.Tensor),
)


class MaskTensor(Tensor):
    """A bool tensor [B, 1, Lq, Lk] of which only the mask exists that says what is in it.

    Models hand their mask on from layer to layer, which costs nothing. What reads the tensor itself (slices
    it, inverts it) gets what it reads built at that moment, True = visible. Nothing can be written into it.
    """

    mask: Mask

    @staticmethod
    def __new__(cls, mask: Mask, shape: MaskShape, device: torch.device) -> MaskTensor:
        size = (shape.batch, 1, shape.seqlen_q, shape.seqlen_k)
        self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=torch.bool, device=device)
        self.mask = mask
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _MOVES and not kwargs.keys() - {"device", "non_blocking"}:
            return args[0].moved(kwargs.get("device"))
        if func is torch.ops.aten.slice.Tensor and not kwargs:
            return args[0].sliced(*args[1:])
        if func in _ADDITIONS or (func in _FILLS and isinstance(args[1], MaskTensor)):
            # Who adds a mask expects 0 and -inf, who fills by one True = hidden: the result would be another.
            raise NotImplementedError(
                "a layer puts attention_mask into its scores itself, not through the attention function: its "
                "model is not on transformers' attention interface; attn_implementation must be 'eager'"
            )
        if func in _EXTENSIONS:
            # What a layer adds there were numbers, 0 = visible: as bools they mean the opposite.
            raise NotImplementedError(
                "a layer extends attention_mask for keys of its own, and whether 0 or True is visible there "
                "cannot be told: attn_implementation must be 'eager'; code of your own may extend "
                "mask.to_dense()"
            )
        if _writes_into_a_mask(func, args, kwargs):
            raise _read_only(func)
        args, kwargs = pytree.tree_map_only(MaskTensor, MaskTensor.to_dense, (args, kwargs))
        return func(*args, **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _read_only("mask[...] = ...")

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskTensor:
        result = MaskTensor(copy.deepcopy(self.mask, memo), self._space(), self.device)
        memo[id(self)] = result
        return result

    def numpy(self, *, force: bool = False) -> Any:
        """The tensor itself as an array, which cannot be written either."""
        array = self.to_dense().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self.to_dense().tolist()

    def share_memory_(self) -> Any:
        raise NotImplementedError(
            "a mask of fastattn has no memory to share: share its tensor, mask.to_dense().share_memory_()"
        )

    def moved(self, device: torch.device | None) -> MaskTensor:
        """The same mask on another device."""
        if device is None or device == self.device:
            return MaskTensor(self.mask, self._space(), self.device)
        return MaskTensor(self.mask.to(device), self._space(), device)

    def sliced(self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
        """self[..., start:end:step, ...], of which only the part asked for is built."""
        chosen = [torch.arange(size, device=self.device) for size in self.shape]
        chosen[dim] = chosen[dim][start:end:step]
        if len(chosen[dim]) == self.shape[dim]:
            return self.moved(None)
        return self._at(*chosen)

    def to_dense(self) -> Tensor:  # type: ignore[override]
        """The tensor itself."""
        return self._at(*(torch.arange(size, device=self.device) for size in self.shape))

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """bool [len(b), len(h), len(i), len(j)]."""
        space = self._space()
        self.mask._check(space, self.device)
        at = Pairs(space, b[:, None, None, None], h[:, None, None], i[:, None], j)
        visible = self.mask._visible(at)
        return visible.expand(len(b), len(h), len(i), len(j)).contiguous()

    def _space(self) -> MaskShape:
        batch, heads, seqlen_q, seqlen_k = self.shape
        return MaskShape(batch, heads, seqlen_q, seqlen_k)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"MaskTensor({self.mask!r}, shape={list(self.shape)})"


def _writes_into_a_mask(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a MaskTensor is among the arguments that an operation changes."""
    if not func._schema.is_mutable:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            if any(isinstance(leaf, MaskTensor) for leaf in pytree.tree_leaves(given)):
                return True
    return False


def _read_only(what: Any) -> NotImplementedError:
    return NotImplementedError(
        f"a mask of fastattn cannot be written in place, got {what}: make another (mask = mask & other), "
        "or write into its tensor, mask.to_dense()"
    )
