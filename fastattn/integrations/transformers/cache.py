"""FastCache: the keys and values of `generate`, appended in place."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fastattn.checks import check_int
from fastattn.nn.cache import KVCache


class FastCache(DynamicCache):
    """transformers' DynamicCache, but a new token costs its own size, not a copy of all that went before.

    Layers of full and of sliding attention are contiguous buffers [B, Hkv, capacity, D] that grow by
    doubling; those of other kinds (linear attention ...) are transformers' own.

    Args:
        config: of the model, which tells the kind of each layer; None: all are of full attention.
        capacity: tokens to make room for at once, where it is known how many will come.

    Raises:
        TypeError, ValueError: capacity is no int, or negative.

    Example: `model.generate(**inputs, past_key_values=FastCache(config=model.config))`. For an
    encoder-decoder, `EncoderDecoderCache(FastCache(), FastCache())`.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig | None = None, *, capacity: int = 0) -> None:
        check_int("capacity", capacity, 0)
        super().__init__(config=config)
        if self.layers:
            self.layers = [_fast(layer, capacity) for layer in self.layers]
        else:
            self.layer_class_to_replicate: Any = functools.partial(FastLayer, capacity)


def _fast(layer: Any, capacity: int) -> Any:
    if type(layer) is DynamicLayer:
        return FastLayer(capacity)
    return FastSlidingLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer


def _from(tokens: Tensor, begin: int) -> Tensor:
    return tokens.narrow(2, begin, tokens.shape[2] - begin) if begin else tokens


class _InPlace(DynamicLayer):
    """A layer whose `keys` and `values` are views of the last tokens of a KVCache."""

    keys: Tensor  # None only before there is anything to read
    values: Tensor
    cache: KVCache
    first = 0  # token of the KVCache at which the views begin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._append(key_states[:, :, :0], value_states[:, :, :0])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._choose(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._choose(torch.arange(self.keys.shape[0])[indices.cpu()])

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)
        self._view()

    def _choose(self, index: Tensor) -> None:
        """Let batch entry index[b] take the place of entry b."""
        if self.is_initialized:
            self.cache.reorder(index.to(self.keys.device))
            self._view()

    def _view(self) -> None:
        self.keys, self.values = self.cache.keys[:, :, self.first :], self.cache.values[:, :, self.first :]


class FastLayer(_InPlace):
    """Keys and values of a layer of full attention."""

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.cache = KVCache(capacity=capacity)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys [B, Hkv, L, D] and values [B, Hkv, L, Dv], the new ones at the end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self.cache.append(key_states, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        self.is_initialized = False  # else older versions keep the tokens, as zeros
        super().reset()
        self.cache = KVCache(capacity=self.capacity)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self.cache.truncate(self.keys.shape[2])


class FastSlidingLayer(_InPlace, DynamicSlidingWindowLayer):
    """Keys and values of the last sliding_window - 1 tokens, which move to a new buffer when theirs is full.

    A buffer holds two windows, so that a token moves once for each window of new ones.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.cache = KVCache(capacity=2 * sliding_window)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of the window before the new tokens, and of these."""
        if self.record_past:  # cropped at will: transformers' own layer knows how
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        if self.first and self.cache.length + key_states.shape[2] > self.cache.capacity:
            self._restart(self.keys, self.values)
        keys, values = self.cache.append(key_states, value_states)
        begin, self.first = self.first, max(0, self.cache.length - (self.sliding_window - 1))
        self.keys, self.values = _from(keys, self.first), _from(values, self.first)
        return _from(keys, begin), _from(values, begin)

    def reset(self) -> None:
        self.is_initialized = False  # else older versions keep the tokens, as zeros
        super().reset()
        self.cache, self.first = KVCache(capacity=2 * self.sliding_window), 0

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self._restart(self.keys, self.values)

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        if self.is_initialized:
            # From here on the tensors are concatenated, so they may as well be whole.
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def _choose(self, index: Tensor) -> None:
        if not self.record_past:
            super()._choose(index)
        elif self.is_initialized:  # tokens that the buffer does not hold
            index = index.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

    def _restart(self, keys: Tensor, values: Tensor) -> None:
        """A fresh buffer that holds these tokens alone."""
        self.cache, self.first = KVCache(capacity=2 * self.sliding_window), 0
        self._append(keys, values)
