"""English prose from the Python standard library: docstrings of its modules and the `pydoc` topics.

Docstrings are read from source with `ast`, so no module is imported and nothing is run. The text depends on
the Python version alone, and its order is fixed, so that two runs on one machine see the same characters.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Not documentation: tests, third-party packages, and pydoc's data, which is read on its own.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
)


@dataclass(frozen=True)
class StdlibDocs:
    """Text found in one standard library.

    Attributes:
        text: all topics, then all docstrings, each followed by an empty line.
        num_topics: number of pydoc topics in `text`.
        num_docstrings: number of docstrings in `text`.
        num_modules: number of source files that had at least one docstring.
        folder: the folder that was read.
    """

    text: str
    num_topics: int
    num_docstrings: int
    num_modules: int
    folder: Path

    def describe(self) -> str:
        """One line for people: what was found, and where."""
        return (
            f"{len(self.text):,} characters: {self.num_topics} pydoc topics and {self.num_docstrings:,} "
            f"docstrings of {self.num_modules} modules in {self.folder}"
        )


def load_stdlib_docs(folder: str | Path | None = None) -> StdlibDocs:
    """Reads the documentation of a Python standard library.

    Args:
        folder: a folder of Python source; the running interpreter's standard library where None.

    Returns:
        The text and counts of what was found. `text` is ASCII with Unix newlines.

    Raises:
        FileNotFoundError: nothing was found; the message says what to install.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else Path(folder)
    topics = _pydoc_topics(folder)
    docstrings: list[str] = []
    num_modules = 0
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else []:
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts):
            found = list(_docstrings(path))
            docstrings += found
            num_modules += bool(found)
    docstrings = list(dict.fromkeys(docstrings))  # inherited and copied ones would be learnt by heart
    if not topics and not docstrings:
        raise FileNotFoundError(
            f"no documentation found in {folder}: this Python comes without the source of its library. "
            "Install the full standard library (Debian: apt-get install libpython3-stdlib), or another Python"
        )
    text = "".join(f"{piece}\n\n" for piece in [*topics, *docstrings])
    return StdlibDocs(text, len(topics), len(docstrings), num_modules, folder)


def _pydoc_topics(folder: Path) -> list[str]:
    """The strings of `pydoc_data/topics.py` in the order of their names, read as data not imported."""
    tree = _parse(folder / "pydoc_data" / "topics.py")
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [_clean(topics[name]) for name in sorted(topics)]
    return []


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module and of its classes and functions, in the order of the file."""
    tree = _parse(path)
    for node in ast.walk(tree) if tree else []:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = _clean(ast.get_docstring(node, clean=False) or "")
            if len(docstring.split()) >= 5:  # shorter ones ("See PEP 249.") are labels, not sentences
                yield docstring


def _parse(path: Path) -> ast.Module | None:
    """The module's syntax tree, None where the file is absent or unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files hold invalid escapes such as "\d"
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _clean(text: str) -> str:
    """Dedented ASCII with Unix newlines and no trailing blanks."""
    text = inspect.cleandoc(text).encode("ascii", "ignore").decode()
    return "\n".join(line.rstrip() for line in text.splitlines())
