"""Writes gettext catalogues for tests; the format is in gettext's manual, "The Format of GNU MO Files"."""

from __future__ import annotations

import struct
from pathlib import Path

HEADER = "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=1; plural=0;\n"


def write_mo(path: Path, messages: dict[str, str]) -> None:
    """A catalogue of these messages; contexts and plurals stand in the keys as the format has them."""
    texts = sorted({"": HEADER, **messages}.items())
    count = len(texts)
    strings, tables = b"", []
    start = 28 + 16 * count  # after the header and the two tables of (length, offset)
    for column in (0, 1):
        for pair in texts:
            data = pair[column].encode()
            tables.append(struct.pack("<II", len(data), start + len(strings)))
            strings += data + b"\0"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 28 + 16 * count)
    path.write_bytes(header + b"".join(tables) + strings)
