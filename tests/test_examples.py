"""Each script in examples/ runs as it stands and says what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn

EXAMPLES = Path(__file__).parent.parent / "examples"

# What each prints, as a regular expression; differences are rounding of float32.
ROUNDING = r"(0e\+00|\de-0[6-9])"
PRINTS = {
    "call.py": r"out \[1, 8, 1024, 64\], gradient of q \[1, 8, 1024, 64\]\n"
    r"attention\(q=1x8x1024x64, .*\)\n(.|\n)*  cpu +runs\n(.|\n)*",
    "module.py": rf"output differs by {ROUNDING}\nweights differ by {ROUNDING}\n"
    rf"with mask=causal\(\) by {ROUNDING}\n",
    "patch.py": r"replaced 3, left 0 as they were\n(  1 \w+: .*\n    \d.*\n){3}"
    rf"differs by {ROUNDING}\nundone, by 0e\+00\n",
    "swap.py": rf"replaced 2, left 0 as they were\n  layers.0.self_attn\n  layers.1.self_attn\n"
    rf"encoder differs by {ROUNDING}\nfunction differs by {ROUNDING}\n",
}


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", PRINTS)
def test_example(native, name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(fastattn.__file__).parent.parent)}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    run = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch(PRINTS[name], run.stdout)
