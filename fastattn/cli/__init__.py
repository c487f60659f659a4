"""The command line, `python -m fastattn SUBCOMMAND`.

One module per subcommand, named in `SUBCOMMANDS` and imported only when it runs. Each has
`add_arguments(parser)` and `run(args) -> int`, the process's exit status.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

SUBCOMMANDS = {
    "info": "versions, instruction set, threads, and which backends are usable",
    "demo": "learn English to Chinese with fastattn, compare with PyTorch, and look at the result",
    "view": "pictures of what a translation model looks at in a text",
    "bench": "measure attention against PyTorch's on this machine",
}

# Which optional dependency an import error points to: `pip install 'fastattn[EXTRA]'`.
_EXTRA_OF_MODULE = {
    "matplotlib": "viz",
    "pytest": "bench",
    "pytest_benchmark": "bench",
    "sacrebleu": "train",
    "safetensors": "train",
    "tokenizers": "train",
    "tqdm": "train",
    "transformers": "hf",
    "triton": "triton",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: the words after `python -m fastattn`; `sys.argv[1:]` by default.
    Returns:
        The exit status: the subcommand's own, or 2 for a missing optional dependency.
    Raises:
        SystemExit: for `--help`, and with status 2 for bad usage.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m fastattn", description="fastattn: one attention call for PyTorch"
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    try:
        for name, summary in SUBCOMMANDS.items():
            command = commands.add_parser(name, help=summary, description=summary)
            if name == chosen:
                module = importlib.import_module(f"fastattn.cli.{name}")
                module.add_arguments(command)
                command.set_defaults(run=module.run)
        args = parser.parse_args(argv)
        if args.version:
            from fastattn._version import __version__

            print(__version__)
            return 0
        if args.command is None:
            parser.print_help()
            return 0
        return int(args.run(args))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF_MODULE:
            raise
        extra = _EXTRA_OF_MODULE[package]
        print(f"error: {package} is not installed; run: pip install 'fastattn[{extra}]'", file=sys.stderr)
        return 2
