"""Kinds of option values that argparse checks before a subcommand starts."""

from __future__ import annotations

import argparse
import math


def positive_int(text: str) -> int:
    """A whole number of one or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an int >= 1, got {text!r}")
    return value


def positive_seconds(text: str) -> float:
    """A finite time above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds > 0, got {text!r}")
    return value
