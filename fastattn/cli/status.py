"""Exit statuses of subcommands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def status_of(
    work: Callable[[argparse.Namespace], int],
    args: argparse.Namespace,
    errors: tuple[type[Exception], ...] = (OSError, ValueError),
) -> int:
    """The status of work(args): its own, 1 and a message for one of the errors, 130 for Ctrl-C."""
    try:
        return work(args)
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
