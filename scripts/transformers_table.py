"""Write the table of what was tried into docs/integrations/transformers.md, from the tests' own list.

    python scripts/transformers_table.py

tests/test_transformers.py fails where the table is not what this writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docs_page import with_table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "integrations" / "transformers.md"
BEGIN = "<!-- written by scripts/transformers_table.py -->"
END = "<!-- end -->"


def table() -> str:
    """The table in Markdown, with the versions that it is true of."""
    import torch
    import transformers
    from transformers_senses import SENSES
    from transformers_texts import TEXTS

    zoo = [*TEXTS, *SENSES]
    of_torch = torch.__version__.partition("+")[0]
    lines = [
        f"{len(zoo)} models, transformers {transformers.__version__}, torch {of_torch}.",
        "",
        "| family | model | class | shown to bite | generate |",
        "|---|---|---|---|---|",
    ]
    for each in zoo:
        writes = "yes" if each.prompts else ""
        bites = ", ".join([*each.without, *each.bites])
        lines.append(f"| {each.family} | {each.name} | `{each.model}` | {bites} | {writes} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table as it is now."""
    return with_table(page, BEGIN, table(), END)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote {PAGE}")
