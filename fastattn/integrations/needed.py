"""The libraries that integrations need, and what to install where one is missing or too old."""

from __future__ import annotations

import importlib
import re


def need(library: str, least: tuple[int, int], extra: str) -> None:
    """Raise an ImportError that says what to install, unless `library` is there in version `least` or newer.

    Args:
        extra: the optional dependency of fastattn that installs it.

    Raises:
        ImportError: naming the integration, the version it needs and the version or error got.
    """
    cause: ImportError | None = None
    try:
        version = getattr(importlib.import_module(library), "__version__", "a module without a version")
        if tuple(map(int, re.findall(r"\d+", version)[:2])) >= least:
            return
        got = f", got {version}"
    except ImportError as error:
        got, cause = f" ({error})", error
    raise ImportError(
        f"fastattn.integrations.{library} needs {library} {least[0]}.{least[1]} or newer{got}; "
        f"run: pip install 'fastattn[{extra}]'"
    ) from cause
