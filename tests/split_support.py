"""Keys divided into parts small enough for small calls."""

from __future__ import annotations

from types import ModuleType

import pytest

from fastattn.backends import common


def small_parts(monkeypatch: pytest.MonkeyPatch, host: ModuleType) -> list[int]:
    """Parts of 16 keys and more; the list collects into how many the keys of each call are divided.

    Args:
        host: the backend's module that asks `common.parts_of`.
    """
    found: list[int] = []

    def parts_of(*sizes: int) -> int:
        found.append(common.parts_of(*sizes))
        return found[-1]

    monkeypatch.setattr(common, "SHORTEST_PART", 16)
    monkeypatch.setattr(host, "parts_of", parts_of)
    return found
