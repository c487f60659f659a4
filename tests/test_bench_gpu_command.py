"""The command behind `make bench-gpu`: processes, the device, what it prints."""

from __future__ import annotations

import argparse
import json
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_gpu_support import CEILINGS, CPU, FakeClock, interpreted, tiny, whole_report

from fastattn.bench.contenders import OURS, Contender
from fastattn.bench.gpu import check, device, runner
from fastattn.bench.gpu.runner import run
from fastattn.cli import bench_gpu, main


@interpreted
def test_cases_are_checked_and_failures_told(monkeypatch):
    assert check.check_one("one", CPU).state == check.PASSED
    skipped = check.check_one("primes-float64", CPU)
    assert (skipped.state, skipped.reason) == (check.SKIPPED, "it has no float64")
    monkeypatch.setattr(check, "check_case", lambda *args: pytest.fail("wrong"))

    def wrong(*args):
        raise AssertionError("out: far off")

    monkeypatch.setattr(check, "check_case", wrong)
    failed = check.check_one("one", CPU)
    assert (failed.state, failed.reason) == (check.FAILED, "AssertionError: out: far off")
    text = check.lines([skipped, failed])
    assert text[0].endswith("0 passed, 1 skipped, 1 failed")
    assert text[1:] == ["  skipped 1: it has no float64", "  FAILED one: AssertionError: out: far off"]
    assert len(check.chosen(quick=True)) == -(-len(check.BY_NAME) // check.QUICK_STEP)
    assert all("gqa" in name for name in check.chosen(False, "gqa"))


def test_cases_in_processes_outlive_one_that_dies(monkeypatch, tmp_path: Path):
    """A child that ends in the middle: its case has failed, the rest is checked by another."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, sys, time\n"
        "for name in sys.stdin.read().split('\\n'):\n"
        "    print('noise', flush=True)\n"
        "    if name == 'dies': sys.exit(7)\n"
        "    if name == 'hangs': time.sleep(60)\n"
        "    print(json.dumps({'name': name, 'state': 'passed'}), flush=True)\n"
        "    if name == 'loses': sys.exit(3)\n"
    )
    popen = check.subprocess.Popen
    monkeypatch.setattr(
        check.subprocess, "Popen", lambda command, **kw: popen([sys.executable, str(child)], **kw)
    )
    heard: list[str] = []
    monkeypatch.setattr(check, "PATIENCE", 5.0)
    names = ["a", "dies", "b", "loses", "hangs", "c"]
    outcomes = check.check_in_processes(names, CPU, "triton", lambda o: heard.append(o.name), 1)
    assert [each.name for each in outcomes] == names == heard
    states = ["passed", "failed", "passed", "passed", "failed", "passed"]
    assert [each.state for each in outcomes] == states
    assert outcomes[1].reason == "its process ended with status 7"
    assert outcomes[4].reason.endswith("status -9, as where no result comes within 5 s")
    names.remove("hangs")
    assert {o.name for o in check.check_in_processes(names, CPU, "triton", lambda o: None, 3)} == set(names)


@interpreted
def test_the_child_prints_a_line_for_each_case(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(read=lambda: "one\nprimes-float64"))
    assert check.main(CPU, "triton") == 0
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states == ["passed", "skipped"]

    def lost(device):
        raise RuntimeError("CUDA error")

    assert device.answers(CPU)
    monkeypatch.setattr(device, "synchronize", lost)
    assert not device.answers(CPU)
    assert check.main(CPU, "triton") == check.DEVICE_LOST


def test_clocks_with_a_device_that_is_not_there(monkeypatch):
    """CUDA's events and queue played by a list of what was called."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, other):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: order.append("synchronize"))
    clock = device.DeviceClock(CPU, rest=0.0)
    way = Contender("x", partial(order.append, "call"))
    assert clock(way, 2) == pytest.approx(3e-3)
    assert order == ["synchronize", "call", "record", "call", "call", "record", "wait"]
    assert device.HostClock(CPU)(Contender("x", lambda: None), 3) < 1.0
    monkeypatch.setattr(device, "MATRIX", 8)
    monkeypatch.setattr(device, "COPY_BYTES", 64)
    assert set(device.ceilings(CPU, 0.0)) == {"product_tflops", "copy_tbs"}


def test_the_device_is_described_and_required(monkeypatch):
    facts = device.describe(CPU)
    assert {"gpu", "torch", "cuda", "cudnn", "triton", "fastattn"} <= set(facts)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="built without CUDA"):
        device.require(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees none"):
        device.require(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"fastattn\[triton\]"):
        device.require(torch.device("cuda"))
    assert device._triton_version() is None
    properties = types.SimpleNamespace(
        name="H", major=9, minor=0, multi_processor_count=132, total_memory=2**30, L2_cache_size=2**20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: properties)
    monkeypatch.setattr(device, "_nvidia_smi", lambda query: "580")
    facts = device.describe(torch.device("cuda"))
    assert (facts["gpu"], facts["capability"], facts["cache_mib"], facts["driver"]) == (
        "H",
        "9.0",
        1.0,
        "580",
    )


def test_nvidia_smi_is_asked(monkeypatch):
    answer = types.SimpleNamespace(stdout="580.1\n580.1\n")
    monkeypatch.setattr(device.subprocess, "run", lambda *args, **keywords: answer)
    assert device._nvidia_smi("driver_version") == "580.1" == device.state()

    def missing(*args, **keywords):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(device.subprocess, "run", missing)
    assert device._nvidia_smi("driver_version") is None


@interpreted
def test_the_whole_command(monkeypatch, capsys, tmp_path: Path):
    """Every step of `bench --gpu` on CPU tensors, with a clock that invents times."""
    monkeypatch.setattr(runner, "GPU_BENCH_CASES", (replace(tiny("full forward"), quick=True),))
    monkeypatch.setattr(bench_gpu, "require", lambda where: None)
    monkeypatch.setattr(bench_gpu, "ceilings", lambda where, rest: CEILINGS)
    monkeypatch.setattr(
        bench_gpu, "run", partial(run, clocks=(FakeClock(OURS), FakeClock(OURS)), compiled=False)
    )
    monkeypatch.setattr(bench_gpu.torch, "device", lambda *names: CPU)
    outcomes = [check.Outcome("one", check.PASSED), check.Outcome("two", check.FAILED, "far")]

    def check_them(names, where, backend, on_outcome, workers):
        for outcome in outcomes:
            on_outcome(outcome)
        kept = json.loads((tmp_path / "out" / "gpu.json").read_text())["checked"]
        assert len(kept) == len(outcomes)  # whatever comes afterwards
        return outcomes

    monkeypatch.setattr(bench_gpu.check, "check_in_processes", check_them)
    args = argparse.Namespace(
        quick=True, filter="", flex=False, minutes=5.0, gpu="all", out=tmp_path / "out", list=False,
        backend="triton",
    )  # fmt: skip
    assert bench_gpu.main(args) == 1
    printed = capsys.readouterr().out
    for expected in ("FAILED two: far", "full-forward-2x16x16", "TFLOP/s", "gpu.json"):
        assert expected in printed, expected
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["options"]["minutes"] == 5.0
    args.gpu = "check"
    del outcomes[1]
    assert bench_gpu.main(args) == 0
    args.gpu, args.minutes = "speed", None
    assert bench_gpu.main(args) == 0


def test_without_matplotlib_it_says_how_to_get_a_picture(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench_gpu.picture(whole_report(), tmp_path / "x.png")
    assert "pip install 'fastattn[bench]'" in capsys.readouterr().out


def test_the_command_line_without_a_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["bench", "--gpu", "--quick"]) == 1
    assert "error: --gpu needs a CUDA device" in capsys.readouterr().err
    assert main(["bench", "--gpu", "speed", "--filter", "nothing"]) == 1
    assert "filter must name a case" in capsys.readouterr().err
    assert main(["bench", "--gpu", "--list", "--filter", "^bias"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["bias", "bias"]
    with pytest.raises(SystemExit):
        main(["bench", "--gpu", "fast"])
