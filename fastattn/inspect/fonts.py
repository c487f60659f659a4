"""Fonts that can write a text, whatever its script."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path

# Tried first, for they are made for reading on screens; after them come all other fonts of the machine.
_PREFERRED = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Noto Sans CJK JP",
    "Droid Sans Fallback",
)
# A PyPI package that ships Noto Sans SC; not imported, for it would change matplotlib's settings.
_PACKAGE, _PACKAGE_FONT = "zhplot", "fonts/NotoSansSC-Regular.ttf"


def families_for(texts: Iterable[str]) -> list[str]:
    """The font families to give to matplotlib so that every character of the texts is drawn.

    Args:
        texts: labels in any scripts.

    Returns:
        matplotlib's own families (`rcParams["font.family"]`), then those that write what they lack. Where no
        font here has a character, a warning says so, once for each set of such characters.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import font_manager, rcParams

    own = list(rcParams["font.family"])
    characters = {character for text in texts for character in text if not character.isspace()}
    missing = characters - _characters(font_manager.findfont(font_manager.FontProperties(family=own)))
    return own + list(_fallbacks("".join(sorted(missing)))) if missing else own


@functools.lru_cache(maxsize=64)
def _fallbacks(missing: str) -> tuple[str, ...]:
    """Families that have these characters between them, each with as many as possible of what is left."""
    left = set(missing)
    found = []
    for family, path in _candidates():
        has = left & _characters(path)
        if has:
            found.append(family)
            left -= has
        if not left:
            return tuple(found)
    warnings.warn(
        f"no font on this machine has {''.join(sorted(left))[:40]!r}: boxes will stand in their places. "
        "For Chinese run: pip install 'fastattn[viz]' (or install a system font: apt install fonts-noto-cjk)",
        stacklevel=3,
    )
    return tuple(found)


@functools.lru_cache(maxsize=1)
def _candidates() -> tuple[tuple[str, str], ...]:
    """(family, file) of every upright font of normal weight, preferred ones first."""
    from matplotlib import font_manager

    if bundled := _package_font():
        font_manager.fontManager.addfont(bundled)
    rank = {name: place for place, name in enumerate(_PREFERRED)}
    fonts = {
        font.name: font.fname
        for font in font_manager.fontManager.ttflist
        if font.style == "normal"
        and font.weight in (400, "normal", "regular", "book")
        and not font.name.startswith("Last Resort")  # matplotlib's own: a box for every character there is
    }
    return tuple(sorted(fonts.items(), key=lambda font: (rank.get(font[0], len(rank)), font[0])))


def _package_font() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / _PACKAGE_FONT
    return path if path.is_file() else None


@functools.lru_cache(maxsize=256)
def _characters(path: str) -> frozenset[str]:
    """Every character that the font file has."""
    from matplotlib import ft2font

    try:
        return frozenset(map(chr, ft2font.FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):  # a font that FreeType cannot read
        return frozenset()
