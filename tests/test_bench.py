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
from fastattn.bench.contenders import OURS, Contender, contenders, is_plain_causal, own_contender
from fastattn.bench.flex import band
from fastattn.bench.goals import AGAINST_OURS, GOALS, MEASURES
from fastattn.bench.machine import describe
from fastattn.bench.measure import Ratio, Timing, calls_for, interleave, ratio
from fastattn.bench.padded import padded
from fastattn.bench.report import SCHEMA, geometric_mean
from fastattn.bench.table import compare_lines, goal_lines, machine_lines, result_line, summary_lines
from fastattn.bench.work import work
from fastattn.cli import main
from fastattn.testing.bench_case import TIMED
from fastattn.testing.bench_cases import BENCH_CASES, SENTENCES
from fastattn.testing.inputs import make_inputs

TINY = bench.Options(threads=(1,), filter="^tiny-call-8x16x64$", seconds=0.01, min_sample=0.001)
ROW_KEYS = {
    "case", "group", "shape", "timed", "threads", "backend", "ms", "ms_quartiles", "rounds", "calls",
    "visible_pairs", "gflops", "of_fma_peak", "gbs", "fma_peaks_gflops", "copy_gbs", "best_torch", "ratio",
    "ratio_interval", "max_difference", "own", "own_ms", "own_ratio", "own_ratio_interval",
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
    not_quick = set()
    for goal in GOALS:
        assert goal.measure in MEASURES and (goal.label is None) == (goal.measure != "own"), goal.text
        covered = [case for case in BENCH_CASES if goal.covers(case)]
        if goal.measure == "own":
            covered = [case for case in covered if case.own is not None and case.own.label == goal.label]
        assert set(goal.groups) <= {case.group for case in covered}, goal.text
        if not any(case.quick for case in covered):
            not_quick.add(goal.text)
    # Seconds a call, of PyTorch's: left to the full run.
    assert not_quick == {
        "causal window 256 at L=16384, forward",
        "causal window 256 at L=16384, backward",
        "block-sparse 10% against dense, backward",
    }


def test_the_grid_is_sampled():
    dense = [case.case for case in BENCH_CASES if case.group in ("forward", "short sequences")]
    square = [case for case in dense if case.queries == case.keys]
    lengths, dims, rows = (17, 64, 128, 512, 1024, 4096), (32, 64, 80, 128, 256), (1, 8, 64)
    assert {case.queries for case in square} == set(lengths)
    for length in lengths:
        here = [case for case in square if case.queries == length]
        assert {case.head_dim for case in here} >= set(dims) - {256}, length
        assert {case.batch * case.heads for case in here} >= (set(rows) if length < 4096 else {1, 8}), length
    assert all(case.queries <= 128 for case in dense if case.name.startswith("short"))


def test_our_other_call_differs_in_what_it_is_named_after():
    for case in BENCH_CASES:
        if case.own is None:
            continue
        ours, other = case.case, case.own.case
        assert other.name == ours.name  # and so the same numbers
        changed = {
            "dense": ours.mask is not None and other.mask is None,
            "no dropout": ours.dropout_p == 0.1 and other.dropout_p == 0,
            "float32": ours.dtype != torch.float32 and other.dtype == torch.float32,
            "plain": (other.softcap, other.sinks, other.bias) == (None, False, None),
            "1 thread": ours == other and case.own.threads == 1,
        }
        assert changed[case.own.label], case.name
    one_head = named("forward-1x512x64")
    assert own_contender(one_head, 1) is None
    assert own_contender(one_head, 2).threads == 1


def test_visible_pairs():
    def pairs(name):
        case = named(name)
        return work(make_inputs(case.case), case.timed).pairs

    assert pairs("forward-8x512x64") == 8 * 512 * 512
    assert pairs("causal-8x512x64") == 8 * 512 * 513 // 2
    assert pairs("window-128-2x4096x64") == 2 * sum(min(row + 1, 128) for row in range(4096))
    # Four lengths spread from a quarter to the whole, on eight batch entries with four heads.
    lengths = torch.linspace(128, 512, 8).long()
    assert pairs("padding-32x512x64") == 4 * 512 * int(lengths.sum())
    assert pairs("decode-bfloat16-gqa-32x1x128") == 32 * 8192
    assert pairs("sentences-512x61x64") == 8 * sum(length * length for length in SENTENCES)
    # A tenth of the blocks of each head.
    assert pairs("block-sparse-10%-8x2048x64") == 8 * round(0.1 * 32 * 32) * 64 * 64


def test_operations_and_bytes():
    case = named("forward-8x512x64")
    forward = work(make_inputs(case.case), "forward")
    assert forward.flops == 4 * 8 * 512 * 512 * 64
    assert forward.bytes == 4 * (4 * 8 * 512 * 64)
    assert not forward.is_memory_bound
    assert work(make_inputs(case.case), "backward").flops == 2.5 * forward.flops
    assert work(make_inputs(case.case), "step").flops == 3.5 * forward.flops
    decode = named("decode-bfloat16-8x1x128")
    amount = work(make_inputs(decode.case), "forward")
    assert amount.bytes == 2 * (2 * 8 * 8192 * 128 + 2 * 8 * 128)
    assert amount.is_memory_bound


def test_flex_takes_band_masks_alone():
    def bounds(name):
        return band(make_inputs(named(name).case))

    assert bounds("window-128-2x4096x64") == (-127, 0)
    assert bounds("window-128-both-2x4096x64") == (-64, 63)
    assert bounds("causal-8x512x64") == (None, 0)
    for name in ("forward-8x512x64", "padding-32x512x64", "documents-8x1024x64", "bool-mask-rows-8x512x64"):
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
    assert is_plain_causal(make_inputs(named("causal-8x512x64").case))
    for name in ("window-128-2x4096x64", "bool-mask-rows-8x512x64", "padding-64x128x64", "forward-8x512x64"):
        assert not is_plain_causal(make_inputs(named(name).case)), name


@pytest.mark.parametrize(
    "name", ["gqa-32x512x64", "decode-float32-gqa-32x1x128", "float-bias-rows-8x512x128", "alibi-8x512x64"]
)
def test_every_path_gives_the_same_results(name):
    case = named(name)
    ways = contenders(case, make_inputs(case.case))
    results = {way.name: result for way in ways if (result := contenders_module.usable(way)) is not None}
    assert {OURS, "sdpa", "sdpa-math"} <= set(results)
    assert ("sdpa-folded" in results) == (case.case.op == "decode")
    for way, result in results.items():
        assert runner.disagreement(result, results["sdpa-math"]) < 1e-5, way


@pytest.mark.parametrize("name", ["softcap-8x512x64", "sinks-8x512x64", "softcap-causal-8x1024x64"])
def test_what_pytorch_has_no_argument_for_is_compared_with_eager_code(name):
    case = named(name)
    ours, eager = contenders(case, make_inputs(case.case))
    assert (ours.name, eager.name) == (OURS, "eager")
    assert runner.disagreement(ours.call(), eager.call()) < 1e-5


@pytest.mark.parametrize("name", ["sentences-512x61x64", "sentences-forward+backward-512x61x64"])
def test_sentences_are_compared_with_padding_and_with_a_loop(name):
    case = named(name)
    ways = contenders(case, make_inputs(case.case))
    results = {way.name: contenders_module.usable(way) for way in ways}
    assert list(results) == [OURS, "padded", "padded-flash", "padded-math", "loop"]
    for way in ("padded", "padded-math", "loop"):
        assert runner.disagreement(results[OURS], results[way]) < 1e-5, way


def test_only_plain_self_attention_is_padded():
    with pytest.raises(ValueError, match="case must be varlen self-attention without a mask, got forward-"):
        padded(make_inputs(named("forward-8x512x64").case))


def test_module_shaped_calls_have_their_heads_side_by_side():
    case = named("multi-head-shaped-64x128x64")
    inputs = make_inputs(case.case)
    assert all(inputs.leaves[name].transpose(1, 2).is_contiguous() for name in "qkv")


def test_pytorch_need_not_store_huge_scores():
    names = [
        way.name
        for way in contenders(named("window-128-2x4096x64"), make_inputs(named("window-128-2x4096x64").case))
    ]
    assert "sdpa-math" in names
    case = replace(named("forward-8x4096x64"), timed="forward")
    assert [way.name for way in contenders(case, make_inputs(case.case))] == [OURS, "sdpa", "sdpa-flash"]


def test_a_slow_first_call_stands_for_itself():
    calls = []
    ways = [Contender(name, lambda name=name: calls.append(name)) for name in ("ours", "slow", "quick")]
    timings = runner.screen(ways, replace(TINY, screening_rounds=1), [0.0, 1.5, 0.0])
    assert "slow" not in calls and timings["slow"] == Timing((1.5,), 1)
    assert {"ours", "quick"} <= set(calls)


def test_the_backward_pass_is_compared_with_the_path_that_is_fastest_over_both(monkeypatch):
    case = named("backward-8x64x64")
    alone = {OURS: Timing((0.1,), 1), "sdpa-flash": Timing((2.0,), 1), "sdpa-math": Timing((1.0,), 1)}
    both = {OURS: Timing((0.2,), 1), "sdpa-flash": Timing((3.0,), 1), "sdpa-math": Timing((4.0,), 1)}
    screened = []

    def screen(ways, options, firsts):
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
    with pytest.raises(RuntimeError, match=r"tiny-call-8x16x64: fastattn and sdpa\S* differ by 0\.0"):
        bench.run(TINY)


def test_a_kernel_that_refuses_is_left_out():
    def call():
        raise RuntimeError("No available kernel. Aborting execution.")

    forced = Contender("sdpa-flash", call, torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    assert contenders_module.usable(forced) is None
    with pytest.raises(RuntimeError, match="No available kernel"):
        contenders_module.usable(Contender("sdpa", call))


def test_options_choose_cases():
    assert [case.name for case in TINY.cases()] == ["tiny-call-8x16x64"]
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
