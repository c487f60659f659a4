"""Tables in the docs of what was tried, with which versions: written by the tests, and held to by them.

`FASTATTN_WRITE_TABLES=1 pytest tests/test_timm.py` writes; without it, a row that the page lacks fails, where
the page was written with the versions that are installed.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs" / "integrations"
BEGIN, END = "<!-- written by the tests: begin -->", "<!-- end -->"


def tried(page: str, package: str, *cells: str) -> None:
    """State a row of a page's table; its first cell is the key.

    Args:
        page: docs/integrations/<page>.md, whose table stands between BEGIN and END and has its header there.
        package: whose version the table is for.
        cells: of the row, as Markdown.
    """
    path = DOCS / f"{page}.md"
    text = path.read_text()
    head, _, rest = text.partition(BEGIN)
    table, _, tail = rest.partition(END)
    lines = table.strip().splitlines()
    row = f"| {' | '.join(cells)} |"
    versions = f"Tried with {package} {version(package)} and torch {version('torch').partition('+')[0]}."
    if os.environ.get("FASTATTN_WRITE_TABLES"):
        header, rows = lines[2:4], [line for line in lines[4:] if not line.startswith(f"| {cells[0]} |")]
        lines = [versions, "", *header, *sorted([*rows, row], key=str.lower)]
        path.write_text("\n".join((head + BEGIN, *lines, END + tail)))
    elif lines[0] == versions:
        assert row in lines, f"{path.name} lacks this row; write it with FASTATTN_WRITE_TABLES=1: {row}"
