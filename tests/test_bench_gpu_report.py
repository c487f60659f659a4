"""The goals, the report and the picture of `make bench-gpu`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_gpu_support import CEILINGS, MACHINE, named, result, tiny, whole_report

from fastattn.bench.gpu import report
from fastattn.bench.gpu.goals import GOALS
from fastattn.bench.gpu.runner import Result
from fastattn.bench.work import Work
from fastattn.testing.gpu_bench_cases import GPU_BENCH_CASES, TOKENS


def test_goals_are_judged():
    full = named("full-forward-16x16384x128")
    flops = 4 * 16 * TOKENS * TOKENS * 128
    fast = flops / 500e12
    results = [
        replace(
            result(full, fastattn=fast, flex=1.1 * fast, sdpa_flash=1.5 * fast), work=Work(1, float(flops), 1)
        ),
        result(named("alibi-forward-64x4096x128"), fastattn=1.0, flex=2.0),
        result(named("host-time-forward-full-4x128x64"), fastattn=40e-6, sdpa=20e-6),
        result(named("softcap-forward-64x4096x128"), flex=2.0),
    ]
    judged = {goal.text: goal.judge(results) for goal in GOALS}
    forward = judged["forward, D=128, L=16384"]
    assert forward["got"] == pytest.approx(500) and forward["met"]
    assert judged["causal forward, D=128, L=16384"] is None
    flex = judged["FlexAttention's time / ours"]
    assert flex["got"] == pytest.approx((1.1 * 2) ** 0.5) and flex["cases"] == 2 and flex["met"]
    assert judged["time of PyTorch's flash kernel / ours"]["got"] == pytest.approx(1.5)
    host = judged["host time of a call without gradient"]
    assert host["got"] == pytest.approx(40) and not host["met"]


def test_the_report_and_its_lines(tmp_path: Path):
    found = whole_report()
    found.write_json(tmp_path / "gpu.json")
    back = json.loads((tmp_path / "gpu.json").read_text())
    assert back["schema"] == report.SCHEMA and back["left_out"] == ["left"]
    assert len(back["rows"]) == 5 * len(GPU_BENCH_CASES)
    assert back["failures"] == ["two: AssertionError: out: far"]
    assert back["goals"][0]["got"] == 1 and not back["goals"][0]["met"]
    text = "\n".join(report.summary_lines(found))
    for expected in (
        "1 FAILED",
        "no time was left for 1 cases: left",
        "MISSED",
        "  window 1024 forward",
        "sdpa-flash 1.",
    ):
        assert expected in text, expected
    [first, *more] = report.result_lines(replace(found.results[0], failure="differs"))
    assert first.startswith("full-forward-16x16384x128 ") and "best of PyTorch" in "".join([first, *more])
    assert more[-1].strip() == "FAILED: differs"
    assert len(report.host_lines(found.results)) == 1 + 5 * 6
    assert report.host_lines([]) == []
    machine = "\n".join(report.machine_lines(MACHINE, CEILINGS))
    assert "NVIDIA H200" in machine and "788 TFLOP/s" in machine
    assert report.summary_lines(report.Report(MACHINE, {}, [], [], [], {})) == []


def test_a_result_in_which_ours_failed_is_reported():
    failed = replace(result(tiny("x"), sdpa_flash=1.0), failure="OutOfMemoryError: no room", refused={})
    assert failed.ratio_to("sdpa-flash") is None and failed.best == "sdpa-flash"
    lines = report.result_lines(failed)
    assert lines[0].startswith("x-2x16x16") and "FAILED: OutOfMemoryError" in lines[-1]
    nothing = Result(tiny("x"), {}, Work(1, 1.0, 1), failure="RuntimeError: gone")
    assert report.result_lines(nothing)[0].startswith("x-2x16x16")


def test_the_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from fastattn.bench.gpu.plot import draw

    found = whole_report()
    assert draw(found.to_dict(), tmp_path / "all.png")
    only_bars = replace(found, results=[r for r in found.results if "varlen" in r.bench.group], ceilings={})
    assert draw(only_bars.to_dict(), tmp_path / "bars.png")
    assert not draw(replace(found, results=[]).to_dict(), tmp_path / "none.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000 and not (tmp_path / "none.png").exists()
