"""What the scripts that write a table into a page of the docs share."""

from __future__ import annotations


def with_table(page: str, begin: str, table: str, end: str) -> str:
    """The page with the table between two lines of it.

    Raises:
        ValueError: the lines are not there.
    """
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page must have the lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"
