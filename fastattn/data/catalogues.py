"""English messages and their Chinese translations, from gettext catalogues (.mo) on this machine."""

from __future__ import annotations

import gettext
import importlib.util
import re
import struct
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

# Of the standard library's gettext: stripped images have no such folder, macOS has Homebrew's.
LOCALE_FOLDERS = (
    Path("/usr/share/locale"),
    Path("/usr/share/locale-langpack"),
    Path("/usr/local/share/locale"),
    Path("/opt/homebrew/share/locale"),
    Path(sys.prefix, "share/locale"),
)
# The names that simplified Chinese has had as a locale; the territory came first.
_CHINESE = ("zh_CN", "zh_Hans")
# A message's context, if it has one, stands before this in the catalogue's key.
_CONTEXT_END = "\x04"

_HAN = re.compile(r"[\u4e00-\u9fff]")
# Placeholders, markup, escapes, addresses and options: code rather than language.
_CODE = re.compile(r"[%\\{}<>$|=@#~^*`]|://|(?:^|\s)-\w|--|__|\w_\w|\w\(\)")
# "_File" and "&File" mark the key that chooses a menu's entry; Chinese has it behind: "文件(_F)".
_ACCELERATOR = re.compile(r"(?:^|\W)[_&]\w|\w[_&]\w|[(（][_&]?\w[)）]$")
_TRAILING = " .:;,!…。：；，！"


def catalogue_files(folder: Path) -> Iterator[Path]:
    """The catalogues of simplified Chinese in a locale folder, by name.

    Those of the iso-codes package are left out: names of languages and places, of which one says nothing
    about the next.
    """
    for locale in _CHINESE:
        for path in sorted((folder / locale / "LC_MESSAGES").glob("*.mo")):
            if not path.name.startswith("iso"):
                yield path


def package_locale_folders(package: str) -> list[Path]:
    """Locale folders inside an installed Python package, which is not imported; [] where it is absent."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(spec.submodule_search_locations[0])
    return sorted({path.parents[2] for path in root.rglob("*.mo") if path.parents[1].name in _CHINESE})


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """(English, Chinese) of each message in a catalogue, as they stand there; none where it is unreadable."""
    try:
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)
    except (OSError, ValueError, IndexError, struct.error):  # ValueError: a wrong encoding or plural rule
        return
    # There is no public way to list a catalogue. A message with a plural has the key (English, form).
    for key, chinese in catalogue._catalog.items():  # type: ignore[attr-defined]
        english = key[0] if isinstance(key, tuple) else key
        yield english.rpartition(_CONTEXT_END)[2], chinese


def clean(english: str, chinese: str) -> tuple[str, str] | None:
    """The pair without final punctuation and superfluous blanks, or None where it is not plain language.

    >>> clean("No password file.", "没有密码文件。")
    ('No password file', '没有密码文件')
    >>> clean("_File", "文件(_F)") is None
    True
    """
    if "\n" in english.strip() or "\n" in chinese.strip() or not english.isascii():
        return None
    # Full-width Latin letters and digits become ASCII; Chinese punctuation stays as it is.
    chinese = "".join(unicodedata.normalize("NFKC", c) if c.isalnum() else c for c in chinese)
    english, chinese = (" ".join(text.split()).strip(_TRAILING) for text in (english, chinese))
    if any(pattern.search(text) for pattern in (_CODE, _ACCELERATOR) for text in (english, chinese)):
        return None
    letters = sum(character.isalpha() for character in english)
    han = len(_HAN.findall(chinese))
    # Half of each side must be its own language; a name that both share ("PNG image") may stand in it.
    if not letters or not han or 2 * letters < len(english) or 2 * han < len(chinese.replace(" ", "")):
        return None
    return english, chinese
