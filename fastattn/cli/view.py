"""`python -m fastattn view`: pictures of what a translation model looks at in a text."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from fastattn.cli.status import status_of

# The first that is missing names its extra; that of the first three brings all.
_NEEDED = ("tokenizers", "safetensors", "tqdm", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's options."""
    add = parser.add_argument
    add("--text", required=True, help="an English text, or - to read it from standard input")
    add(
        "--model",
        type=Path,
        metavar="PATH",
        help="a checkpoint of `python -m fastattn demo`; without it a small model is learnt at the first use "
        "(about a minute) and kept in the user's cache folder",
    )
    add("--png", type=Path, default=Path("view"), metavar="DIR", help="for the pictures (default: view)")


def run(args: argparse.Namespace) -> int:
    """Writes the pictures.

    Returns:
        The exit status: 1 where the model, the text or the folder will not do; 130 where Ctrl-C ended it.
    """
    return status_of(_run, args)


def _run(args: argparse.Namespace) -> int:
    for package in _NEEDED:  # before anything takes time
        importlib.import_module(package)
    import matplotlib

    matplotlib.use("Agg")
    from fastattn.demo import checkpoint, small, view

    text = sys.stdin.read() if args.text == "-" else args.text
    path = args.model
    if path is None:
        path = small.cached_path()
        if not path.exists():
            print(f"Learning a small model, once; it is kept as {path}", flush=True)
            small.learn(path)
    try:
        model, subwords = checkpoint.load_model(path)
    except ValueError as error:
        if args.model is None:
            raise ValueError(f"{error} (delete it, and the next call learns it anew)") from None
        raise
    seen = view.look(model, subwords, " ".join(text.split()))
    print(f"Translation: {seen.translation}\n{seen.record}")
    written = view.draw(seen, args.png)
    print(f"Wrote {', '.join(map(str, written))}")
    return 0
