"""The texts of tokens, and which of them a module's queries and keys are."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# One text a token; or such a list for each entry of the batch.
Texts = Sequence[str] | Sequence[Sequence[str]]
# The same for queries and keys; or by module, where a pair (a tuple) is of queries and keys.
Tokens = Texts | Mapping[str, "Texts | tuple[Texts, Texts]"]

# What encoder-decoders call the attention of the target to the source, and the source's to itself.
_CROSS = ("*cross_attn*", "*cross_attention*", "*multihead_attn*", "*encoder_attn*", "*EncDecAttention*")
_SOURCE = ("*encoder*",)

_Lists = list[list[str]]  # by entry; one list serves a whole batch


@dataclass(frozen=True)
class Labels:
    """Texts by pattern of module path; of several patterns that match, the first counts.

    Attributes:
        by_pattern: (pattern, texts of queries, texts of keys).
    """

    by_pattern: tuple[tuple[str, _Lists, _Lists], ...] = ()

    @staticmethod
    def of(tokens: Tokens | None, target_tokens: Tokens | None = None) -> Labels:
        """See `record`.

        Raises:
            TypeError: tokens that are no strings; target tokens without tokens, or beside a mapping.
        """
        if tokens is None:
            if target_tokens is not None:
                raise TypeError("target_tokens must come with tokens, which are the source's, got None")
            return Labels()
        if isinstance(tokens, Mapping):
            if target_tokens is not None:
                raise TypeError("target_tokens must be None where tokens are given by module")
            found = []
            for pattern, value in tokens.items():
                queries, keys = value if isinstance(value, tuple) else (value, value)
                name = f"tokens of {pattern!r}"
                found.append((str(pattern), _lists(name, queries), _lists(name, keys)))
            return Labels(tuple(found))
        source = _lists("tokens", tokens)
        if target_tokens is None:
            return Labels((("*", source, source),))
        target = _lists("target_tokens", target_tokens)
        cross = [(pattern, target, source) for pattern in _CROSS]
        own = [(pattern, source, source) for pattern in _SOURCE]
        return Labels((*cross, *own, ("*", target, target)))

    def names(self, path: str) -> bool:
        """Whether there are texts for a module."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern, *_ in self.by_pattern)

    def texts(
        self, path: str, entry: int, first_query: int, lengths: Mapping[int, tuple[int, int]]
    ) -> tuple[list[str], list[str]]:
        """Texts of an entry's queries from first_query on, and of its keys; positions where there are none.

        Args:
            path: of the module.
            entry: which entry of a batch, or sequence of a packed one.
            first_query: position of its first query.
            lengths: of the entry the position behind its last query and the number of its keys; of a packed
                batch those of every sequence.
        Raises:
            ValueError: fewer tokens than that, or so many that it is not clear whose they are.
        """
        of_queries = {number: stop for number, (stop, _) in lengths.items()}
        of_keys = {number: count for number, (_, count) in lengths.items()}
        for pattern, queries, keys in self.by_pattern:
            if fnmatch.fnmatchcase(path, pattern):
                rows = _texts_of(path, "queries", queries, entry, of_queries)[first_query:]
                return rows, _texts_of(path, "keys", keys, entry, of_keys)
        return [str(n) for n in range(first_query, of_queries[entry])], list(map(str, range(of_keys[entry])))


def kind_of(path: str) -> str:
    """Of an encoder-decoder's attention: "Cross", "Encoder" or "Decoder", as its module's name tells."""
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in _CROSS):
        return "Cross"
    return "Encoder" if any(fnmatch.fnmatchcase(path, pattern) for pattern in _SOURCE) else "Decoder"


def _texts_of(path: str, what: str, lists: _Lists, entry: int, counts: Mapping[int, int]) -> list[str]:
    """The first counts[entry] texts of an entry; rows of a batch that are shorter than its longest end in
    empty ones. One list may be that of all entries: then theirs lie one after the other."""
    count = counts[entry]
    if len(lists) == 1:
        texts, longest, total = lists[0], len(lists[0]), sum(counts.values())
        if len(counts) > 1 and longest == total:
            begin = sum(number for other, number in counts.items() if other < entry)
            return texts[begin : begin + count]
        if len(counts) > 1 and longest > max(counts.values()):
            raise ValueError(
                f"tokens of {path!r} must be a list for each of the {len(counts)} packed sequences, or one "
                f"list of all their {total} {what}, got one of {longest}"
            )
    elif entry < len(lists):
        texts, longest = lists[entry], max(map(len, lists))
    else:
        raise ValueError(f"tokens of {path!r} must be for more than {entry} entries, got {len(lists)}")
    if longest < count:
        raise ValueError(f"tokens of {path!r} must be at least the {count} {what} there are, got {longest}")
    return [*texts, *[""] * (count - len(texts))][:count]


def _lists(name: str, value: Any) -> _Lists:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of strings, got {type(value).__name__}: split it into tokens")
    if all(isinstance(item, str) for item in value):
        return [list(value)]
    lists = []
    for row in value:
        if isinstance(row, str) or not isinstance(row, Sequence) or not all(isinstance(t, str) for t in row):
            raise TypeError(f"{name} must be strings, or a list of them for each batch entry, got {row!r}")
        lists.append(list(row))
    return lists
