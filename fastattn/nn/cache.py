"""KVCache: the keys and values that a decoder has already seen."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.checks import check_bool, check_int


class KVCache:
    """Projected keys and values of one attention layer, [B, Hkv, capacity, D], grown by doubling.

    A decoder's self-attention appends the new tokens of each step; its cross-attention fills a static cache
    once, with the projected encoder output, and reads it ever after.

    >>> cache = KVCache()
    >>> keys, values = cache.append(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> cache.length, list(keys.shape)
    (3, [1, 2, 3, 4])

    Args:
        static: whether the first `append` is the only one.
        capacity: tokens to make room for at the first `append`, if more are to come.
    """

    def __init__(self, static: bool = False, *, capacity: int = 0) -> None:
        self.static = check_bool("static", static)
        self._reserved = check_int("capacity", capacity, 0)
        self.length = 0
        self._is_cut = False  # whether tokens were handed out from where the next ones come
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __repr__(self) -> str:
        kind = ", static" if self.static else ""
        return f"KVCache(length={self.length}{kind})"

    @property
    def is_filled(self) -> bool:
        """Whether anything was appended, if only no tokens."""
        return self._keys is not None

    @property
    def is_complete(self) -> bool:
        """Whether it takes in no more: a static cache that is filled."""
        return self.static and self.is_filled

    @property
    def capacity(self) -> int:
        """Tokens for which there is room."""
        return self._reserved if self._keys is None else self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, length, D], a view.

        Raises:
            ValueError: nothing was appended yet.
        """
        return self._filled(self._keys)

    @property
    def values(self) -> Tensor:
        """[B, Hkv, length, Dv], a view; raises as `keys` does."""
        return self._filled(self._values)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in n more tokens; returns the keys and values of all tokens, as views.

        What was returned before keeps its values. Where autograd records, each call makes new tensors.

        Args:
            keys: [B, Hkv, n, D].
            values: [B, Hkv, n, Dv], of the same dtype and device.
        Raises:
            ValueError: shapes, dtypes or devices that do not fit each other or what the cache holds; a
                static cache that is full.
        """
        if self._has_room(keys, values):
            return self._written(keys, values)
        self._check(keys, values)
        if self.static:
            self._keys, self._values, self.length = keys, values, keys.shape[2]
            return keys, values
        begin, self.length = self.length, self.length + keys.shape[2]
        self._keys = _grown(self._keys, keys, begin, self._reserved, self._is_cut)
        self._values = _grown(self._values, values, begin, self._reserved, self._is_cut)
        self._is_cut = False
        return self.keys, self.values

    def _has_room(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these fit what is held and go where nobody has looked: what most steps of decoding do."""
        held, other = self._keys, self._values
        if held is None or other is None or self.static or self._is_cut or torch.is_grad_enabled():
            return False
        if keys.dim() != 4 or values.dim() != 4:
            return False
        batch, heads, room, dim = held.shape
        new = keys.shape[2]
        return (
            self.length + new <= room
            and keys.shape == (batch, heads, new, dim)
            and values.shape == (batch, heads, new, other.shape[3])
            and keys.dtype is held.dtype
            and values.dtype is other.dtype
            and keys.device == held.device == values.device
            and held.is_inference() == keys.is_inference()
        )

    def _written(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`append` in place."""
        begin, new = self.length, keys.shape[2]
        self.length = end = begin + new
        views = []
        for held, tokens in ((self._keys, keys), (self._values, values)):
            held.narrow(2, begin, new).copy_(tokens)  # type: ignore[union-attr]
            views.append(held.narrow(2, 0, end))  # type: ignore[union-attr]
        return views[0], views[1]

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`.

        Raises:
            ValueError: more than there are.
        """
        if check_int("length", length, 0) > self.length:
            raise ValueError(f"length must be at most the {self.length} tokens held, got {length}")
        self._is_cut |= length < self.length
        self.length = length

    def reorder(self, index: Tensor) -> None:
        """Let batch entry index[b] take the place of entry b, as beam search does with its survivors.

        Args:
            index: int64 [B'], entries of the present batch; B' may differ from B.
        """
        if self._keys is not None and self._values is not None:
            self._keys, self._values = (
                _chosen(held, index, self.length) for held in (self._keys, self._values)
            )
            self._is_cut = False

    def _filled(self, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise ValueError("the cache is empty: append keys and values first")
        return tensor[:, :, : self.length]

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if self.is_complete:
            raise ValueError(f"a static cache is filled once, and this one holds {self.length} tokens")
        for name, tensor in (("keys", keys), ("values", values)):
            if tensor.dim() != 4:
                raise ValueError(f"{name} must be 4-D [B, Hkv, n, D], got shape {list(tensor.shape)}")
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"values must be [{_leading(keys)}, Dv] like keys, got {list(values.shape)}")
        for name, tensor, held in (("keys", keys, self._keys), ("values", values, self._values)):
            if held is None:
                continue
            b, h, _, d = held.shape
            if tensor.shape[:2] != (b, h) or tensor.shape[3] != d:
                raise ValueError(f"{name} must be [{b}, {h}, n, {d}] as before, got {list(tensor.shape)}")
            if tensor.dtype != held.dtype or tensor.device != held.device:
                want, got = f"{held.dtype} on {held.device}", f"{tensor.dtype} on {tensor.device}"
                raise ValueError(f"{name} must be {want} as before, got {got}")


def _leading(tensor: Tensor) -> str:
    return ", ".join(map(str, tensor.shape[:3]))


def _chosen(held: Tensor, index: Tensor, length: int) -> Tensor:
    """Entries `index` of `held`, of which only `length` tokens are copied; as much room as before."""
    tokens = held[:, :, :length]
    if torch.is_grad_enabled():
        return tokens.index_select(0, index)
    found = held.new_empty(index.shape[0], *held.shape[1:])
    torch.index_select(tokens, 0, index, out=found[:, :, :length])
    return found


def _grown(held: Tensor | None, new: Tensor, begin: int, reserved: int, is_cut: bool) -> Tensor:
    """`held` with `new` at positions begin and on: in place, where there is room that nobody has seen.

    Where autograd records it is a new tensor each time, even if keys need no gradient: that of the queries
    needs the keys as they were.
    """
    end = begin + new.shape[2]
    if torch.is_grad_enabled():
        return new if held is None else torch.cat((held[:, :, :begin], new), 2)
    is_other = held is not None and held.is_inference() != new.is_inference()
    if held is None or held.shape[2] < end or is_cut or is_other:
        batch, heads, _, dim = new.shape
        wider = new.new_empty(batch, heads, max(end, 2 * begin, reserved), dim)
        if held is not None:
            wider[:, :, :begin] = held[:, :, :begin]
        held = wider
    held[:, :, begin:end] = new
    return held
