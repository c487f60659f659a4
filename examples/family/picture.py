"""Where an example draws: what all scripts here read from the command line."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path


def picture_path(name: str, about: str | None) -> Path:
    """The folder on the command line, made if need be, else the current one, with `name`.

    Args:
        name: of the picture.
        about: what --help says.
    """
    parser = ArgumentParser(description=about, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help=f"where {name} is drawn (.)")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
