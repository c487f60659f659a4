"""Write what `python -m fastattn bench --transformers` measured into docs/integrations/transformers.md.

python scripts/transformers_measured.py fastattn-bench/transformers.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from docs_page import with_table

PAGE = Path(__file__).parent.parent / "docs" / "integrations" / "transformers.md"
BEGIN = "<!-- written by scripts/transformers_measured.py -->"
END = "<!-- measured: end -->"
NAMES = ("fastattn", "sdpa", "eager", "free")


def table(report: dict[str, Any]) -> str:
    """The table in Markdown, a line for each work, below the machine that it is of.

    Args:
        report: the contents of transformers.json.
    """
    machine, rows = report["machine"], report["rows"]
    lines = [
        f"On {report['threads']} threads of {machine['cpu']} ({machine['isa']}), torch {machine['torch']}, "
        f"transformers {machine['transformers']}; others' time over fastattn's, with its 95% interval:",
        "",
        "| work | fastattn | sdpa | eager | free attention |",
        "|---|---|---|---|---|",
    ]
    for work in dict.fromkeys(row["work"] for row in rows):
        cells = {row["attention"]: _cell(row) for row in rows if row["work"] == work}
        lines.append(f"| {work} | {' | '.join(cells.get(name, '') for name in NAMES)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in report["goals"])])


def _cell(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        text = f"{row['seconds']:.3g} s"
    else:
        interval = row["ratio_interval"]
        spread = "once" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"
        text = f"{row['ratio']:.2f}x {spread}"
    return text if row["megabytes"] is None else f"{text}, {row['megabytes']:.0f} MB"


def written(page: str, report: dict[str, Any]) -> str:
    """The page with the table as it is now."""
    return with_table(page, BEGIN, table(report), END)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    PAGE.write_text(written(PAGE.read_text(), json.loads(Path(sys.argv[1]).read_text())))
    print(f"wrote {PAGE}")
