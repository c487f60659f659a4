"""knockout: what a model does without some of its heads, or of its links between tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastattn import watch
from fastattn.call import Call
from fastattn.checks import check_int
from fastattn.inspect.modules import NOT_SEEN, RunningModules, check_patterns
from fastattn.inspect.positions import Position
from fastattn.masks import Mask, as_mask, dense, links, predicate

Edge = tuple[int, int]
Heads = Mapping[str, "Sequence[int] | int"]


@contextmanager
def knockout(
    model: nn.Module, heads: Heads | None = None, edges: Sequence[Edge] | Mapping[str, Sequence[Edge]] = ()
) -> Iterator[None]:
    """While it holds, the model runs without these heads and these links: their pairs are masked.

    What remains of a row is renormalised by its softmax, as for any mask. A head that is removed gives 0, and
    returned weights and records show what remains. Blocks nest, and hold in the thread that entered them; the
    model itself is not changed. Gradients are those of the changed model: with activation checkpointing, run
    backward inside the block.

    >>> layer = fastattn.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(1, 3, 8)
    >>> with knockout(layer, heads={"": [0]}, edges=[(2, 1)]):
    ...     _, weights = layer(x, average_attn_weights=False)
    >>> weights[0, 0].sum().item(), weights[0, 1, 2, 1].item()
    (0.0, 0.0)

    Args:
        model: whose forward makes attention calls, by fastattn's modules, functions or `override_sdpa`.
        heads: for each module the numbers of its query heads. A module is named by its path ("" the model
            itself), by that of a module around it, or by a glob: {"encoder.layers.0.self_attn": [1, 3]},
            {"*.cross_attn": [0]}.
        edges: (query, key) pairs of token positions that do not see each other, in every head and batch entry
            of every call; or such pairs for each module, named likewise. Queries count from the first token
            that a cache saw (also one of transformers), so that a link is the same in training and in
            decoding token by token. Without a cache they count from the call's first row, but in a causal
            call with more keys than queries (and where keys grow call by call) the last query stands at the
            last key.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got; a head that a call does not
            have raises when that call is made.
        NotImplementedError: heads of a module with add_bias_kv, whose learned key every head sees.
        RuntimeError: the block is within a function that torch.compile compiles.
    """
    running = RunningModules(model)
    removal = _Removal(running, _checked_heads(heads), _checked_edges(edges))
    if not removal.heads and not removal.edges:
        raise ValueError("heads or edges must name something to remove, got neither")
    paths = running.all_names()
    check_patterns("heads", removal.heads, paths)
    check_patterns("edges", removal.edges, paths)
    for module, path in running.names.items():
        if getattr(module, "bias_k", None) is not None and removal.heads_of(path):
            raise NotImplementedError(
                f"heads must be of modules without add_bias_kv, whose learned key stays visible, got {path!r}"
            )
    with running.followed(), watch.watching(removal):
        yield
    for argument, pattern in removal.unused():
        warnings.warn(
            f"knockout's {argument} of {pattern!r} removed nothing: no attention call of fastattn's ran "
            f"there ({NOT_SEEN})",
            stacklevel=3,
        )
    for pattern, outside in removal.outside():
        warnings.warn(
            f"knockout's edges {outside} of {pattern!r} removed nothing: every call there was too short to "
            "have them",
            stacklevel=3,
        )


class _Removal:
    """The observer: takes pairs out of each call's mask."""

    def __init__(
        self,
        running: RunningModules,
        heads: dict[str, tuple[int, ...]],
        edges: dict[str, tuple[Edge, ...]],
    ) -> None:
        self.running, self.heads, self.edges = running, heads, edges
        self._used: set[tuple[str, str]] = set()
        self._inside: dict[str, set[Edge]] = {pattern: set() for pattern in edges}
        # Masks are compared by the tensors they hold: one mask for equal calls keeps built block lists valid.
        self._masks: dict[tuple[object, ...], Mask] = {}

    def heads_of(self, path: str) -> tuple[int, ...]:
        """The heads to remove in the module at a path."""
        return tuple(
            sorted(
                {h for pattern, hs in self.heads.items() if self.running.is_match(path, pattern) for h in hs}
            )
        )

    def unused(self) -> list[tuple[str, str]]:
        """The arguments and patterns that no call ran under."""
        asked = [("heads", pattern) for pattern in self.heads] + [
            ("edges", pattern) for pattern in self.edges
        ]
        return [each for each in asked if each not in self._used]

    def outside(self) -> list[tuple[str, list[Edge]]]:
        """The edges that no call was long enough for, by those patterns under which calls ran."""
        left = {
            pattern: [edge for edge in edges if edge not in self._inside[pattern]]
            for pattern, edges in self.edges.items()
            if ("edges", pattern) in self._used
        }
        return [(pattern, edges) for pattern, edges in left.items() if edges]

    def note(self, call: Call, lse: Tensor | None) -> None:
        """Nothing to note."""

    def change(self, call: Call) -> Call:
        path = self.running.path()
        if path is None:
            return call
        for argument, patterns in (("heads", self.heads), ("edges", self.edges)):
            self._used |= {
                (argument, pattern) for pattern in patterns if self.running.is_match(path, pattern)
            }
        masks = [] if call.mask is None else [as_mask(call.mask)]
        if heads := self.heads_of(path):
            masks.append(self._without_heads(call, path, heads))
        if (edges := self._without_edges(call, path)) is not None:
            masks.append(edges)
        if not masks:
            return call
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        return replace(call, mask=mask)

    def _without_heads(self, call: Call, path: str, heads: tuple[int, ...]) -> Mask:
        count = call.num_heads()
        if heads[-1] >= count:
            raise ValueError(f"heads of {path!r} must be from 0 to {count - 1}, got {heads[-1]}")
        key = (heads, count, call.q.device, call.op == "varlen")
        if key not in self._masks:
            kept = torch.ones(count, dtype=torch.bool, device=call.q.device)
            kept[list(heads)] = False
            # Kernels read a bool tensor as it is, but for packed sequences they take none.
            is_packed = call.op == "varlen"
            self._masks[key] = (
                predicate(lambda b, h, i, j: kept[h]) if is_packed else dense(kept[:, None, None])
            )
        return self._masks[key]

    def _without_edges(self, call: Call, path: str) -> Mask | None:
        patterns = [pattern for pattern in self.edges if self.running.is_match(path, pattern)]
        if not patterns:
            return None
        at = self.running.position(call)
        self._note_inside(call, patterns, at)
        edges = [edge for pattern in patterns for edge in self.edges[pattern]]
        if call.op == "decode":  # whose rows stand at the end of each cache
            return ~links(edges, align="bottom_right")
        here = [(query - at.first_query, key - at.first_key) for query, key in edges]
        return ~links([edge for edge in here if min(edge) >= 0], align="top_left")

    def _note_inside(self, call: Call, patterns: list[str], at: Position) -> None:
        """Remember which of the edges are pairs of this call, that of its longest sequence."""
        if all(len(self._inside[pattern]) == len(set(self.edges[pattern])) for pattern in patterns):
            return
        seqlen_q, seqlen_k = call.seqlens()
        starts = [at]
        if call.lengths is not None:
            starts = [Position(max(0, length - seqlen_q)) for length in call.lengths.tolist()]
        for pattern in patterns:
            self._inside[pattern] |= {
                (query, key)
                for query, key in self.edges[pattern]
                for first_query, first_key in starts
                if 0 <= query - first_query < seqlen_q and 0 <= key - first_key < seqlen_k
            }


def _checked_heads(heads: Heads | None) -> dict[str, tuple[int, ...]]:
    if heads is None:
        return {}
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads must map module names to head numbers, got {type(heads).__name__}")
    found = {}
    for pattern, numbers in heads.items():
        items = numbers if isinstance(numbers, Sequence) else [numbers]
        if not items:
            raise ValueError(f"heads of {pattern!r} must have at least one number, got none")
        found[pattern] = tuple(check_int(f"heads of {pattern!r}", item, 0) for item in items)
    return found


def _checked_edges(edges: Sequence[Edge] | Mapping[str, Sequence[Edge]]) -> dict[str, tuple[Edge, ...]]:
    named = edges if isinstance(edges, Mapping) else {"": edges}
    found = {}
    for pattern, pairs in named.items():
        if not isinstance(pairs, Sequence) or isinstance(pairs, str):
            raise TypeError(f"edges must be (query, key) pairs, or such pairs by module, got {pairs!r}")
        if not pairs and isinstance(edges, Mapping):
            raise ValueError(f"edges of {pattern!r} must have at least one (query, key) pair, got none")
        for pair in pairs:
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"edges must be (query, key) pairs, got {pair!r}")
        found[pattern] = tuple(
            (check_int("edges' query", q, 0), check_int("edges' key", k, 0)) for q, k in pairs
        )
    return {pattern: pairs for pattern, pairs in found.items() if pairs}
