"""Each recipe in examples/inspect/ runs as it stands, finds what it says, and saves its picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastattn

pytest.importorskip("matplotlib")
RECIPES = Path(__file__).parent.parent / "examples" / "inspect"


def numbers(text: str, line: str) -> list[list[float]]:
    """The numbers with two decimals in each line that matches."""
    found = [re.findall(r"\d\.\d\d", each) for each in text.splitlines() if re.search(line, each)]
    return [[float(number) for number in each] for each in found]


def check_previous_token(text: str) -> None:
    first, second = numbers(text, "mean weight on the previous token")
    assert min(first) > 2 * max(second)
    assert numbers(text, "^accuracy")[0][0] > 0.9
    (near,), *others = numbers(text, "without links")
    assert near < 0.3 and all(other > 0.8 for (other,) in others)


def check_attention_sinks(text: str) -> None:
    (_, without, to_sink, _), (_, with_sink, spared, _) = numbers(text, "^with")
    assert without > 0.8 and to_sink == 0
    assert with_sink < 0.7 * without and spared > 0.2


def check_grammar_heads(text: str) -> None:
    assert numbers(text, "^accuracy")[0][0] > 0.95
    heads = numbers(text, "layer . head .|layer ., head .")
    assert len(heads) == 8 and max(verb for _, verb, _ in heads) > 0.7
    (subject,), (other,) = numbers(text, "verbs that do not see")
    assert subject < 0.8 < 0.9 < other


def check_fine_tuning(text: str) -> None:
    (one, one_after), (two, two_after) = numbers(text, "weight 1 back"), numbers(text, "weight 2 back")
    assert max(one) > max(two) and max(two_after) > max(one_after)
    assert [accuracy > 0.9 for (accuracy,) in numbers(text, "accuracy")] == [True, True]


def check_entropy_regulariser(text: str) -> None:
    (accuracy, entropy, weight), (accuracy_with, entropy_with, weight_with) = numbers(text, "accuracy")
    assert accuracy > 0.95 and accuracy_with > 0.95
    assert entropy_with < 0.7 * entropy and weight_with > weight


CHECKS: dict[str, Callable[[str], None]] = {
    "previous_token": check_previous_token,
    "attention_sinks": check_attention_sinks,
    "grammar_heads": check_grammar_heads,
    "fine_tuning": check_fine_tuning,
    "entropy_regulariser": check_entropy_regulariser,
}


def test_every_recipe_is_tested():
    assert {path.stem for path in RECIPES.glob("*.py")} == {*CHECKS, "toy"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_recipe(native, name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(fastattn.__file__).parent.parent)}
    command = [sys.executable, "-W", "error", str(RECIPES / f"{name}.py"), str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=600)
    assert (run.returncode, run.stderr) == (0, "")
    CHECKS[name](run.stdout)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
