"""Where in its sequence a call's queries and keys stand: what caches tell, and what a call's lengths tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastattn.call import Call
from fastattn.inspect.tokens import kind_of
from fastattn.masks import as_mask
from fastattn.masks.band import Band
from fastattn.masks.compose import AndMask
from fastattn.models.cache import DecoderCache, LayerCache
from fastattn.nn.cache import KVCache

_FOREIGN = ("past_key_values", "past_key_value", "layer_past")  # arguments of transformers' modules


class Position(NamedTuple):
    """Positions of a call's first query and first key; a sliding cache has forgotten the keys before."""

    first_query: int
    first_key: int = 0


@dataclass
class Frame:
    """One module while it runs.

    Attributes:
        path: of the module.
        first_query: position of the first query in the calls within, as a cache told; None where none did.
        slides: whether the cache forgets keys.
        seen: caches that modules right within were given: what each held at first, and by which modules.
            A layer adds to its cache, and those after it shall not count what it added.
    """

    path: str
    first_query: int | None
    slides: bool = False
    seen: dict[int, tuple[int, set[nn.Module]]] = field(default_factory=dict)


def entered(module: nn.Module, path: str, kwargs: dict[str, Any], outer: Frame | None) -> Frame:
    """The frame of a module that is called with these arguments by the one in the outer frame."""
    first = _held(kwargs.get("cache"))
    if first is None and outer is not None:
        first = outer.first_query
    frame = Frame(path, first, outer is not None and outer.slides)
    cache = next((kwargs[name] for name in _FOREIGN if kwargs.get(name) is not None), None)
    if hasattr(cache, "get_seq_length"):
        frame.slides = _slides(cache, getattr(module, "layer_idx", None))
        if first is None:
            frame.first_query = _first_sight(module, cache, outer)
    elif first is None:
        frame.first_query = _first_of(kwargs.get("cache_position"))
    return frame


def _held(cache: Any) -> int | None:
    """How many tokens of the query's own sequence one of fastattn's caches holds."""
    if isinstance(cache, LayerCache):
        return cache.self_attn.length
    if isinstance(cache, DecoderCache) or (isinstance(cache, KVCache) and not cache.static):
        return cache.length
    return None


def _first_sight(module: nn.Module, cache: Any, outer: Frame | None) -> int | None:
    """How many tokens a cache of transformers held when this pass over the modules began."""
    if outer is not None and id(cache) in outer.seen:
        length, modules = outer.seen[id(cache)]
        if module not in modules:
            modules.add(module)
            return length
    layer = getattr(module, "layer_idx", None)
    try:
        length = int(cache.get_seq_length(layer or 0))
    except (ValueError, TypeError, NotImplementedError):  # of layers that keep a state, not tokens
        return None
    if outer is not None:
        outer.seen[id(cache)] = (length, {module})
    return length


def _slides(cache: Any, layer: Any) -> bool:
    """Whether a layer of a cache of transformers keeps only its last tokens."""
    kinds = getattr(cache, "is_sliding", ())
    return isinstance(kinds, list) and isinstance(layer, int) and layer < len(kinds) and bool(kinds[layer])


def _first_of(positions: Any) -> int | None:
    if isinstance(positions, Tensor) and positions.dim() == 1 and positions.numel():
        return int(positions[0])
    return None


class Growth:
    """Finds the position of calls of which no cache told: keys that a model puts together itself."""

    def __init__(self) -> None:
        # By path: lengths of queries and keys of the last call, where its queries stood at the keys' end.
        self._last: dict[str, tuple[int, int]] = {}

    def position(self, frame: Frame, call: Call) -> Position:
        """Of a call within a frame.

        In self-attention with more keys than queries these are the last. That it is self-attention is known
        by a causal mask about the last key, or by keys that grew by the queries since the call before.
        """
        seqlen_q, seqlen_k = call.seqlens()
        is_cross = kind_of(frame.path) == "Cross"
        if frame.first_query is not None:
            first = frame.first_query
            forgotten = first + seqlen_q - seqlen_k if frame.slides and not is_cross else 0
            return Position(first, max(0, forgotten))
        if call.op != "attention" or is_cross or seqlen_k < seqlen_q:
            return Position(0)
        last = self._last.pop(frame.path, None)
        grew = last is not None and (seqlen_k == last[1] + seqlen_q or (seqlen_q, seqlen_k) == last)
        if seqlen_q == seqlen_k or grew or _is_causal_at_end(call.mask):
            self._last[frame.path] = seqlen_q, seqlen_k
            return Position(seqlen_k - seqlen_q)
        return Position(0)


def _is_causal_at_end(mask: Any) -> bool:
    if mask is None or isinstance(mask, Tensor):
        return False
    mask = as_mask(mask)
    parts = mask.masks if isinstance(mask, AndMask) else (mask,)
    return any(isinstance(part, Band) and part.align == "bottom_right" and part.hi == 0 for part in parts)
