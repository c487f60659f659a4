"""scripts/cuda_first.py: its steps are right on the emulated device; one that is wrong or hangs is named."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from cuda_support import ROOT, WRONG_STRIDE, on_emulated_device

FIRST = runpy.run_path(str(ROOT / "scripts" / "cuda_first.py"))
DEVICE_ALONE = ("blocks", "behind 2^31", "graph")  # too much for the emulated device, or nothing that it has
EMULATED = [name for name in FIRST["STEPS"] if name not in DEVICE_ALONE]


@pytest.mark.parametrize("name", EMULATED)
def test_a_step(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with on_emulated_device(monkeypatch, blocks=16):
        FIRST["run"]([name], torch.device("cpu"))
    assert f"{name}: right" in capsys.readouterr().out


def test_the_first_that_is_wrong_is_the_last_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with on_emulated_device(monkeypatch, fault=WRONG_STRIDE), pytest.raises((AssertionError, RuntimeError)):
        FIRST["run"](["copies", "stages"], torch.device("cpu"))
    assert capsys.readouterr().out.splitlines() == ["copies ..."]


def test_what_says_nothing_is_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    watched = FIRST["watched"]
    monkeypatch.setitem(watched.__globals__, "where_it_stands", lambda process: "somewhere")
    # Patience for a process to start on a busy machine too.
    script = "import time; print('copies ...', flush=True); time.sleep(600)"
    assert watched([sys.executable, "-c", script], 10.0) < 0
    assert capsys.readouterr().out == "copies ...\n\nnothing for 10 s; somewhere\n"


def test_what_ends_keeps_its_status(capsys: pytest.CaptureFixture[str]):
    assert FIRST["watched"]([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert capsys.readouterr().out == ""


def test_an_unknown_step_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["cuda_first.py", "turn"])
    with pytest.raises(SystemExit, match=r"a step must be one of copies, .*; got turn"):
        FIRST["main"]()
