"""What a run of the benchmark says: its rows, goals and comparisons, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_support import TINY, named

from fastattn import bench
from fastattn.bench import runner
from fastattn.bench.contenders import OURS
from fastattn.bench.goals import AGAINST_OURS
from fastattn.bench.machine import describe
from fastattn.bench.measure import Ratio
from fastattn.bench.report import SCHEMA
from fastattn.bench.table import compare_lines, goal_lines, machine_lines, result_line, summary_lines
from fastattn.cli import main
from fastattn.testing.bench_cases import BENCH_CASES

ROW_KEYS = {
    "case", "group", "shape", "timed", "threads", "backend", "ms", "ms_quartiles", "rounds", "calls",
    "visible_pairs", "gflops", "of_fma_peak", "gbs", "fma_peaks_gflops", "copy_gbs", "best_torch", "ratio",
    "ratio_interval", "max_difference", "own", "own_ms", "own_ratio", "own_ratio_interval",
}  # fmt: skip


@pytest.fixture(scope="module")
def report():
    results, ceilings = bench.run(TINY)
    return bench.Report({"cpu": "here"}, results, ceilings, {})


def test_report_rows(report):
    written = json.loads(json.dumps(report.to_dict()))
    assert written["schema"] == SCHEMA
    rows = {row["backend"]: row for row in written["rows"]}
    assert {OURS, "sdpa", "sdpa-flash", "sdpa-math"} <= set(rows)
    for row in rows.values():
        assert set(row) == ROW_KEYS
        low, high = row["ms_quartiles"]
        assert 0 < low <= row["ms"] <= high
        assert row["visible_pairs"] == 8 * 16 * 16
        assert row["gflops"] == pytest.approx(4 * 8 * 16 * 16 * 64 / (row["ms"] * 1e6))
        assert row["threads"] == 1
    ours = rows[OURS]
    best = rows[ours["best_torch"]]
    assert ours["ratio"] == pytest.approx(best["ms"] / ours["ms"])
    low, high = ours["ratio_interval"]
    assert 0 < low <= ours["ratio"] <= high
    assert ours["rounds"] == best["rounds"] >= 5
    assert 0 <= ours["max_difference"] < 1e-4
    assert written["groups"] == [{"group": "tiny call", "threads": 1, "ratio": ours["ratio"]}]
    assert ours["own"] is None and written["own_groups"] == []


def made_report(report, name, *, ratio=1.0, own=None, share=1.0, machine=None):
    """A report of one result with chosen numbers; `own` is (label, ratio)."""
    [result] = report.results
    beside = None if own is None else runner.Beside(own[0], result.ours, Ratio(own[1], own[1], own[1]))
    rate = result.work.flops / result.ours.median
    other = replace(
        result,
        bench=named(name),
        ratio=Ratio(ratio, ratio, ratio),
        own=beside,
        fma_peaks=(rate / share,),
    )
    return bench.Report(machine or {}, [other], report.ceilings, {})


def judged(report, name, text, **numbers):
    made = made_report(report, name, **numbers)
    [entry] = [goal for goal in made.goals() if goal["goal"] == text]
    [line] = [line for line in goal_lines(made) if line.startswith(text)]
    return entry["met"], line.split()[-1], entry["got"]


def test_goals_against_pytorch(report):
    text = "dense forward, float32"
    assert judged(report, "forward-8x512x64", text, ratio=1.35) == (True, "met", pytest.approx(1.35))
    assert judged(report, "forward-8x512x64", text, ratio=1.25) == (False, "MISSED", pytest.approx(1.25))
    # A time of PyTorch's over ours of 0.9 is a time of ours of 1.11.
    text = "tiny call with gradient, forward+backward"
    name = "tiny-call-forward+backward-1x1x16"
    assert judged(report, name, text, ratio=0.9) == (True, "met", pytest.approx(1 / 0.9))
    assert judged(report, name, text, ratio=0.8) == (False, "MISSED", pytest.approx(1.25))


def test_goals_against_our_other_call(report):
    text, name = "softcap / plain call", "softcap-8x512x64"
    assert judged(report, name, text, own=("plain", 0.85)) == (True, "met", pytest.approx(1 / 0.85))
    assert judged(report, name, text, own=("plain", 0.75)) == (False, "MISSED", pytest.approx(1 / 0.75))
    text, name = "one head, threads against one, forward", "forward-1x1024x128"
    assert judged(report, name, text, own=("1 thread", 1.8))[0]
    # Without a number of the other call, or with that of another one, there is nothing to judge.
    for other in (None, ("dense", 9.0)):
        made = made_report(report, name, own=other)
        assert text not in {goal["goal"] for goal in made.goals()}
    # Dropout's bound depends on the head dim.
    dims = {goal.text for goal in AGAINST_OURS if goal.covers(named("dropout-0.1-8x512x32"))}
    assert dims == {"dropout 0.1 / without, D 32"}


def test_goals_of_the_peak(report):
    text, name = "dense forward, D=128, L >= 1024", "forward-8x1024x128"
    assert judged(report, name, text, share=0.86) == (True, "met", pytest.approx(0.86))
    assert judged(report, name, text, share=0.84) == (False, "MISSED", pytest.approx(0.84))
    assert text not in {goal["goal"] for goal in made_report(report, "forward-8x512x64").goals()}
    avx2 = "AVX2 forward, D 64-128, L >= 1024"
    for isa in ("avx2", "avx512"):
        made = made_report(report, name, machine={"isa": isa})
        assert (avx2 in {goal["goal"] for goal in made.goals()}) == (isa == "avx2")


def test_goals_are_counted(report):
    assert goal_lines(bench.Report({}, [], report.ceilings, {})) == []
    lines = goal_lines(made_report(report, "softcap-8x512x64", own=("plain", 1.0)))
    assert lines[-1] == "1 of 1 goals met"


def test_our_other_call_has_its_columns(report):
    made = made_report(report, "softcap-8x512x64", own=("plain", 0.8))
    assert made.own_groups() == {("softcap", "plain"): {1: pytest.approx(0.8)}}
    assert result_line(made.results[0]).endswith("0.80x [0.80, 0.80] plain")
    assert "  softcap, against plain" in "\n".join(summary_lines(made))
    [row] = [row for row in made.to_dict()["rows"] if row["backend"] == OURS]
    assert (row["own"], row["own_ratio"]) == ("plain", pytest.approx(0.8))


def test_our_other_call_is_timed_in_the_same_rounds():
    options = replace(TINY, filter="^softcap-8x512x64$", screening_rounds=1)
    [result], _ = bench.run(options)
    assert result.own.label == "plain"
    assert len(result.own.timing.seconds) == len(result.ours.seconds)
    assert result.own.ratio.value == pytest.approx(result.own.timing.median / result.ours.median)


def test_a_comparison_names_what_changed(report):
    baseline = report.to_dict()
    assert compare_lines(report, baseline)[0].startswith("against the baseline: 1.000x")
    assert len(compare_lines(report, baseline)) == 1
    [row] = [row for row in baseline["rows"] if row["backend"] == OURS]
    row["ratio"], row["ratio_interval"] = row["ratio"] / 2, [end / 2 for end in row["ratio_interval"]]
    row["ratio_interval"][1] = min(row["ratio_interval"][1], report.results[0].ratio.low * 0.9)
    lines = compare_lines(report, baseline)
    assert lines[0].startswith("against the baseline: 2.000x")
    assert lines[1].startswith("  faster  tiny-call-8x16x64, 1 thread: ")
    with pytest.raises(ValueError, match="baseline must have schema"):
        compare_lines(report, {"schema": 0})


def test_a_disturbed_measurement_is_said_to_be_so(report):
    ceilings = SimpleNamespace(threads=1, flops=[100.0])
    [result] = report.results
    for peaks, count in (((99.0, 50.0), 1), ((99.0, 98.0), 0), ((), 0)):
        made = bench.Report({}, [replace(result, fma_peaks=peaks)], [ceilings], {})
        assert len(made.disturbed()) == count
        assert ("disturbed" in "\n".join(summary_lines(made))) == bool(count)
        assert "tiny-call-8x16x64" in result_line(made.results[0])


def test_a_busy_machine_is_said_to_be_so():
    facts = describe()
    assert not [line for line in machine_lines(facts | {"load_at_start": 0.1}) if line.startswith("warning")]
    assert "load average 5.0" in machine_lines(facts | {"load_at_start": 5.0})[-1]
    assert torch.__version__ in "\n".join(machine_lines(facts))


def test_unequal_vectors_are_said_to_be_so():
    facts = describe() | {"load_at_start": 0.1, "isa": "avx2"}
    assert "make bench-avx2" in machine_lines(facts | {"torch_cpu_capability": "AVX512"})[-1]
    assert not [x for x in machine_lines(facts | {"torch_cpu_capability": "AVX2"}) if "warning" in x]


def test_the_command_writes_json_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = ["bench", "--threads", "1", "--filter", "^tiny-call-8", "--seconds", "0.01", "--quick"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (
        "FMA peak" in printed and "tiny-call-8x16x64" in printed and "tiny call without gradient" in printed
    )
    assert json.loads((tmp_path / "bench.json").read_text())["options"]["threads"] == [1]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--out", str(tmp_path), "--baseline", str(tmp_path / "bench.json")]) == 0
    assert "against the baseline" in capsys.readouterr().out


def test_the_command_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    argv = ["bench", "--threads", "1", "--filter", TINY.filter, "--seconds", "0.01", "--out", str(tmp_path)]
    assert main(argv) == 0
    assert "pip install 'fastattn[bench]'" in capsys.readouterr().out
    assert (tmp_path / "bench.json").exists() and not (tmp_path / "bench.png").exists()


def test_the_command_reports_errors(tmp_path, capsys):
    assert main(["bench", "--filter", "nothing", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: filter must name a case")
    assert main(["bench", "--filter", "^tiny", "--baseline", str(tmp_path / "none.json")]) == 1
    printed = capsys.readouterr()
    assert "none.json" in printed.err and not printed.out
    for name, text, message in (
        ("list.json", "[]", "baseline must be a bench.json of schema"),
        ("empty.json", "", "baseline must be a bench.json, got"),
    ):
        (tmp_path / name).write_text(text)
        assert main(["bench", "--filter", "^tiny", "--baseline", str(tmp_path / name)]) == 1
        printed = capsys.readouterr()
        assert message in printed.err and not printed.out
    assert main(["bench", "--filter", "["]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: filter must be a regular expression, got '['") and not printed.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--threads", "0"], "argument --threads: must be an int >= 1, got '0'"),
        (["bench", "--threads", "1", "two"], "argument --threads: must be an int >= 1, got 'two'"),
        (["bench", "--seconds", "-1"], "argument --seconds: must be a number of seconds > 0, got '-1'"),
        (["bench", "--seconds", "nan"], "argument --seconds: must be a number of seconds > 0, got 'nan'"),
        (["demo", "--steps", "0"], "argument --steps: must be an int >= 1, got '0'"),
    ],
)
def test_options_are_checked_first(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and message in printed.err and not printed.out


def test_the_command_lists_cases(capsys):
    assert main(["bench", "--list", "--filter", "^window"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum("window" in case.group for case in BENCH_CASES)
    assert lines[0].split()[-1] == "float32"


def test_nothing_optional_is_needed_to_measure():
    code = (
        "import sys, fastattn.bench, fastattn.cli.bench;"
        "loaded = {name.partition('.')[0] for name in sys.modules};"
        "print(sorted(loaded & {'pytest', 'matplotlib', 'hypothesis'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
