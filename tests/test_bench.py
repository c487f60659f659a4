"""The benchmark's counting, statistics and output, and one tiny run of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastattn import bench
from fastattn.bench import contenders as contenders_module
from fastattn.bench import runner
from fastattn.bench.contenders import OURS, Contender, contenders, is_plain_causal
from fastattn.bench.flex import band
from fastattn.bench.machine import describe
from fastattn.bench.measure import Timing, calls_for, interleave, ratio
from fastattn.bench.report import GOALS, SCHEMA, geometric_mean
from fastattn.bench.table import compare_lines, goal_lines, machine_lines, result_line, summary_lines
from fastattn.bench.work import work
from fastattn.cli import main
from fastattn.testing.bench_cases import BENCH_CASES, TIMED
from fastattn.testing.inputs import make_inputs

TINY = bench.Options(threads=(1,), filter="^small-16-64$", seconds=0.01, min_sample=0.001)
ROW_KEYS = {
    "case", "group", "shape", "timed", "threads", "backend", "ms", "ms_quartiles", "rounds", "calls",
    "visible_pairs", "gflops", "of_fma_peak", "gbs", "fma_peaks_gflops", "copy_gbs", "best_torch", "ratio",
    "ratio_interval", "max_difference",
}  # fmt: skip


def named(name):
    [case] = [case for case in BENCH_CASES if case.name == name]
    return case


@pytest.fixture(scope="module")
def report():
    results, ceilings = bench.run(TINY)
    return bench.Report({"cpu": "here"}, results, ceilings, {})


def test_the_cases_are_named_once_and_every_goal_has_some():
    names = [case.name for case in BENCH_CASES]
    assert len(set(names)) == len(names)
    assert {case.timed for case in BENCH_CASES} == set(TIMED)
    quick = {case.group for case in BENCH_CASES if case.quick}
    for goal in GOALS:
        assert set(goal.groups) <= quick, goal.text
    grid = {(case.case.queries, case.case.head_dim) for case in BENCH_CASES if case.group == "forward"}
    assert grid == {(length, dim) for length in (64, 128, 512, 1024, 4096) for dim in (32, 64, 128)}


def test_visible_pairs():
    def pairs(name):
        case = named(name)
        return work(make_inputs(case.case), case.timed).pairs

    assert pairs("forward-512-64") == 8 * 512 * 512
    assert pairs("causal-512-64") == 8 * 512 * 513 // 2
    assert pairs("window-128-4096-64") == 2 * sum(min(row + 1, 128) for row in range(4096))
    # Four lengths spread from a quarter to the whole, on eight batch entries with four heads.
    lengths = torch.linspace(128, 512, 8).long()
    assert pairs("padding-512-64") == 4 * 512 * int(lengths.sum())
    assert pairs("decode-bfloat16-gqa-1-128") == 32 * 8192


def test_operations_and_bytes():
    case = named("forward-512-64")
    forward = work(make_inputs(case.case), "forward")
    assert forward.flops == 4 * 8 * 512 * 512 * 64
    assert forward.bytes == 4 * (4 * 8 * 512 * 64)
    assert not forward.is_memory_bound
    assert work(make_inputs(case.case), "backward").flops == 2.5 * forward.flops
    assert work(make_inputs(case.case), "step").flops == 3.5 * forward.flops
    decode = named("decode-bfloat16-1-128")
    amount = work(make_inputs(decode.case), "forward")
    assert amount.bytes == 2 * (2 * 8 * 8192 * 128 + 2 * 8 * 128)
    assert amount.is_memory_bound


def test_flex_takes_band_masks_alone():
    def bounds(name):
        return band(make_inputs(named(name).case))

    assert bounds("window-128-4096-64") == (-127, 0)
    assert bounds("window-128-both-4096-64") == (-64, 63)
    assert bounds("causal-512-64") == (None, 0)
    for name in ("forward-512-64", "padding-512-64", "documents-1024-64", "bool-mask-rows-512-64"):
        assert bounds(name) is None, name


def test_rounds_are_interleaved_and_turn_round():
    calls = []
    ways = [Contender(name, lambda name=name: calls.append(name)) for name in "ab"]
    timings = interleave(ways, [1, 2], 3)
    assert "".join(calls) == "abb" + "bba" + "abb"
    assert [len(timing.seconds) for timing in timings] == [3, 3]
    assert [timing.calls for timing in timings] == [1, 2]


def test_ratio_of_medians_and_its_interval():
    steady = ratio(Timing((2.0,) * 9, 1), Timing((0.5,) * 9, 1))
    assert (steady.value, steady.low, steady.high) == (4.0, 4.0, 4.0)
    noise = torch.rand(2, 41, generator=torch.Generator().manual_seed(1)) * 0.2
    noisy = ratio(Timing(tuple((3 + noise[0]).tolist()), 1), Timing(tuple((1.5 + noise[1]).tolist()), 1))
    assert noisy.low < noisy.value < noisy.high
    assert noisy.low > 1.8 and noisy.high < 2.1
    assert str(ratio(Timing((3.0,), 1), Timing((2.0,), 1))) == "1.50x [1.50, 1.50]"
    with pytest.raises(ValueError, match="must share rounds, got 1 and 2"):
        ratio(Timing((1.0,), 1), Timing((1.0, 1.0), 1))


def test_timing_quartiles_and_calls():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0), 1)
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert calls_for(0.001, 0.004) == 4
    assert calls_for(1.0, 0.004) == 1
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_pytorch_gets_each_mask_in_its_own_form():
    assert is_plain_causal(make_inputs(named("causal-512-64").case))
    for name in ("window-128-4096-64", "bool-mask-rows-512-64", "padding-128-64", "forward-512-64"):
        assert not is_plain_causal(make_inputs(named(name).case)), name


@pytest.mark.parametrize("name", ["gqa-512-64", "decode-float32-gqa-1-128", "float-bias-alibi-1024-64"])
def test_every_path_gives_the_same_results(name):
    case = named(name)
    ways = contenders(case, make_inputs(case.case))
    results = {way.name: result for way in ways if (result := contenders_module.usable(way)) is not None}
    assert {OURS, "sdpa", "sdpa-math"} <= set(results)
    assert ("sdpa-folded" in results) == (case.case.op == "decode")
    for way, result in results.items():
        assert runner.disagreement(result, results["sdpa-math"]) < 1e-5, way


def test_the_backward_pass_is_compared_with_the_path_that_is_fastest_over_both(monkeypatch):
    case = named("backward-64-64")
    alone = {OURS: Timing((0.1,), 1), "sdpa-flash": Timing((2.0,), 1), "sdpa-math": Timing((1.0,), 1)}
    both = {OURS: Timing((0.2,), 1), "sdpa-flash": Timing((3.0,), 1), "sdpa-math": Timing((4.0,), 1)}
    screened = []

    def screen(ways, options):
        screened.extend(way.name for way in ways)
        return both

    monkeypatch.setattr(runner, "screen", screen)
    inputs = make_inputs(case.case)
    assert runner.fastest_path(case, inputs, alone, TINY) == "sdpa-flash"
    assert set(screened) == set(alone)
    assert runner.fastest_path(replace(case, timed="forward"), inputs, alone, TINY) == "sdpa-math"


def test_a_wrong_result_stops_the_run(monkeypatch):
    def wrong(*arguments):
        ways = contenders(*arguments)
        right = ways[0].call
        return [Contender(OURS, lambda: right() * 1.01), *ways[1:]]

    monkeypatch.setattr(runner, "contenders", wrong)
    with pytest.raises(RuntimeError, match=r"small-16-64: fastattn and sdpa\S* differ by 0\.0"):
        bench.run(TINY)


def test_a_kernel_that_refuses_is_left_out():
    def call():
        raise RuntimeError("No available kernel. Aborting execution.")

    forced = Contender("sdpa-flash", call, torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    assert contenders_module.usable(forced) is None
    with pytest.raises(RuntimeError, match="No available kernel"):
        contenders_module.usable(Contender("sdpa", call))


def test_options_choose_cases():
    assert [case.name for case in TINY.cases()] == ["small-16-64"]
    assert all(case.quick for case in bench.Options(quick=True).cases())
    assert len(bench.Options().cases()) == len(BENCH_CASES)
    with pytest.raises(ValueError, match="filter must be a regular expression, got '\\('"):
        bench.Options(filter="(").cases()
    with pytest.raises(
        ValueError, match=r"filter must name a case of one of the groups forward, .*'nothing'"
    ):
        bench.Options(filter="nothing").cases()
    with pytest.raises(ValueError, match=r"threads must be positive numbers, got \(0,\)"):
        bench.run(bench.Options(threads=(0,)))


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), runner.thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


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
    assert written["groups"] == [{"group": "small", "threads": 1, "ratio": ours["ratio"]}]


def test_goals_are_met_or_missed(report):
    [result] = report.results

    def goal(value):
        other = SimpleNamespace(
            bench=named("forward-512-64"),
            threads=1,
            is_slower=False,
            fma_peaks=(),
            ratio=SimpleNamespace(value=value),
        )
        made = bench.Report({}, [other, result], report.ceilings, {})
        [entry] = made.goals()
        return entry["met"], goal_lines(made)[1].split()[-1]

    assert goal(1.2) == (True, "met")
    assert goal(1.0) == (False, "MISSED")
    assert goal_lines(report) == []  # no goal is about the group "small"


def test_a_comparison_names_what_changed(report):
    baseline = report.to_dict()
    assert compare_lines(report, baseline)[0].startswith("against the baseline: 1.000x")
    assert len(compare_lines(report, baseline)) == 1
    [row] = [row for row in baseline["rows"] if row["backend"] == OURS]
    row["ratio"], row["ratio_interval"] = row["ratio"] / 2, [end / 2 for end in row["ratio_interval"]]
    row["ratio_interval"][1] = min(row["ratio_interval"][1], report.results[0].ratio.low * 0.9)
    lines = compare_lines(report, baseline)
    assert lines[0].startswith("against the baseline: 2.000x")
    assert lines[1].startswith("  faster  small-16-64, 1 thread: ")
    with pytest.raises(ValueError, match="baseline must have schema"):
        compare_lines(report, {"schema": 0})


def test_a_disturbed_measurement_is_said_to_be_so(report):
    ceilings = SimpleNamespace(threads=1, flops=[100.0])
    [result] = report.results
    for peaks, count in (((99.0, 50.0), 1), ((99.0, 98.0), 0), ((), 0)):
        made = bench.Report({}, [replace(result, fma_peaks=peaks)], [ceilings], {})
        assert len(made.disturbed()) == count
        assert ("disturbed" in "\n".join(summary_lines(made))) == bool(count)
        assert "small-16-64" in result_line(made.results[0])


def test_a_busy_machine_is_said_to_be_so():
    facts = describe()
    assert not [line for line in machine_lines(facts | {"load_at_start": 0.1}) if line.startswith("warning")]
    assert "load average 5.0" in machine_lines(facts | {"load_at_start": 5.0})[-1]
    assert torch.__version__ in "\n".join(machine_lines(facts))


def test_the_command_writes_json_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = ["bench", "--threads", "1", "--filter", "^(small|tiny-call)-", "--seconds", "0.01", "--quick"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "FMA peak" in printed and "small-16-64" in printed and "at most 1.5x SDPA's time" in printed
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
    assert main(["bench", "--filter", "^small", "--baseline", str(tmp_path / "none.json")]) == 1
    printed = capsys.readouterr()
    assert "none.json" in printed.err and not printed.out
    for name, text, message in (
        ("list.json", "[]", "baseline must be a bench.json of schema"),
        ("empty.json", "", "baseline must be a bench.json, got"),
    ):
        (tmp_path / name).write_text(text)
        assert main(["bench", "--filter", "^small", "--baseline", str(tmp_path / name)]) == 1
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
