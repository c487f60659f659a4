"""The scripts in examples/family run as they stand, and their numbers say what the tour says of them."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastattn

EXAMPLES = Path(__file__).parent.parent / "examples" / "family"


def cues(printed: str) -> None:
    moved = dict(re.findall(r"^  (.+?)  +([\d.]+)%$", printed, re.M))
    assert moved.pop("the query") == "100.0"
    fixed = ("none, the mean", "none, a linear layer", "salience of the keys")
    assert moved == dict.fromkeys(fixed, "0.0")


def hierarchical(printed: str) -> None:
    right, commonest = map(int, re.findall(r"(\d+)%", printed))
    assert right > commonest + 30
    assert re.search(r"tkinter .*widget", printed) and re.search(r"email .*header", printed)


def kernel_regression(printed: str) -> None:
    assert "100000 points" in printed
    assert float(re.search(r"([\d.]+)% right", printed)[1]) > 95
    error = dict(re.findall(r"^  (\w+) +(\d\.\d+)", printed, re.M))
    assert float(error["epanechnikov"]) < 0.3 < float(error["constant"])


def paths_and_costs(printed: str) -> None:
    found = {}
    for line in printed.splitlines():
        if match := re.search(r"^(\S+) .*n\^([\d.]+) d\^([\d.]+) .* (\d+), (\d+) .* (\d+), (\d+)$", line):
            name, *numbers = match.groups()
            found[name] = [float(number) for number in numbers]
    times = {name: (round(n), round(d)) for name, (n, d, *_) in found.items()}
    assert times == {"convolution": (1, 2), "recurrence": (1, 2), "self-attention": (2, 1)}
    chains_and_paths = {name: numbers[2:] for name, (*numbers,) in found.items()}
    assert chains_and_paths["self-attention"][0] == chains_and_paths["self-attention"][1]
    assert chains_and_paths["convolution"][2:] == [8, 16], "(n - 1) / (k - 1)"
    assert chains_and_paths["recurrence"][2:] == [33, 65] and chains_and_paths["self-attention"][2:] == [1, 1]


def seq2seq(printed: str) -> None:
    rows = re.findall(r"^(simple|contextualised|soft_align) +([\d% ]+)%   in", printed, re.M)
    longest = [int(row.split("%")[-1]) for _, row in rows]
    for simple, contextualised, soft_align in (longest[:3], longest[3:]):
        assert soft_align > 1.5 * max(simple, contextualised)
    assert longest[5] > 90, "one marked token among 400"


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check for check in (cues, hierarchical, kernel_regression, paths_and_costs, seq2seq)
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CHECKS, "picture"}


def test_help_and_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    picture = importlib.import_module("picture")
    monkeypatch.setattr(sys, "argv", ["cues.py", str(tmp_path / "a" / "b")])
    assert picture.picture_path("cues.png", None) == tmp_path / "a" / "b" / "cues.png"
    assert (tmp_path / "a" / "b").is_dir()
    monkeypatch.setattr(sys, "argv", ["cues.py", "--help"])
    with pytest.raises(SystemExit):
        picture.picture_path("cues.png", "One image\n\npooled")
    assert "One image\n\npooled" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_example(native, name, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(fastattn.__file__).parent.parent),
        "MPLBACKEND": "agg",
    }
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr
    CHECKS[name](run.stdout)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_only_the_volitional_cue_follows_the_query(monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("cues")
    _, keys = example.load_patches()
    generator = torch.Generator().manual_seed(0)
    places = [(int(torch.randint(26, (), generator=generator)), column) for column in (0, 13, 39)]
    cues = example.build_cues(keys)
    looks = [example.look(cues, keys, keys[place]) for place in places]
    for name, follows in zip(cues, (False, False, False, True), strict=True):
        pooled, weights = zip(*(found[name] for found in looks), strict=True)
        if name != "none, a linear layer":
            torch.testing.assert_close(torch.stack([w.sum() for w in weights]), torch.ones(3))
        for other in (1, 2):
            assert torch.equal(pooled[0], pooled[other]) != follows
            assert torch.equal(weights[0], weights[other]) != follows
        if follows:  # each finds itself
            assert [divmod(int(w.argmax()), keys.shape[1]) for w in weights] == places
    flat = keys.flatten(0, 1)
    torch.testing.assert_close(looks[0]["none, the mean"][0], flat.mean(0), rtol=0, atol=1e-5)
    sky = keys[example.PLACES["the sky"]]
    missed = (looks[0]["none, a linear layer"][0] - sky).norm()
    assert missed < 0.5 * (flat.mean(0) - sky).norm(), "the linear layer has learned its one place"
    salient = int((flat - flat.mean(0)).norm(dim=1).argmax())
    assert int(looks[0]["salience of the keys"][1].argmax()) == salient
